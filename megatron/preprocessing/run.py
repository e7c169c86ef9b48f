"""Raw corpora to an indexed dataset: blocks to parts in workers, then the merge. Goes on where it was stopped."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import (
    ConfigError,
    DataError,
    StopRequested,
    StorageError,
    UnavailableError,
)
from megatron.corpora.chat_options import ChatOptions, ChatSetup
from megatron.corpora.cleaning import CleaningOptions, prepare
from megatron.corpora.read_options import InputFile
from megatron.corpora.selection import select_files
from megatron.data.indexed_format import dtype_for_vocab
from megatron.preprocessing.block_queue import BlockQueue, Progress
from megatron.preprocessing.locks import FolderLock, locked
from megatron.preprocessing.merge import merge_parts, refuse_published
from megatron.preprocessing.options import PreprocessOptions, Shard
from megatron.preprocessing.parts import whole_parts
from megatron.preprocessing.processes import signals_stop, workers_started
from megatron.preprocessing.shards import (
    IN_USE,
    any_complete,
    current_encoder,
    mark_complete,
    shard_lock,
    switch_to_reference,
)
from megatron.preprocessing.work_plan import (
    FileList,
    WorkPlan,
    block_bytes_for,
    make_plan,
    parts_folder,
    read_plan,
    refuse_other_plan,
    write_plan,
)
from megatron.preprocessing.worker import Job, OtherIds, TokenizerFacts, describe_tokenizer, tools_released
from megatron.tokenizers.load import load_tokenizer


@dataclass(frozen=True)
class Outcome:
    """What a run did. `manifest` is None for one of several shards, which a merge publishes.

    Parts were made by this run or kept from earlier ones. Peak memory is the largest of a process that made parts, in
    bytes. `notes` are for the user: why the fast encoder is not used.
    """

    manifest: dict[str, Any] | None
    parts_made: int
    parts_kept: int
    peak_memory: int
    notes: tuple[str, ...]


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path,
    *,
    files_from: str | Path | None = None,
    workers: int = 1,
    options: PreprocessOptions | None = None,
    shard: Shard | None = None,
    overwrite: bool = False,
    restart: bool = False,
    keep_parts: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Tokenize the inputs, one after another, into `P.bin`, `P.idx` and the manifest `P.json`.

    The work is done in parts, kept in the folder `P.parts`: a run that was stopped, killed or ran out of disk goes on
    when it is started again with the same inputs and options. The published files are byte-identical at any number of
    workers, interruptions and shards, and appear whole or not at all, `.idx` last. Documents of white space only are
    left out and counted. Every document ends in the tokenizer's end-of-document id.

    workers: processes; 1 does everything in this one. shard: make the parts of one of several shards, and publish
    nothing: `merge` does when all are complete. restart: throw away what an earlier run left.

    Raises ConfigError for a bad argument, an output that exists, or parts of other work; DataError for what cannot be
    read, or inputs without any text; UnavailableError where a worker process died; StorageError where the disk is full
    or failing; StopRequested on SIGINT, SIGTERM and SIGUSR1. Parts are kept whatever is raised.
    """
    if workers < 1:
        raise ConfigError(f"workers = {workers}: at least 1 is needed")
    prefix, options, whole = Path(output_prefix), options or PreprocessOptions(), shard or Shard()
    folder = parts_folder(prefix)
    refuse_published(prefix, overwrite)
    chat = None if options.chat is None else _prepared_chat(options.chat, tokenizer)
    work = _Work(inputs, files_from, str(tokenizer), options, chat, whole, folder, restart, progress)
    with _resumable(folder), tools_released(), signals_stop(), workers_started(workers) as pool:
        described = [
            pool.submit(describe_tokenizer, work.tokenizer, options.encoder, (number, workers))
            for number in range(workers)
        ]
        skipped: Counter[str] = Counter()
        files = select_files(inputs, files_from, options.read, skipped)
        with locked(folder / IN_USE, shared=True, patience=10.0) as in_use:
            if in_use is None:
                raise DataError(f"{folder}: another process is merging these parts now")
            plan = work.agreed_plan(in_use, files, _agreed([f.result() for f in described]), skipped)
            with locked(shard_lock(folder, whole), shared=False) as mine:
                if mine is None:
                    raise DataError(f"{folder}: another process is making these parts now (shard {whole})")
                queue = work.make_parts(pool, workers, plan, files)
            notes = (note,) if (note := current_encoder(folder, plan).note) else ()
            manifest = None
            if shard is None or shard.count == 1:
                if not in_use.try_alone():
                    raise DataError(f"{folder}: another process is using these parts now")
                manifest = merge_parts(prefix, plan, overwrite=overwrite, keep_parts=keep_parts)
    return Outcome(manifest, queue.made, queue.kept, queue.peak_memory, notes)


def _prepared_chat(options: ChatOptions, tokenizer: str | Path) -> ChatSetup:
    from megatron.corpora.chat_setup import prepare_chat  # with jinja2, which text does not need

    return prepare_chat(options, load_tokenizer(tokenizer))


