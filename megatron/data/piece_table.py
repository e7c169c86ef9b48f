"""The pieces of a source and the order of an epoch: the definition in NumPy, and the choice between it and C++.

A source's documents (those of its slice; a held-out one counts as empty) are cut into pieces of `piece_tokens`
tokens, the last of a document shorter. Pieces 0 .. documents - 1 are the documents' first ones, so that most lookups
need no search; the further pieces of long documents follow in document order. The stream of an epoch is the pieces
in permuted order, one after another. Of its cumulative sum of lengths only each 32nd entry is kept: the rest is
walked from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.holdout import hashes_below_twin
from megatron.data.native import native
from megatron.data.permutation import LARGEST_ORDER, Integers, Words, permute, permute_twin

STRIDE = 32
_CHUNK = STRIDE << 15


class PieceTable(Protocol):
    """The pieces of a source, in C++ or NumPy."""

    @property
    def epoch_tokens(self) -> int:
        """Tokens of all pieces."""

    @property
    def piece_count(self) -> int:
        """Pieces, those of no tokens (empty and held-out documents) counted too."""

    def sparse_sums(self, key: int, threads: int) -> Words:
        """Tokens before permuted piece 0, 32, 64, …: uint64 [ceil(piece_count / 32)]. Built by so many threads."""


class EpochOrder(Protocol):
    """The permuted stream of one epoch, in C++ or NumPy."""

    def rows(
        self, offset: int, length: int, window: int, block_key: int, start: int, count: int, cut: int, phase: int
    ) -> Integers:
        """Spans of `count` tokens from position `start` of a block: int64 [n, 4] of (epoch, document, start, end).

        The block is `length` tokens of the epoch's stream from `offset` on. Its whole windows of `window` tokens are
        permuted by `block_key`; a shorter last one keeps the last place. A row never crosses a piece or a window, nor
        the end of a sample of `cut` tokens, of which `phase` came before `start`.
        """


class NumpyPieceTable:
    """Defines the pieces; see `PieceTable`."""

    def __init__(
        self,
        lengths: Sequence[npt.NDArray[np.integer]],
        holdouts: Sequence[int],
        first: int,
        last: int,
        threshold: int,
        piece_tokens: int,
    ) -> None:
        kept = np.concatenate([np.asarray(file, dtype=np.int64) for file in lengths])
        held = [hashes_below_twin(base, len(file), threshold) for base, file in zip(holdouts, lengths, strict=True)]
        kept[np.concatenate(held)] = 0
        self._first = first
        self._kept = kept[first:last]
        self._piece_tokens = piece_tokens
        if len(self._kept) and self._kept.min() < 0:
            raise ValueError(f"document {first + int(self._kept.argmin())} has a negative length")
        # float64 is exact enough to see an overflow, and int64 sums are exact where there is none.
        if float(np.sum(self._kept, dtype=np.float64)) > 1.01 * LARGEST_ORDER or int(self._kept.sum()) > LARGEST_ORDER:
            raise ValueError("the source has more than 2^62 tokens")
        self.epoch_tokens = int(self._kept.sum())
        self._long = np.flatnonzero(self._kept > piece_tokens)
        further = (self._kept[self._long] - 1) // piece_tokens
        self._further_before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(further)])
        self.piece_count = len(self._kept) + int(self._further_before[-1])

    def pieces(self, ids: Integers) -> tuple[Integers, Integers, Integers]:
        """(document through the source, first token in it, length) of each piece id."""
        documents, starts = ids.copy(), np.zeros_like(ids)
        further = np.flatnonzero(ids >= len(self._kept))
        numbers = ids[further] - len(self._kept)
        rows = np.searchsorted(self._further_before, numbers, side="right") - 1
        documents[further] = self._long[rows]
        starts[further] = (numbers - self._further_before[rows] + 1) * self._piece_tokens
        lengths = np.minimum(self._kept[documents] - starts, self._piece_tokens)
        return documents + self._first, starts, lengths

    def permuted(self, start: int, count: int, key: int) -> tuple[Integers, Integers, Integers]:
        """`pieces` of places start .. start + count - 1 of the order with this key."""
        places = np.arange(start, start + count, dtype=np.uint64)
        return self.pieces(permute_twin(places, self.piece_count, key).view(np.int64))

    def sparse_sums(self, key: int, threads: int = 1) -> Words:
        """See `PieceTable.sparse_sums`; `threads` is not used."""
        sums = np.zeros(-(-self.piece_count // STRIDE), dtype=np.uint64)
        before = 0
        for start in range(0, self.piece_count, _CHUNK):
            lengths = self.permuted(start, min(_CHUNK, self.piece_count - start), key)[2]
            groups = np.add.reduceat(lengths, np.arange(0, len(lengths), STRIDE))
            sums[start // STRIDE : start // STRIDE + len(groups)] = before + np.cumsum(groups) - groups
            before += int(groups.sum())
        return sums


class NumpyEpochOrder:
    """Defines the order of an epoch; see `EpochOrder`."""

    def __init__(self, table: NumpyPieceTable, epoch: int, key: int, sums: Words) -> None:
        if len(sums) != -(-table.piece_count // STRIDE):
            raise ValueError("the sparse sums do not belong to these pieces")
        self._table = table
        self._epoch = epoch
        self._key = key
        self._sums = sums

    def rows(
        self, offset: int, length: int, window: int, block_key: int, start: int, count: int, cut: int, phase: int
    ) -> Integers:
        """See `EpochOrder.rows`."""
        if not 0 <= offset <= offset + length <= self._table.epoch_tokens or not 0 <= start <= start + count <= length:
            raise ValueError("the range is not within the block, or the block not within the epoch")
        if window < 1 or not 0 <= phase < cut:
            raise ValueError("window and cut must be positive")
        whole = length // window
        found: list[list[int]] = []
        while count:
            place, inside = divmod(start, window)
            now = min(window - inside, count, cut - phase)
            source = permute(place, whole, block_key) if place < whole else place
            self._walk(offset + source * window + inside, now, found)
            start, count, phase = start + now, count - now, (phase + now) % cut
        return np.array(found, dtype=np.int64).reshape(-1, 4)

    def _walk(self, start: int, count: int, found: list[list[int]]) -> None:
        entry = int(np.searchsorted(self._sums, np.uint64(start), side="right")) - 1
        before, place = int(self._sums[entry]), entry * STRIDE
        while count:
            group = min(STRIDE, self._table.piece_count - place)
            if group <= 0:
                raise RuntimeError("the epoch index contradicts the lengths of its documents")
            columns = self._table.permuted(place, group, self._key)
            for document, begin, length in zip(*(column.tolist() for column in columns), strict=True):
                if count and length > start - before:
                    now = min(length - (start - before), count)
                    found.append([self._epoch, document, begin + start - before, begin + start - before + now])
                    start, count = start + now, count - now
                before += length
            place += group


def make_piece_table(
    lengths: Sequence[npt.NDArray[np.integer]],
    holdouts: Sequence[int],
    first: int,
    last: int,
    threshold: int,
    piece_tokens: int,
    threads: int,
) -> PieceTable:
    """The pieces of documents first .. last - 1, numbered through files with these document lengths in tokens.

    lengths: one array a file, int32 or int64, read in place (a memory map stays one). holdouts: the files'
    `holdout_base`. threshold: `holdout_threshold`. Raises ValueError for a negative length or over 2^62 tokens.
    """
    flat = [
        np.ascontiguousarray(file if file.dtype in (np.int32, np.int64) else file.astype(np.int64)) for file in lengths
    ]
    extension = native()
    if extension is None:
        return NumpyPieceTable(flat, holdouts, first, last, threshold, piece_tokens)
    table: PieceTable = extension.PieceTable(flat, list(holdouts), first, last, threshold, piece_tokens, threads)
    return table


def make_epoch_order(table: PieceTable, epoch: int, key: int, sums: Words) -> EpochOrder:
    """The order of an epoch from its table, the key of its permutation and the sparse sums of that key."""
    if isinstance(table, NumpyPieceTable):
        return NumpyEpochOrder(table, epoch, key, sums)
    extension = native()
    assert extension is not None, "a table of the extension exists only where the extension does"
    order: EpochOrder = extension.EpochOrder(table, epoch, key, sums)
    return order
