"""Whole documents of a source, one a sample, in the order of the epoch that packed samples are cut from too.

Padded training stages read the stream over epochs as packed ones do (`source_stream`), and move in it by documents:
an epoch is the keyed permutation of its pieces, and each document stands where its first piece does. So both need one
index, and a source can go from one to the other within an epoch without a token twice (law M2):

- from padded to packed at any place: the position lies between two pieces, and a block opens there;
- from packed to padded: what the packed samples took of the open block is scattered over it, window by window. The
  block is walked from its beginning; documents of which a packed sample has taken nothing are given, of the others the
  rest is skipped. `CursorState.block_taken` is what was taken of it. Packed samples that follow before the walk is
  over begin behind the block: what is left of it is skipped.

Passed over and counted as skipped: documents of one token, which have no target; what was begun; what is longer than
a sample (`too_long`), with the further pieces of documents that are longer than a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.permutation import Integers, derive_key, permute, permute_range

TooLong = Literal["error", "drop", "truncate"]
SHORTEST_DOCUMENT = 2
"""Tokens: one that is an input, and one that is its target."""
_MOST_AT_ONCE = 1 << 24  # tokens whose pieces are looked up in one call


class DocumentOrder(Protocol):
    """What whole documents ask of their source; `megatron.data.epoch_index.SourceOrder` is one."""

    @property
    def seed(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def epoch_tokens(self) -> int: ...

    @property
    def piece_tokens(self) -> int: ...

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
    ) -> Integers: ...

    def document_lengths(self, documents: Integers) -> Integers:
        """Tokens of documents that are numbered through the source."""


class DocumentRule(NamedTuple):
    """What a padded stage takes: `seq_length` positions of a sample, and what is done with longer documents."""

    seq_length: int
    too_long: TooLong

    def takes(self, lengths: Integers) -> npt.NDArray[np.bool_]:
        """Which documents of these lengths become samples."""
        fits = lengths >= SHORTEST_DOCUMENT
        return fits & (lengths <= self.seq_length) if self.too_long == "drop" else fits


def packing_words(rule: DocumentRule | None) -> str:
    """How samples are made, as the ledger keeps it: "packed", or "padded" and what happens to longer documents."""
    return "packed" if rule is None else f"padded, too_long {rule.too_long}"


@dataclass(frozen=True)
class TakenDocuments:
    """Documents that became samples, and what was passed over up to the next that can.

    rows: int64 [n, 4] of (epoch, document, 0, end), one a sample · cursors: int64 [n], where each stands in the stream
    over epochs, in tokens · skipped: tokens that were passed over, or cut off · skipped_documents: documents of which
    nothing was taken · truncated: documents that were cut.
    """

    rows: Integers
    cursors: Integers
    skipped: int
    skipped_documents: int
    truncated: int

    @property
    def tokens(self) -> int:
        """Input positions that hold a token."""
        return int(self.rows[:, 3].sum())


@dataclass(frozen=True)
class OpenBlock:
    """A block of an epoch of which packed samples took `taken` tokens, in the order of its permuted windows."""

    order: DocumentOrder
    start: int
    window: int
    length: int
    taken: int

    def taken_before(self, places: Integers) -> Integers:
        """How many of the first `places` tokens of the block were taken, for 0 <= places <= length."""
        epoch, offset = divmod(self.start, self.order.epoch_tokens)
        key = derive_key("block", self.order.seed, self.order.fingerprint, epoch, offset)
        whole = self.length // self.window  # a shorter last window keeps the last place
        number, rest = divmod(self.taken, self.window)
        used = np.zeros(whole + 2, dtype=np.int64)
        if number:
            used[permute_range(0, number, whole, key)] = 1
        begun = permute(number, whole, key) if number < whole else number
        before = np.cumsum(used) - used
        at, inside = np.divmod(places, self.window)
        partly = np.clip(places - begun * self.window, 0, rest)
        return before[at] * self.window + used[at] * inside + partly


class _Pieces(NamedTuple):
    """Whole pieces of an epoch in order, of which the first may be the rest of one."""

    rows: Integers
    starts: Integers
    """Of each in the stream over epochs."""
    ends_epoch: bool


class DocumentWalk:
    """Takes documents from a place of the stream over epochs on.

    block: what packed samples left, where the place lies in it. Raises DataError where an epoch has no document that
    can be taken, or one is too long and that is an error.
    """

    def __init__(self, order: DocumentOrder, cursor: int, block: OpenBlock | None, rule: DocumentRule) -> None:
        self._order = order
        self._block = block
        self._rule = rule
        self._mean = 1 << 10
        self._skipped = self._skipped_documents = self._truncated = 0
        self.cursor = cursor

    def take(self, count: int) -> TakenDocuments:
        """The next `count` documents. `cursor` is then where the next one stands, or an epoch's end."""
        found: list[tuple[Integers, Integers]] = []
        left, barren = count, 0
        while True:
            pieces = self._pieces(left)
            done, rows, starts = self._take_of(pieces, left)
            found.append((rows, starts))
            left -= len(rows)
            if left == 0 and (done or pieces.ends_epoch):
                break
            barren = 0 if len(rows) else barren + pieces.ends_epoch
            if barren > 1:
                raise DataError(
                    f"no document of a source fits into a sample of {self._rule.seq_length} tokens: all are longer, or "
                    "have one token. Raise the stage's seq_length, or set its too_long to truncate"
                )
        taken_rows = np.concatenate([rows for rows, _ in found])
        cursors = np.concatenate([starts for _, starts in found])
        return TakenDocuments(taken_rows, cursors, self._skipped, self._skipped_documents, self._truncated)

    def _pieces(self, documents: int) -> _Pieces:
        """Some whole pieces from the cursor on, about as many as so many documents need."""
        order, size = self._order, self._order.epoch_tokens
        epoch, offset = divmod(self.cursor, size)
        wanted = max(2 * order.piece_tokens, min(_MOST_AT_ONCE, (documents + 1) * self._mean * 9 // 8))
        count = min(wanted, size - offset)
        rows = order.rows(epoch, 0, size, size, 0, offset, count, count, 0)
        lengths = rows[:, 3] - rows[:, 2]
        if count < size - offset:  # the last may have been cut by the end of what was asked for
            rows, lengths = rows[:-1], lengths[:-1]
        self._mean = int(lengths.sum()) // len(rows) + 1
        starts = self.cursor + np.cumsum(lengths) - lengths
        return _Pieces(rows, starts, count == size - offset)

    def _take_of(self, pieces: _Pieces, count: int) -> tuple[bool, Integers, Integers]:
        """At most `count` documents of pieces that stand at the cursor, and all that cannot be taken before the next
        one that can; whether there is such a next one here."""
        rows, starts = pieces.rows, pieces.starts
        sizes = rows[:, 3] - rows[:, 2]
        begun = self._taken_of(starts, sizes)
        first = rows[:, 2] == 0
        lengths = np.where(first & (sizes == self._order.piece_tokens), 0, sizes)
        unknown = np.flatnonzero(lengths == 0)
        lengths[unknown] = self._order.document_lengths(rows[unknown, 1])
        usable = first & (begun == 0) & self._rule.takes(lengths)
        places = np.flatnonzero(usable)
        stop = int(places[count]) if len(places) > count else len(rows)
        places = places[:count]
        ends = np.minimum(lengths[places], self._rule.seq_length)
        too_long = places[lengths[places] > self._rule.seq_length]
        if len(too_long) and self._rule.too_long == "error":
            document = int(rows[too_long[0], 1])
            raise DataError(
                f"document {document} of a source has {int(lengths[too_long[0]]):,} tokens, more than a sample of "
                f"{self._rule.seq_length:,}: raise the stage's seq_length, or set its too_long to drop or truncate"
            )
        self._truncated += len(too_long)
        self._skipped += int((sizes[:stop] - begun[:stop]).sum()) - int(ends.sum())
        self._skipped_documents += int(np.count_nonzero(first[:stop] & (begun[:stop] == 0))) - len(places)
        self.cursor += int(sizes[:stop].sum())
        taken = rows[places].copy()
        taken[:, 3] = ends
        return stop < len(rows), taken, starts[places]

    def _taken_of(self, starts: Integers, sizes: Integers) -> Integers:
        """How many tokens of each piece packed samples have taken; of the rest of a piece, at least one counts."""
        begun = np.zeros_like(sizes)
        block = self._block
        if block is not None:
            begin = np.clip(starts - block.start, 0, block.length)
            end = np.clip(starts + sizes - block.start, 0, block.length)
            begun = block.taken_before(end) - block.taken_before(begin)
        return begun
