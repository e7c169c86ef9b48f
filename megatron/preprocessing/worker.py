"""One block of the corpus to one part: read, clean, encode, write. Runs in worker processes."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import DataError
from megatron.corpora.blocks import Block, absolute_line, read_block
from megatron.corpora.document import BadRecord, Document
from megatron.corpora.read_options import ReadOptions
from megatron.data.indexed_format import dtype_for_vocab
from megatron.preprocessing.parts import PartKey, PartWriter
from megatron.preprocessing.quarantine import kind_of, quarantine_line
from megatron.preprocessing.sample_check import SampleCheck
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.encoder import Backend, Encoder, EncoderMismatch, open_encoder
from megatron.tokenizers.load import load_tokenizer

if TYPE_CHECKING:  # imported where cleaning is asked for: it takes a worker's start as long as all the rest
    from megatron.corpora.cleaning import Cleaner, CleaningOptions, Signer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096


class OtherIds(Exception):
    """A sample of a block, encoded by the tokenizer itself, gave other ids. Says where."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What the main process needs to know of a tokenizer and of its encoder without loading either."""

    name: str
    fingerprint: str
    vocab_size: int
    library: str
    backend: str
    note: str


@dataclass(frozen=True)
class Job:
    """What is the same for every block of a run."""

    folder: str
    plan: str  # fingerprint of the work plan: parts of another are not taken
    tokenizer: str
    fingerprint: str
    encoder: Backend
    backend: str  # which must be the one that opens
    read: ReadOptions
    cleaning: CleaningOptions | None  # None: nothing is asked for
    quarantine: bool


@dataclass(frozen=True)
class PartReport:
    """What a worker says of a part that it has written. Peak memory is the process's, in bytes."""

    documents: int
    tokens: int
    peak_memory: int


@dataclass
class _Tools:
    job: Job
    tokenizer: Tokenizer
    encoder: Encoder
    cleaner: Cleaner | None
    signer: Signer | None


# What a process holds between its tasks. Opened by the first task, so that an error in it comes back as that error.
_held: dict[str, Any] = {}


def describe_tokenizer(path: str, encoder: Backend, proof: tuple[int, int]) -> TokenizerFacts:
    """Open a tokenizer and its encoder, keep both for the tasks that follow, and tell about them.

    proof: the share of the encoder's start-up proof that falls to this call.
    """
    tokenizer, opened = _opened(path, encoder, proof)
    return TokenizerFacts(
        tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.library, opened.backend, opened.note
    )


def make_part(block: Block, job: Job) -> PartReport:
    """Write the part of a block aside; `publish_part` gives it its name.

    Raises DataError for a bad record (unless they are quarantined), a damaged input, or a tokenizer that was changed;
    StorageError where the part cannot be written; OtherIds where a sample of the block, encoded by the
    tokenizer itself, gives other ids.
    """
    tools = _tools(job)
    key = PartKey(block.file_number, block.block_number)
    try:
        return _make_part(block, key, job, tools)
    except EncoderMismatch as error:  # which does not travel between processes
        raise OtherIds(f"{tools.encoder.backend}: {key.name}: {error}") from None


def _make_part(block: Block, key: PartKey, job: Job, tools: _Tools) -> PartReport:
    skipped: Counter[str] = Counter()
    with PartWriter(Path(job.folder), key) as writer:
        rows = _Rows(tools, writer, SampleCheck(tools.encoder, tools.tokenizer, key))
        for record in read_block(block, job.read, skipped):
            rows.records += 1
            if isinstance(record, BadRecord):
                if not job.quarantine:
                    raise _bad_record(record, absolute_line(block, record.line))
                rows.set_aside(record, block.first_line)
            elif not record.text or record.text.isspace():
                skipped["empty document"] += 1
            elif tools.cleaner is not None and (reason := tools.cleaner.reject(record)) is not None:
                rows.rejected[reason] += 1
            else:
                rows.add(record)
        rows.flush()
        summary = {
            "plan": job.plan,
            "backend": job.backend,
            "skipped": dict(sorted(skipped.items())),
            **rows.summary(),
        }
        writer.finish(summary, rows.arrays(), rows.quarantined())
    return PartReport(rows.documents, rows.tokens, _peak_memory())