def _agreed(described: Sequence[TokenizerFacts]) -> TokenizerFacts:
    """What the workers say together: the reference, where a share of the proof failed in one of them."""
    return next((facts for facts in described if facts.backend == facts.library), described[0])


@dataclass(frozen=True)
class _Work:
    """The arguments of one run."""

    inputs: Sequence[str | Path]
    files_from: str | Path | None
    tokenizer: str
    options: PreprocessOptions
    chat: ChatSetup | None
    shard: Shard
    folder: Path
    restart: bool
    progress: Callable[[Progress], None] | None

    def agreed_plan(
        self, in_use: FolderLock, files: Sequence[InputFile], facts: TokenizerFacts, skipped: Counter[str]
    ) -> WorkPlan:
        """This run's plan, which is also the one in the folder. Raises ConfigError where another one is there."""
        present = FileList.of(files)
        plan = make_plan(
            [str(path) for path in self.inputs] + ([f"files from {self.files_from}"] if self.files_from else []),
            present,
            self.options.to_json() | ({"chat": self.chat.to_json()} if self.chat is not None else {}),
            {"name": facts.name, "fingerprint": facts.fingerprint, "vocab_size": facts.vocab_size},
            facts.library,
            {"backend": facts.backend, "note": facts.note},
            dtype_for_vocab(facts.vocab_size).name,
            self.options.block_bytes or block_bytes_for(present.total_bytes),
            self.shard.count,
            dict(sorted(skipped.items())),
        )
        # one after another: all shards of an array may begin at the same moment
        with locked(self.folder / "plan.lock", shared=False, patience=120.0) as beginning:
            if beginning is None:
                raise DataError(f"{self.folder}: another process holds plan.lock for two minutes: see what it does")
            found = read_plan(self.folder) if not self.restart else None
            if found is None or found.fingerprint != plan.fingerprint:
                self._begin_anew(in_use, plan, found, present)
        return plan

    def _begin_anew(self, in_use: FolderLock, plan: WorkPlan, found: WorkPlan | None, present: FileList) -> None:
        """Write the plan into a folder that has none, or in the place of one that may go."""
        alone = in_use.try_alone()
        try:
            if self.restart and not alone:
                raise ConfigError(f"{self.folder}: --restart: another process is working on these parts: stop it first")
            kept = whole_parts(self.folder)
            if found is not None and (kept or not alone):
                refuse_other_plan(self.folder, plan, found, present, kept)
            if alone:
                _empty(self.folder)
            write_plan(self.folder, plan, present)
        finally:
            in_use.share()

    def make_parts(self, pool: Executor, workers: int, plan: WorkPlan, files: Sequence[InputFile]) -> BlockQueue:
        """Make the parts of the shard that are not there, and mark it complete."""
        cleaning = prepare(self.options.cleaning, self.folder)
        while True:
            encoder = current_encoder(self.folder, plan)
            job = Job(
                folder=str(self.folder),
                plan=plan.fingerprint,
                tokenizer=self.tokenizer,
                fingerprint=plan.content["tokenizer"]["fingerprint"],
                encoder="reference" if encoder.backend == plan.content["tokenizer_library"] else self.options.encoder,
                backend=encoder.backend,
                read=self.options.read,
                cleaning=None if cleaning == CleaningOptions() else cleaning,
                quarantine=self.options.on_error == "quarantine",
                chat=self.chat,
            )
            queue = BlockQueue(pool, workers, job, files, plan, self.shard, self.progress)
            try:
                queue.run()
            except OtherIds as error:
                if self.options.encoder == "fast":
                    raise UnavailableError(
                        f"the fast encoder is not exact on this corpus: {error}. Use --encoder auto or reference"
                    ) from None
                switch_to_reference(self.folder, str(error))
            # another shard may have found meanwhile that its encoder is not exact: then all of them begin anew
            if current_encoder(self.folder, plan).backend == encoder.backend:
                mark_complete(self.folder, self.shard, plan, encoder.backend, queue.keys)
                return queue


def _empty(folder: Path) -> None:
    """Everything that an earlier run left, but for the locks."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink()


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Errors that a later run can make good say so. A folder in which nothing is finished is removed."""
    try:
        try:
            yield
        except BrokenProcessPool:
            raise UnavailableError(
                "a worker process died (killed by the system, most often for lack of memory; fewer --workers need "
                f"less): {_kept_words(folder)}"
            ) from None
        except (StopRequested, StorageError) as error:
            raise type(error)(f"{error}: {_kept_words(folder)}") from error
    except BaseException:
        _remove_if_nothing_is_finished(folder)
        raise


def _remove_if_nothing_is_finished(folder: Path) -> None:
    if not folder.is_dir():
        return
    with locked(folder / IN_USE, shared=False) as lock:
        if lock is not None and not whole_parts(folder) and not any_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _kept_words(folder: Path) -> str:
    kept = whole_parts(folder)
    return f"run the same command again: {kept:,} finished part{'s are' if kept != 1 else ' is'} kept in {folder}"
