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
    from megatron.corpora.chat_options import ChatSetup
    from megatron.corpora.chat_records import Conversation
    from megatron.corpora.chat_targets import RenderedChat
    from megatron.corpora.cleaning import Cleaner, CleaningOptions, Signer
    from megatron.preprocessing.chat_encoding import ChatEncoder

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
    chat: ChatSetup | None = None  # None: the corpus is text


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
    chat: ChatEncoder | None
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
        rows = _Rows(tools, writer, SampleCheck(tools.encoder, tools.tokenizer, key), block, skipped)
        for record, chat in _items(block, job.read, skipped, tools.chat):
            rows.records += 1
            if isinstance(record, BadRecord):
                rows.set_aside(record, rows.records)
            elif not record.text or record.text.isspace():
                skipped["empty document"] += 1
            elif tools.cleaner is not None and (reason := tools.cleaner.reject(record)) is not None:
                rows.rejected[reason] += 1
            else:
                rows.add(record, chat)
        rows.flush()
        summary = {
            "plan": job.plan,
            "backend": job.backend,
            "skipped": dict(sorted(skipped.items())),
            **rows.summary(),
        }
        writer.finish(summary, rows.arrays(), rows.quarantined())
    return PartReport(rows.documents, rows.tokens, _peak_memory())


_Chat = tuple["Conversation", "RenderedChat"]


def _items(
    block: Block, read: ReadOptions, skipped: Counter[str], chats: ChatEncoder | None
) -> Iterator[tuple[Document | BadRecord, _Chat | None]]:
    """The records of a block; a conversation is the document that its rendered text makes."""
    if chats is None:
        yield from ((record, None) for record in read_block(block, read, skipped))
        return
    from megatron.corpora.chat_reading import read_chats

    for record in read_chats(block, read, skipped):
        if isinstance(record, BadRecord):
            yield record, None
        elif isinstance(made := chats.render(record), BadRecord):
            yield made, None
        else:
            yield Document(record.id, made.text, record.language, record.source, record.licence), (record, made)


class _Rows:
    """The documents of a part, as they gather."""

    def __init__(
        self, tools: _Tools, writer: PartWriter, check: SampleCheck, block: Block, skipped: Counter[str]
    ) -> None:
        self._tools, self._writer, self._check = tools, writer, check
        self._block, self._skipped = block, skipped
        self._texts: list[str] = []
        self._chats: list[_Chat] = []
        self._record_numbers: list[int] = []  # of the texts
        self._targets: list[NDArray[np.bool_]] = []
        self._chat_counts: Counter[str] = Counter()
        self._characters = 0
        self._lengths: list[NDArray[np.int64]] = []
        self._bytes: list[int] = []
        self._groups: dict[str, list[str]] = {"languages": [], "sources": []}
        self._signatures: dict[str, list[NDArray[Any]]] = {}
        self._aside: list[tuple[int, bytes]] = []  # with the number of the record
        self._aside_kinds: Counter[str] = Counter()
        self._max_id = -1
        self.rejected: Counter[str] = Counter()
        self.records = self.tokens = 0

    @property
    def documents(self) -> int:
        return len(self._bytes)

    def add(self, document: Document, chat: _Chat | None) -> None:
        text = document.text
        self._texts.append(text)
        if chat is not None:
            self._chats.append(chat)
            self._record_numbers.append(self.records)
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
        if self._tools.chat is None:
            ids, lengths = self._tools.encoder.encode_documents(self._texts)
            self._check.look_at(self._texts)
        else:
            ids, lengths = self._encoded_chats(self._tools.chat)
        self._writer.add_ids(ids)
        self._lengths.append(lengths)
        self._max_id = max(self._max_id, int(ids.max()) if len(ids) else -1)
        self.tokens += len(ids)
        if self._tools.signer is not None and self._texts:
            for name, rows in self._tools.signer.sign(self._texts).items():
                self._signatures.setdefault(name, []).append(rows)
        self._texts, self._characters = [], 0

    def _encoded_chats(self, encoder: ChatEncoder) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
        """The conversations that have gathered, without those that are too long."""
        chats, numbers, first = self._chats, self._record_numbers, len(self._bytes) - len(self._texts)
        self._chats, self._record_numbers = [], []
        found = encoder.encode(chats, self._check)
        self._texts = [text for text, kept in zip(self._texts, found.kept, strict=True) if kept]
        for place, size in found.text_bytes.items():
            self._bytes[first + place] = size
        columns: list[list[Any]] = [self._bytes, *self._groups.values()]
        for column in columns:
            column[first:] = [value for value, kept in zip(column[first:], found.kept, strict=True) if kept]
        self._targets.append(found.targets)
        self._skipped.update(found.skipped)
        self._chat_counts.update(found.counts)
        for place, record in found.bad:
            self.set_aside(record, numbers[place])
        return found.ids, found.lengths

    def set_aside(self, record: BadRecord, number: int) -> None:
        """Keep a bad record for the quarantine file; DataError where none is asked for. number: of the record."""
        if not self._tools.job.quarantine:
            if self._chats:
                self.flush()  # an earlier one may turn out to be bad too, and is named then
            raise _bad_record(record, absolute_line(self._block, record.line))
        self._aside.append((number, quarantine_line(record, self._block.first_line)))
        self._aside_kinds[kind_of(record.reason)] += 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)
        arrays: dict[str, NDArray[Any]] = {"lengths": lengths, "text_bytes": np.array(self._bytes, np.int64)}
        for name, values in self._groups.items():
            if any(values):
                numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
                arrays[name] = np.array([numbers[value] for value in values], np.int32)
        if self._targets:
            arrays["loss_mask"] = np.packbits(np.concatenate(self._targets), bitorder="little")
        return arrays | {name: np.concatenate(rows) for name, rows in self._signatures.items()}

    def quarantined(self) -> bytes:
        return b"".join(line for _, line in sorted(self._aside, key=lambda item: item[0]))

    def summary(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "documents": self.documents,
            "tokens": self.tokens,
            "max_token_id": self._max_id,
            "rejected": dict(sorted(self.rejected.items())),
            "quarantined": dict(sorted(self._aside_kinds.items())),
            **({"chat": dict(sorted(self._chat_counts.items()))} if self._tools.chat is not None else {}),
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
        chat = _chat_tools(job.chat, tokenizer, encoder)
        tools = _held["tools"] = _Tools(job, tokenizer, encoder, chat, *_cleaning_tools(job.cleaning))
    return tools


def _chat_tools(setup: ChatSetup | None, tokenizer: Tokenizer, encoder: Encoder) -> ChatEncoder | None:
    if setup is None:
        return None
    from megatron.preprocessing.chat_encoding import ChatEncoder  # with jinja2, which text does not need

    return ChatEncoder(setup, tokenizer, encoder)


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