class _Rows:
    """The documents of a part, as they gather."""

    def __init__(self, tools: _Tools, writer: PartWriter, check: SampleCheck) -> None:
        self._tools, self._writer, self._check = tools, writer, check
        self._texts: list[str] = []
        self._characters = 0
        self._lengths: list[NDArray[np.int64]] = []
        self._bytes: list[int] = []
        self._groups: dict[str, list[str]] = {"languages": [], "sources": []}
        self._signatures: dict[str, list[NDArray[Any]]] = {}
        self._aside: list[bytes] = []
        self._aside_kinds: Counter[str] = Counter()
        self._max_id = -1
        self.rejected: Counter[str] = Counter()
        self.records = self.tokens = 0

    @property
    def documents(self) -> int:
        return len(self._bytes)

    def add(self, document: Document) -> None:
        text = document.text
        self._texts.append(text)
        self._bytes.append(len(text) if text.isascii() else len(text.encode()))
        self._groups["languages"].append(document.language)
        self._groups["sources"].append(document.source)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS or len(self._texts) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Encode and write what has gathered."""
        if not self._texts:
            return
        ids, lengths = self._tools.encoder.encode_documents(self._texts)
        self._check.look_at(self._texts)
        self._writer.add_ids(ids)
        self._lengths.append(lengths)
        self._max_id = max(self._max_id, int(ids.max()))
        self.tokens += len(ids)
        if self._tools.signer is not None:
            for name, rows in self._tools.signer.sign(self._texts).items():
                self._signatures.setdefault(name, []).append(rows)
        self._texts, self._characters = [], 0

    def set_aside(self, record: BadRecord, first_line: int | None) -> None:
        """Keep a bad record for the quarantine file."""
        self._aside.append(quarantine_line(record, first_line))
        self._aside_kinds[kind_of(record.reason)] += 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)
        arrays: dict[str, NDArray[Any]] = {"lengths": lengths, "text_bytes": np.array(self._bytes, np.int64)}
        for name, values in self._groups.items():
            if any(values):
                numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
                arrays[name] = np.array([numbers[value] for value in values], np.int32)
        return arrays | {name: np.concatenate(rows) for name, rows in self._signatures.items()}

    def quarantined(self) -> bytes:
        return b"".join(self._aside)

    def summary(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "documents": self.documents,
            "tokens": self.tokens,
            "max_token_id": self._max_id,
            "rejected": dict(sorted(self.rejected.items())),
            "quarantined": dict(sorted(self._aside_kinds.items())),
            **{name: list(dict.fromkeys(values)) for name, values in self._groups.items() if any(values)},
        }


def _bad_record(record: BadRecord, line: int | None) -> DataError:
    return DataError(
        f"{record.message(line)}. Correct it, or set such records aside with --on-error quarantine, which keeps the "
        "parts that are done"
    )


def _tools(job: Job) -> _Tools:
    tools: _Tools | None = _held.get("tools")
    if tools is None or tools.job != job:
        tokenizer, encoder = _opened(job.tokenizer, job.encoder, None)
        if tokenizer.fingerprint != job.fingerprint:
            raise DataError(f"{job.tokenizer}: the file was changed while preprocessing ran")
        if encoder.backend != job.backend:
            raise DataError(
                f"{job.tokenizer}: this process encodes with {encoder.backend}, and the work began with {job.backend}: "
                "the installation was changed while preprocessing ran"
            )
        tools = _held["tools"] = _Tools(job, tokenizer, encoder, *_cleaning_tools(job.cleaning))
    return tools


def _cleaning_tools(options: CleaningOptions | None) -> tuple[Cleaner | None, Signer | None]:
    if options is None:
        return None, None
    from megatron.corpora.cleaning import Cleaner, Signer

    judges = bool(options.filters) or options.decontamination is not None
    return Cleaner(options) if judges else None, Signer(options) if options.finds_duplicates else None


def _opened(path: str, backend: Backend, proof: tuple[int, int] | None) -> tuple[Tokenizer, Encoder]:
    key, held = (path, backend), _held.get("tokenizer")
    if held is None or held[0] != key or proof is not None:
        tokenizer = held[1] if held is not None and held[0][0] == path else load_tokenizer(path)
        held = (key, tokenizer, open_encoder(tokenizer, dtype_for_vocab(tokenizer.vocab_size), backend, proof))
        _held["tokenizer"] = held
    return held[1], held[2]


@contextmanager
def tools_released() -> Iterator[None]:
    """Forgets, when left, what tasks in this very process have opened: files may be others the next time."""
    try:
        yield
    finally:
        _held.clear()


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
