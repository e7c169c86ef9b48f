"""The position in a source's lifetime stream: a few integers, whatever the sequence length and packing have been.

Epochs follow one another. When the position reaches the end of the open block (or none is open), a block opens
there: 2^15 windows of the sequence length asked for now, clipped at the epoch's end. Its windows are permuted by key,
so that the pieces of one long document do not fill a batch (law M2; docs/mixture.md). A block stays as it was
cut when it opened: another sequence length changes only how many tokens a sample takes from it. Padded training
stages take whole documents from the same stream: `document_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple, Protocol

import numpy as np

from megatron.config.errors import CheckpointError, DataError
from megatron.data.document_stream import DocumentOrder, DocumentRule, DocumentWalk, OpenBlock, TakenDocuments
from megatron.data.permutation import Integers, derive_key

WINDOWS_PER_BLOCK = 2**15


class EpochSpan(NamedTuple):
    """Input positions start .. end - 1 of a document, as they stand in an epoch."""

    epoch: int
    document: int
    start: int
    end: int


class StreamOrder(DocumentOrder, Protocol):
    """What a stream asks of its source; `megatron.data.epoch_index.SourceOrder` is one. `skip` and `state` need
    only `epoch_tokens`. `rows` gives spans within a block: see `piece_table.EpochOrder.rows`.
    """

    def prepare_in_background(self, epoch: int) -> None:
        """Starts to build what the epoch needs."""


@dataclass(frozen=True)
class CursorState:
    """A position, all in tokens of the stream over epochs since the last restart.

    cursor: tokens taken. block_start: where the open block begins; its epoch is block_start // epoch_tokens.
    block_window: its windows' length. block_length: its own; 0 where none is open. block_taken: what packed samples
    took of the block, where whole documents are taken of the rest: the cursor is then the place in that walk.
    """

    cursor: int = 0
    block_start: int = 0
    block_window: int = 0
    block_length: int = 0
    block_taken: int = 0

    def to_json(self) -> dict[str, int]:
        """The integers by name; block_taken only where it is not 0."""
        values = asdict(self)
        return values if self.block_taken else {key: values[key] for key in values if key != "block_taken"}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> CursorState:
        """The state that `to_json` gave. Raises CheckpointError where a field is missing, unknown or impossible."""
        names = [field.name for field in fields(cls) if field.name != "block_taken" or field.name in values]
        if sorted(values) != sorted(names):
            raise CheckpointError(f"a cursor state has the fields {sorted(values)}, not {sorted(names)}")
        numbers = {}
        for name in names:
            value = values[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(f"cursor state field {name} is {value!r}, not a whole number of at least 0")
            numbers[name] = value
        state = cls(**numbers)
        if (
            not state.block_start <= state.cursor <= state.block_end
            or (state.block_window == 0) != (state.block_length == 0)
            or (state.block_taken and state.block_taken >= state.block_length)
        ):
            raise CheckpointError(f"a cursor state contradicts itself: {state}")
        return state

    @property
    def block_end(self) -> int:
        """Where the open block ends."""
        return self.block_start + self.block_length


def initial_state() -> CursorState:
    """The start of epoch 0."""
    return CursorState()


def _closed(cursor: int) -> CursorState:
    """A place where no block is open."""
    return CursorState(cursor, cursor)


class SourceStream:
    """Takes samples from a source, one after another, from a state on.

    windows_per_block: for tests; a run that is resumed with another number would see another order. last_epoch: no
    index of a later epoch is built ahead; None sets no limit. Raises CheckpointError where the state does not fit the
    source's epoch, DataError where the source has no tokens.
    """

    def __init__(
        self,
        order: StreamOrder,
        state: CursorState,
        *,
        windows_per_block: int = WINDOWS_PER_BLOCK,
        last_epoch: int | None = None,
    ) -> None:
        self._order = order
        self._epoch_tokens = order.epoch_tokens
        self._windows_per_block = windows_per_block
        self._last_epoch = last_epoch
        if self._epoch_tokens == 0:
            raise DataError("a source has no tokens to train on: its slice is empty, or all of it is held out")
        within = state.block_start % self._epoch_tokens + state.block_length
        if within > self._epoch_tokens:
            raise CheckpointError(
                f"a cursor state was saved for other data: its block ends {within} tokens into an epoch, "
                f"which has {self._epoch_tokens}"
            )
        self._state = state
        self._block_key: int | None = None

    @property
    def state(self) -> CursorState:
        """The position now; a stream made from it goes on exactly as this one."""
        return self._state

    def take(self, length: int, seq_length: int) -> list[EpochSpan]:
        """The next `length` tokens as spans; blocks that open on the way have windows of `seq_length`.

        A span ends where a piece or a window ends, and after each `seq_length` tokens of this take, so that taking
        k * seq_length is taking seq_length k times.
        """
        return [EpochSpan(*row) for row in self.take_rows(length, seq_length).tolist()]

    def take_rows(self, length: int, seq_length: int) -> Integers:
        """`take` as int64 [n, 4] of (epoch, document, start, end): for many samples at once."""
        self._check(length, seq_length)
        parts: list[Integers] = []
        phase = 0
        while length > 0:
            if self._state.cursor == self._state.block_end:
                self._open_block(seq_length)
            now = min(length, self._state.block_end - self._state.cursor)
            parts.append(self._rows(now, seq_length, phase))
            self._state = self._advanced(now)
            phase = (phase + now) % seq_length
            length -= now
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, 4), dtype=np.int64)

    def take_documents(self, count: int, rule: DocumentRule) -> TakenDocuments:
        """The next `count` whole documents; moves on to the next one that can be taken, or to the epoch's end.

        Raises DataError as `DocumentWalk` does.
        """
        state = self._state
        if count < 1:
            raise ValueError(f"cannot take {count} documents")
        if state.block_length and not state.block_taken:
            taken = state.cursor - state.block_start
            if 0 < taken < state.block_length:
                state = replace(state, cursor=state.block_start, block_taken=taken)
            else:
                state = _closed(state.cursor)
        walk = DocumentWalk(self._order, state.cursor, self._open_block_of(state), rule)
        documents = walk.take(count)
        epoch = walk.cursor // self._epoch_tokens
        if epoch > state.cursor // self._epoch_tokens and (self._last_epoch is None or epoch <= self._last_epoch):
            self._order.prepare_in_background(epoch)
        inside = state.block_taken and walk.cursor < state.block_end
        self._block_key = None
        self._state = replace(state, cursor=walk.cursor) if inside else _closed(walk.cursor)
        return documents

    def leave_documents(self) -> int:
        """Goes behind a block that packed samples and then whole documents have taken of, so that packed samples may
        follow; the number of its tokens that are skipped so. Without such a block nothing happens."""
        state = self._state
        block = self._open_block_of(state)
        if block is None:
            return 0
        places = np.array([state.cursor - state.block_start, state.block_length], dtype=np.int64)
        taken = block.taken_before(places)
        self._state, self._block_key = _closed(state.block_end), None
        return int(places[1] - places[0] - (taken[1] - taken[0]))

    def _open_block_of(self, state: CursorState) -> OpenBlock | None:
        if not state.block_taken:
            return None
        return OpenBlock(self._order, state.block_start, state.block_window, state.block_length, state.block_taken)

    def skip(self, count_samples: int, seq_length: int) -> None:
        """Moves on as `count_samples` takes of `seq_length` tokens would, in constant time and without an index."""
        length = count_samples * seq_length
        self._check(length, seq_length)
        state, epoch_tokens = self._state, self._epoch_tokens
        target = state.cursor + length
        if target <= state.block_end:
            self._state = self._advanced(length)
            return
        # From the open block's end on, blocks begin at whole multiples of their length from that end, and in each
        # further epoch from its start. The one left open holds the last token taken.
        block = self._windows_per_block * seq_length
        epoch_start = (target - 1) // epoch_tokens * epoch_tokens
        base = max(state.block_end, epoch_start)
        start = base + (target - 1 - base) // block * block
        self._block_key = None
        self._state = CursorState(target, start, seq_length, min(block, epoch_start + epoch_tokens - start))

    def _check(self, length: int, seq_length: int) -> None:
        if length < 0 or seq_length < 1:
            raise ValueError(f"cannot take {length} tokens in samples of {seq_length}")
        if self._state.block_taken:
            raise ValueError("whole documents were taken of a block that is open: leave_documents comes first")

    def _advanced(self, length: int) -> CursorState:
        state = self._state
        return CursorState(state.cursor + length, state.block_start, state.block_window, state.block_length)

    def _open_block(self, seq_length: int) -> None:
        cursor = self._state.cursor
        epoch, offset = divmod(cursor, self._epoch_tokens)
        left = self._epoch_tokens - offset
        length = min(self._windows_per_block * seq_length, left)
        self._state = CursorState(cursor, cursor, seq_length, length)
        self._block_key = None
        if length == left and (self._last_epoch is None or epoch < self._last_epoch):
            self._order.prepare_in_background(epoch + 1)

    def _rows(self, count: int, seq_length: int, phase: int) -> Integers:
        state = self._state
        epoch, offset = divmod(state.block_start, self._epoch_tokens)
        if self._block_key is None:
            self._block_key = derive_key("block", self._order.seed, self._order.fingerprint, epoch, offset)
        start = state.cursor - state.block_start
        return self._order.rows(
            epoch, offset, state.block_length, state.block_window, self._block_key, start, count, seq_length, phase
        )
