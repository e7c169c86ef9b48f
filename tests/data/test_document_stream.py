"""Whole documents, a sample each, against a plain list of every token: in any history of packed and padded samples."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from token_files import BACKENDS, FakeFile, backend, shapes

from megatron.config.errors import CheckpointError, DataError
from megatron.data.document_counts import MeasuredDocuments
from megatron.data.document_stream import DocumentRule
from megatron.data.epoch_index import SourceOrder
from megatron.data.permutation import derive_key, permute
from megatron.data.source_stream import CursorState, SourceStream

Token = tuple[int, int, int]  # epoch, document, position

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["documents", "documents", "packed", "resume"]),
        st.integers(1, 20),
        st.integers(1, 5),
        st.booleans(),
    ),
    min_size=1,
    max_size=25,
)


@dataclass
class ByHand:
    """What the page says, a token at a time: the stream is a list, what was taken of a block a set of its places."""

    order: SourceOrder
    windows: int
    at: int = 0
    block: list[int] = field(default_factory=list)  # places of the stream in the order of the open block
    block_end: int = 0
    done: int = 0  # of the block
    walking: set[int] | None = None  # what packed samples took of the block that documents are now taken of
    skipped: int = 0
    cut: int = 0

    def token(self, place: int) -> Token:
        epoch, offset = divmod(place, self.order.epoch_tokens)
        spans = self.order.pieces_at(epoch, offset, 1)
        return epoch, spans[0].document, spans[0].start

    def packed(self, length: int, seq_length: int) -> list[Token]:
        if self.walking is not None:
            self.skipped += sum(place not in self.walking for place in range(self.at, self.block_end))
            self.at, self.block, self.done, self.walking = self.block_end, [], 0, None
        taken = []
        while len(taken) < length:
            if self.done == len(self.block):
                self.at = self.at if not self.block else self.block_end
                self.open(seq_length)
            taken.append(self.token(self.block[self.done]))
            self.done += 1
        return taken

    def open(self, window: int) -> None:
        size = self.order.epoch_tokens
        epoch, offset = divmod(self.at, size)
        self.block_end = min(self.at + self.windows * window, (epoch + 1) * size)
        places = list(range(self.at, self.block_end))
        cut = [places[i : i + window] for i in range(0, len(places), window)]
        whole = len(places) // window
        key = derive_key("block", self.order.seed, self.order.fingerprint, epoch, offset)
        order = [permute(i, whole, key) for i in range(whole)] + list(range(whole, len(cut)))
        self.block, self.done = [place for number in order for place in cut[number]], 0

    def documents(self, count: int, rule: DocumentRule) -> list[list[Token]]:
        if self.block:
            if self.done < len(self.block):
                self.walking, self.at = set(self.block[: self.done]), self.block[0] and min(self.block)
            else:
                self.at = self.block_end
            self.block, self.done = [], 0
        taken: list[list[Token]] = []
        while len(taken) < count or self.at % self.order.epoch_tokens:
            epoch, document, position = self.token(self.at)
            length = self.order.files.document_length(document)
            end = min(length, (position // self.order.piece_tokens + 1) * self.order.piece_tokens)
            here = range(self.at, self.at + end - position)
            begun = sum(place in (self.walking or set()) for place in here)
            fits = length > 1 and (length <= rule.seq_length or rule.too_long == "truncate")
            if position == 0 and not begun and fits:
                if len(taken) == count:
                    break
                taken.append([(epoch, document, i) for i in range(min(length, rule.seq_length))])
                self.cut += length > rule.seq_length
                self.skipped += len(here) - min(length, rule.seq_length)
            else:
                self.skipped += len(here) - begun
            self.at = here.stop
            if self.walking is not None and self.at >= self.block_end:
                self.walking = None
        return taken


def play(order: SourceOrder, windows: int, steps: list[tuple[str, int, int, bool]]) -> tuple[list[Token], ByHand]:
    stream, hand = SourceStream(order, CursorState(), windows_per_block=windows), ByHand(order, windows)
    consumed: list[Token] = []
    skipped = cut = 0
    for what, seq_length, count, drop in steps:
        rule = DocumentRule(min(seq_length, order.piece_tokens), "drop" if drop else "truncate")
        if what == "resume":
            state = CursorState.from_json(json.loads(json.dumps(stream.state.to_json())))
            assert state == stream.state
            stream = SourceStream(order, state, windows_per_block=windows)
        elif what == "packed":
            skipped += stream.leave_documents()
            spans = stream.take(count * seq_length, seq_length)
            tokens = [(epoch, document, i) for epoch, document, start, end in spans for i in range(start, end)]
            assert tokens == hand.packed(count * seq_length, seq_length)
            consumed += tokens
        elif MeasuredDocuments(order.files, order.piece_tokens).taken(rule)[0].size:
            taken = stream.take_documents(count, rule)
            rows = [[(epoch, document, i) for i in range(start, end)] for epoch, document, start, end in taken.rows]
            assert rows == hand.documents(count, rule)
            consumed += [token for row in rows for token in row]
            skipped, cut = skipped + taken.skipped, cut + taken.truncated
        assert (skipped, cut) == (hand.skipped, hand.cut)
    return consumed, hand


def check_history(shape: dict[str, Any], windows: int, steps: list[tuple[str, int, int, bool]]) -> None:
    order = SourceOrder(**shape)
    assume(order.epoch_tokens)
    consumed, hand = play(order, windows, steps)
    assert max(Counter(consumed).values(), default=1) == 1  # M2
    epochs = [epoch for epoch, _, _ in consumed]
    assert all(one <= other for one, other in pairwise(epochs))
    # Nothing is lost in silence: what was not taken of epochs that are over was counted as skipped.
    if not hand.block and hand.walking is None:
        assert len(consumed) + hand.skipped == hand.at


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=50)
@given(shape=shapes(), windows=st.integers(1, 6), steps=STEPS)
def test_M2_no_token_twice_an_epoch_however_packing_changes(name: str, shape: Any, windows: int, steps: Any) -> None:
    with backend(name):
        check_history(shape, windows, steps)


@pytest.mark.soak
@settings(deadline=None, max_examples=3000)
@given(shape=shapes(), windows=st.integers(1, 6), steps=STEPS)
def test_M2_in_3000_histories_of_packing(shape: Any, windows: int, steps: Any) -> None:
    check_history(shape, windows, steps)


def order_of(lengths: list[int], piece_tokens: int = 64, seed: int = 3) -> SourceOrder:
    return SourceOrder([FakeFile(lengths)], seed=seed, piece_tokens=piece_tokens, cache_dir=None)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 30), min_size=3, max_size=60), sizes=st.lists(st.integers(1, 9), max_size=30))
def test_an_epoch_is_each_document_once(lengths: list[int], sizes: list[int]) -> None:
    """However many are taken at once; those of one token and of none are left out."""
    order, whole = order_of(lengths), {i for i, length in enumerate(lengths) if length > 1}
    assume(whole)
    stream, rule = SourceStream(order, CursorState()), DocumentRule(30, "error")
    rows = [row for size in sizes for row in stream.take_documents(size, rule).rows.tolist()]
    for start in range(0, len(rows), len(whole)):
        epoch = rows[start : start + len(whole)]
        assert {row[0] for row in epoch} == {start // len(whole)}
        assert len({row[1] for row in epoch}) == len(epoch) and {row[1] for row in epoch} <= whole
    assert all(row[2:] == [0, lengths[row[1]]] for row in rows)


def test_epochs_have_orders_of_their_own_that_the_seed_decides() -> None:
    orders = []
    for seed in (3, 4):
        stream = SourceStream(order_of([5] * 40, seed=seed), CursorState())
        orders += [stream.take_documents(40, DocumentRule(8, "error")).rows[:, 1].tolist() for _ in range(2)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_what_is_too_long_is_dropped_cut_or_an_error() -> None:
    order = order_of([4, 9, 100, 1, 6], piece_tokens=16)
    dropped = SourceStream(order, CursorState()).take_documents(2, DocumentRule(8, "drop"))
    assert sorted(dropped.rows[:, 1:].tolist()) == [[0, 0, 4], [4, 0, 6]]
    assert (dropped.skipped, dropped.skipped_documents, dropped.truncated) == (9 + 100 + 1, 3, 0)
    cut = SourceStream(order, CursorState()).take_documents(4, DocumentRule(8, "truncate"))
    assert sorted(cut.rows[:, 1:].tolist()) == [[0, 0, 4], [1, 0, 8], [2, 0, 8], [4, 0, 6]]
    assert (cut.skipped, cut.skipped_documents, cut.truncated) == (1 + 92 + 1, 1, 2)
    with pytest.raises(DataError, match=r"document [12] of a source has (9|100) tokens, more than a sample of 8"):
        SourceStream(order, CursorState()).take_documents(4, DocumentRule(8, "error"))
    with pytest.raises(DataError, match="no document of a source fits into a sample of 3 tokens"):
        SourceStream(order, CursorState()).take_documents(1, DocumentRule(3, "drop"))


def test_padded_then_packed_loses_nothing_within_an_epoch() -> None:
    order = order_of([7, 5, 9, 3, 8, 6, 4], piece_tokens=16)
    stream = SourceStream(order, CursorState())
    documents = stream.take_documents(3, DocumentRule(16, "error")).rows
    assert stream.leave_documents() == 0
    rest = stream.take(42 - int(documents[:, 3].sum()), 4)
    tokens = [(d, i) for _, d, start, end in [*documents.tolist(), *rest] for i in range(start, end)]
    assert len(tokens) == len(set(tokens)) == 42
    assert stream.state.cursor == 42


def test_documents_of_an_open_block_are_left_before_packed_samples() -> None:
    stream = SourceStream(order_of([7, 5, 9, 3, 8, 6, 4], piece_tokens=16), CursorState())
    stream.take(8, 4)
    stream.take_documents(1, DocumentRule(16, "error"))
    assert stream.state.block_taken == 8 and stream.state.block_length == 42
    for act in (lambda: stream.take(4, 4), lambda: stream.skip(1, 4)):
        with pytest.raises(ValueError, match="leave_documents comes first"):
            act()
    left = stream.leave_documents()
    assert 0 < left < 42 and stream.state == CursorState(42, 42)
    for broken in ({"block_taken": 42}, {"block_taken": -1}, {"block_taken": True}):
        with pytest.raises(CheckpointError):
            CursorState.from_json({"cursor": 8, "block_start": 0, "block_window": 4, "block_length": 42} | broken)


def test_many_documents_at_once_are_the_same_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    order = order_of(rng.integers(0, 50, 3000).tolist(), piece_tokens=64)
    rule = DocumentRule(40, "drop")
    one, many = SourceStream(order, CursorState()), SourceStream(order, CursorState())
    rows = [one.take_documents(1, rule).rows[0].tolist() for _ in range(5000)]
    taken = many.take_documents(5000, rule)
    assert taken.rows.tolist() == rows
    assert one.state == many.state
    assert taken.skipped + taken.tokens == many.state.cursor
