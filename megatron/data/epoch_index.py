"""A source's own order: which documents stand at which place of which epoch's stream.

An epoch's stream is a keyed permutation of the source's pieces (megatron/data/piece_table.py). It depends on the
files' content, the slice, the held-out fraction, the piece length, the run's seed and the epoch, and on nothing else:
not on the source's name, its place on disk, the mixture, or how long the run is (law M6).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.index_cache import IndexKey, open_or_build
from megatron.data.permutation import Integers, Words, derive_key
from megatron.data.piece_table import STRIDE, EpochOrder, PieceTable, make_epoch_order
from megatron.data.processors import processors
from megatron.data.source_files import Share, SourceFiles, TokenFile

_OPEN_EPOCHS = 4
_WORTH_A_THREAD = 1 << 16  # pieces; fewer are indexed in less time than a thread takes to be of use


class Span(NamedTuple):
    """Input positions start .. end - 1 of a document, which is numbered through the source's files in order."""

    document: int
    start: int
    end: int


class SourceOrder:
    """The permuted streams of a source's epochs.

    files: opened indexed datasets, in the order of the source's data list. seed: the run's. piece_tokens: documents
    that are longer are cut. cache_dir: folder of index files, shared by runs; None keeps indexes in memory only.
    document_slice: share of the documents by position. holdout_fraction: share of them kept for validation.
    threads: for building, default the processors that this process may use.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        seed: int,
        piece_tokens: int,
        cache_dir: Path | None,
        document_slice: tuple[Share, Share] = (0, 1),
        holdout_fraction: Share = 0,
        threads: int | None = None,
    ) -> None:
        if piece_tokens < 1:
            raise ValueError(f"piece_tokens must be at least 1, not {piece_tokens}")
        self.files = SourceFiles(files, document_slice, holdout_fraction)
        self.seed = seed
        self.piece_tokens = piece_tokens
        self._cache_dir = cache_dir
        self._threads = threads or processors()
        self._lock = Lock()
        self._open: dict[int, EpochOrder] = {}
        self._building: dict[int, Future[EpochOrder]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes open their own: locks and tables of the extension do not travel.
        files = self.files
        arguments = (files.files, self.seed, self.piece_tokens, self._cache_dir, files.document_slice)
        return _reopen, (*arguments, files.holdout_fraction, self._threads)

    @property
    def fingerprint(self) -> str:
        """Identifies the content: files in order, slice, held-out fraction (64 hex digits)."""
        return self.files.fingerprint

    @property
    def file_fingerprints(self) -> tuple[str, ...]:
        """The files' own fingerprints, in order."""
        return self.files.file_fingerprints

    @cached_property
    def _table(self) -> PieceTable:
        return self.files.piece_table(self.piece_tokens, self._threads)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of an epoch, the same for each: those of the slice's documents that are not held out."""
        return self._table.epoch_tokens

    @property
    def piece_count(self) -> int:
        """Pieces of an epoch, those of empty and held-out documents counted."""
        return self._table.piece_count

    def permutation_key(self, epoch: int) -> int:
        """The 64-bit key of the epoch's permutation of pieces."""
        return derive_key("pieces", self.seed, self.fingerprint, self.piece_tokens, epoch)

    def pieces_at(self, epoch: int, start: int, length: int) -> list[Span]:
        """What stands at positions start .. start + length - 1 of the epoch's permuted stream of pieces, before its
        windows are permuted. Raises ValueError outside 0 .. epoch_tokens.
        """
        tokens = self.epoch_tokens
        if not 0 <= start <= start + length <= tokens:
            raise ValueError(f"{start} .. {start + length} is not within the epoch's {tokens} tokens")
        rows = self.rows(epoch, 0, tokens, max(tokens, 1), 0, start, length, max(length, 1), 0)
        return [Span(document, begin, end) for _, document, begin, end in rows.tolist()]

    def rows(
        self,
        epoch: int,
        offset: int,
        length: int,
        window: int,
        block_key: int,
        start: int,
        count: int,
        cut: int,
        phase: int,
    ) -> Integers:
        """Spans within a block of an epoch, int64 [n, 4]: see `piece_table.EpochOrder.rows`."""
        order = self._open.get(epoch)
        if order is None:
            order = self._ready(epoch)
        return order.rows(offset, length, window, block_key, start, count, cut, phase)

    def document_lengths(self, documents: Integers) -> Integers:
        """Tokens of documents that are numbered through the source, int64 of the same length."""
        return self.files.document_lengths(documents)

    def tokens_for(self, span: Span, extra: int = 1) -> npt.NDArray[np.integer]:
        """The ids of a span and, where the document goes on, of up to `extra` positions after it (for targets)."""
        return self.files.tokens(span.document, span.start, span.end + extra)

    def prepare(self, epoch: int) -> None:
        """Opens the epoch's index, or builds and publishes it. Raises StorageError where it can do neither."""
        self._ready(epoch)

    def prepare_in_background(self, epoch: int) -> None:
        """Starts `prepare` in a thread and returns; what it raises is raised where the epoch is first needed."""
        if self.piece_count >= _WORTH_A_THREAD and epoch not in self._open:
            Thread(target=self._prepare_quietly, args=(epoch,), name=f"epoch-index-{epoch}").start()

    def held_out_documents(self) -> npt.NDArray[np.int64]:
        """Numbers of the held-out documents within the slice, ascending."""
        return self.files.held_out_documents()

    def validation_spans(self, seq_length: int, count: int) -> list[list[Span]]:
        """At most `count` windows of `seq_length` held-out tokens, documents in order of their number.

        A window that the last documents do not fill is dropped, unless it is the only one: then it is given as it
        is, with fewer tokens. No held-out tokens: an empty list.
        """
        windows: list[list[Span]] = []
        window: list[Span] = []
        room = seq_length
        for document in self.held_out_documents().tolist():
            length, start = self.files.document_length(document), 0
            while start < length and len(windows) < count:
                end = min(length, start + room)
                window.append(Span(document, start, end))
                room -= end - start
                start = end
                if room == 0:
                    windows.append(window)
                    window, room = [], seq_length
            if len(windows) >= count:
                return windows
        return windows if windows or not window else [window]

    def _prepare_quietly(self, epoch: int) -> None:
        try:
            self._ready(epoch)
        except Exception:
            return  # nothing is lost: the same attempt is made, and its error raised, when the epoch is needed

    def _ready(self, epoch: int) -> EpochOrder:
        """The opened epoch; one thread builds it, others that need it wait."""
        with self._lock:
            if epoch in self._open:
                return self._open[epoch]
            future = self._building.get(epoch)
            mine = future is None
            if future is None:
                future = self._building[epoch] = Future()
        if mine:
            self._build(epoch, future)
        return future.result()

    def _build(self, epoch: int, future: Future[EpochOrder]) -> None:
        try:
            order = self._open_epoch(epoch)
        except BaseException as error:
            with self._lock:
                del self._building[epoch]
            future.set_exception(error)
            return
        with self._lock:
            del self._building[epoch]
            self._open[epoch] = order
            while len(self._open) > _OPEN_EPOCHS:
                self._open.pop(next(iter(self._open)))
        future.set_result(order)

    def _open_epoch(self, epoch: int) -> EpochOrder:
        table = self._table
        if epoch < 0:
            raise ValueError(f"epochs count from 0, not {epoch}")
        if table.epoch_tokens == 0:
            raise DataError("a source has no tokens to train on: its slice is empty, or all of it is held out")
        key = self.permutation_key(epoch)

        def build() -> Words:
            return table.sparse_sums(key, self._threads)

        if self._cache_dir is None or table.piece_count <= STRIDE:
            return make_epoch_order(table, epoch, key, build())  # one entry, always 0: not worth a file
        identity = f"stagemix order 2|{self.seed}|{self.fingerprint}|{self.piece_tokens}|{epoch}"
        digest = sha256(identity.encode()).hexdigest()
        index = IndexKey(digest, key, table.piece_count, self.piece_tokens, table.epoch_tokens)
        return make_epoch_order(table, epoch, key, open_or_build(self._cache_dir, index, build))


def _reopen(
    files: Sequence[TokenFile],
    seed: int,
    piece_tokens: int,
    cache_dir: Path | None,
    document_slice: tuple[Share, Share],
    holdout_fraction: Share,
    threads: int,
) -> SourceOrder:
    return SourceOrder(
        files,
        seed=seed,
        piece_tokens=piece_tokens,
        cache_dir=cache_dir,
        document_slice=document_slice,
        holdout_fraction=holdout_fraction,
        threads=threads,
    )


def overlapping(one: SourceOrder, other: SourceOrder) -> bool:
    """Whether two sources hold a document in common: a file of the same content, and slices that meet in it."""
    return any(
        one.files.slice_of_file(i) & other.files.slice_of_file(j)
        for i, mine in enumerate(one.file_fingerprints)
        for j, theirs in enumerate(other.file_fingerprints)
        if mine == theirs
    )
