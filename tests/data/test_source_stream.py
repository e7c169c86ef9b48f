"""The stream over a source's epochs against a plain list of every token, in any history of lengths and resumes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from token_files import BACKENDS, FakeFile, backend, shapes

from megatron.config.errors import CheckpointError, DataError
from megatron.data.epoch_index import SourceOrder
from megatron.data.permutation import derive_key, permute
from megatron.data.source_stream import WINDOWS_PER_BLOCK, CursorState, EpochSpan, SourceStream, initial_state

Token = tuple[int, int, int]  # epoch, document, position

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "take", "resume", "skip", "many"]), st.integers(1, 40), st.integers(0, 6)
    ),
    min_size=1,
    max_size=40,
)


def tokens_of(spans: list[EpochSpan]) -> list[Token]:
    return [(epoch, document, i) for epoch, document, start, end in spans for i in range(start, end)]


@dataclass
class History:
    """What a run did with a source: every token it took, in order."""

    order: SourceOrder
    windows: int

    def play(self, steps: list[tuple[str, int, int]]) -> tuple[list[Token], SourceStream]:
        """Each step is (what, sequence length, count); a skip is checked against the takes that it stands for."""
        stream = self.stream(initial_state())
        consumed: list[Token] = []
        for what, seq_length, count in steps:
            if what == "resume":
                stream = self.stream(CursorState.from_json(json.loads(json.dumps(stream.state.to_json()))))
            elif what == "skip":
                copy = self.stream(stream.state)
                for _ in range(count):
                    consumed += tokens_of(copy.take(seq_length, seq_length))
                stream.skip(count, seq_length)
                assert stream.state == copy.state
            elif what == "many":
                copy = self.stream(stream.state)
                spans = [span for _ in range(count) for span in copy.take(seq_length, seq_length)]
                assert stream.take(count * seq_length, seq_length) == spans
                assert stream.state == copy.state
                consumed += tokens_of(spans)
            else:
                spans = stream.take(seq_length, seq_length)
                assert sum(span.end - span.start for span in spans) == seq_length
                consumed += tokens_of(spans)
        return consumed, stream

    def stream(self, state: CursorState) -> SourceStream:
        return SourceStream(self.order, state, windows_per_block=self.windows)


def check_every_token_once(shape: dict[str, Any], windows: int, steps: list[tuple[str, int, int]]) -> None:
    order = SourceOrder(**shape)
    assume(order.epoch_tokens)
    consumed, stream = History(order, windows).play(steps)
    assert stream.state.cursor == len(consumed)
    epochs = [epoch for epoch, _, _ in consumed]
    assert epochs == sorted(epochs)
    held = set(order.held_out_documents().tolist())
    files = order.files
    all_tokens = {
        (document, i)
        for document in range(files.first, files.last)
        if document not in held
        for i in range(files.document_length(document))
    }
    seen: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    for epoch, document, position in consumed:
        seen[epoch][document, position] += 1
    for epoch, counts in seen.items():
        assert max(counts.values()) == 1
        assert set(counts) <= all_tokens
        assert epoch == epochs[-1] or set(counts) == all_tokens


@settings(deadline=None, max_examples=250)
@given(shape=shapes(), windows=st.integers(1, 6), steps=STEPS)
def test_M2_every_token_once_an_epoch_in_any_history(shape: Any, windows: int, steps: Any) -> None:
    check_every_token_once(shape, windows, steps)


@pytest.mark.soak
@settings(deadline=None, max_examples=2000)
@given(shape=shapes(), windows=st.integers(1, 6), steps=STEPS)
def test_M2_every_token_once_an_epoch_in_any_of_2000_histories(shape: Any, windows: int, steps: Any) -> None:
    check_every_token_once(shape, windows, steps)


def stream_by_hand(order: SourceOrder, windows: int, lengths: Iterator[int]) -> Iterator[Token]:
    """The stream a token at a time, from whole epochs as lists. `lengths` gives the sequence length of each token's
    sample, which counts only where a block opens."""
    epoch = 0
    while True:
        spans = order.pieces_at(epoch, 0, order.epoch_tokens)
        tokens = [(epoch, document, i) for document, start, end in spans for i in range(start, end)]
        offset = 0
        while offset < len(tokens):
            window = next(lengths)
            block = tokens[offset : offset + windows * window]
            cut = [block[i : i + window] for i in range(0, len(block), window)]
            whole = len(block) // window
            key = derive_key("block", order.seed, order.fingerprint, epoch, offset)
            places = [permute(i, whole, key) for i in range(whole)] + list(range(whole, len(cut)))
            for number, token in enumerate(token for place in places for token in cut[place]):
                if number:
                    next(lengths)
                yield token
            offset += len(block)
        epoch += 1


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(shape=shapes(), windows=st.integers(1, 6), steps=STEPS)
def test_M3_the_order_is_the_one_that_the_document_describes(name: str, shape: Any, windows: int, steps: Any) -> None:
    with backend(name):
        order = SourceOrder(**shape)
        assume(order.epoch_tokens)
        consumed, _ = History(order, windows).play(steps)
        counts = [(seq, 0 if what == "resume" else seq if what == "take" else seq * n) for what, seq, n in steps]
        lengths = (seq_length for seq_length, count in counts for _ in range(count))
        expected = stream_by_hand(order, windows, lengths)
        assert [next(expected) for _ in range(len(consumed))] == consumed


@settings(deadline=None, max_examples=60)
@given(shape=shapes(), windows=st.integers(1, 6), steps=STEPS)
def test_M3_resuming_anywhere_changes_nothing(shape: Any, windows: int, steps: Any) -> None:
    order = SourceOrder(**shape)
    assume(order.epoch_tokens)
    without = [(what, seq, count) for what, seq, count in steps if what != "resume"]
    often = [step for each in without for step in (each, ("resume", 1, 0))]
    first, one = History(order, windows).play(without)
    second, other = History(SourceOrder(**shape), windows).play(often)
    assert (first, one.state) == (second, other.state)


@settings(deadline=None, max_examples=40)
@given(shape=shapes(), steps=STEPS, horizon=st.integers(0, 5))
def test_M6_the_order_does_not_depend_on_cache_threads_or_horizon(shape: Any, steps: Any, horizon: int) -> None:
    order = SourceOrder(**shape)
    assume(order.epoch_tokens)
    consumed, _ = History(order, 3).play(steps)
    other = SourceOrder(**{**shape, "threads": 3})
    for epoch in reversed(range(horizon)):  # another arm has looked further ahead, and in another order
        other.prepare(epoch)
    assert History(other, 3).play(steps)[0] == consumed


def test_M2_a_restart_gives_the_same_permutations() -> None:
    order = SourceOrder([FakeFile([9] * 40)], seed=3, piece_tokens=4, cache_dir=None)
    first, again = (SourceStream(order, initial_state()).take(500, 8) for _ in range(2))
    assert first == again
    other = SourceOrder([FakeFile([9] * 40)], seed=4, piece_tokens=4, cache_dir=None)
    assert SourceStream(other, initial_state()).take(500, 8) != first


def test_M2_a_source_smaller_than_a_sample_spans_many_epochs(tmp_path: Path) -> None:
    order = SourceOrder([FakeFile([3, 0, 2])], seed=3, piece_tokens=4, cache_dir=tmp_path)
    spans = SourceStream(order, initial_state()).take(2048, 2048)
    assert [epoch for epoch, _, _ in tokens_of(spans)] == [i // 5 for i in range(2048)]
    for epoch in range(409):
        assert sorted(token[1:] for token in tokens_of(spans) if token[0] == epoch) == [
            (0, 0),
            (0, 1),
            (0, 2),
            (2, 0),
            (2, 1),
        ]
    assert list(tmp_path.iterdir()) == []


def test_M2_windows_of_a_long_document_are_spread_over_the_block() -> None:
    order = SourceOrder([FakeFile([512] * 64)], seed=3, piece_tokens=512, cache_dir=None)
    stream = SourceStream(order, initial_state())
    documents = [stream.take(8, 8)[0].document for _ in range(4096)]
    # 64 windows of a document stand together in the stream of pieces; a permutation leaves a neighbour of the same
    # document as often as chance does, one time in 64
    assert sum(a == b for a, b in zip(documents, documents[1:], strict=False)) < 4096 / 64 * 1.6


def test_a_long_skip_is_exact_and_immediate() -> None:
    order = SourceOrder([FakeFile([7] * 100)], seed=3, piece_tokens=4, cache_dir=None)
    stream = SourceStream(order, CursorState(cursor=30, block_start=0, block_window=10, block_length=40))
    stream.skip(10**15, 2048)
    target = 30 + 2048 * 10**15
    assert stream.state == CursorState(target, (target - 1) // 700 * 700, 2048, 700)
    assert [span.epoch for span in stream.take(1, 2048)] == [target // 700]


def test_the_usual_block_is_2_to_the_15_windows() -> None:
    order = SourceOrder([FakeFile([2**40])], seed=3, piece_tokens=2**20, cache_dir=None)
    stream = SourceStream(order, initial_state())
    stream.skip(WINDOWS_PER_BLOCK, 2048)
    assert stream.state == CursorState(2**26, 0, 2048, 2**26)
    stream.take(1, 4096)
    assert stream.state == CursorState(2**26 + 1, 2**26, 4096, 2**27)


class PlannedOrder:
    """A source that is planned with and has no files yet."""

    seed, fingerprint, epoch_tokens = 1, "planned", 503 * 10**9

    def rows(self, *_: int) -> Any:
        raise AssertionError("a plan reads no pieces")

    def prepare_in_background(self, epoch: int) -> None:
        raise AssertionError("a plan builds no index")


def test_skipping_needs_no_files() -> None:
    stream = SourceStream(PlannedOrder(), initial_state())
    stream.skip(10**9, 4096)
    assert stream.state.cursor == 4096 * 10**9


class WatchedOrder(SourceOrder):
    """Remembers what was asked to be built ahead."""

    asked: list[int]

    def prepare_in_background(self, epoch: int) -> None:
        self.asked.append(epoch)


@pytest.mark.parametrize(("last_epoch", "expected"), [(None, [1, 2, 3]), (1, [1]), (0, [])])
def test_the_next_epoch_is_prepared_when_the_last_block_opens(last_epoch: int | None, expected: list[int]) -> None:
    order = WatchedOrder([FakeFile([100])], seed=1, piece_tokens=100, cache_dir=None)
    order.asked = []
    stream = SourceStream(order, initial_state(), windows_per_block=4, last_epoch=last_epoch)
    stream.take(80, 10)
    assert order.asked == []  # 20 tokens are left to the last block
    stream.take(1, 10)
    assert order.asked == expected[:1]
    stream.take(210, 10)
    assert order.asked == expected


def test_a_state_that_is_not_one_or_not_of_this_source_is_refused() -> None:
    good = CursorState(5, 0, 10, 40).to_json()
    assert CursorState.from_json(good) == CursorState(5, 0, 10, 40)
    for change in ({"cursor": -1}, {"cursor": 41}, {"cursor": "5"}, {"cursor": True}, {"cursor": 5.0}, {"more": 1},
                   {"block_window": 0}, {"block_start": 6}):  # fmt: skip
        with pytest.raises(CheckpointError):
            CursorState.from_json({**good, **change})
    with pytest.raises(CheckpointError):
        CursorState.from_json({"cursor": 5})
    order = SourceOrder([FakeFile([30])], seed=1, piece_tokens=8, cache_dir=None)
    with pytest.raises(CheckpointError, match="other data"):
        SourceStream(order, CursorState.from_json(good))


def test_a_source_without_tokens_has_no_stream() -> None:
    with pytest.raises(DataError, match="no tokens"):
        SourceStream(SourceOrder([FakeFile([0])], seed=1, piece_tokens=8, cache_dir=None), initial_state())


def test_asking_for_nothing_moves_nothing_and_for_less_is_refused() -> None:
    order = SourceOrder([FakeFile([30])], seed=1, piece_tokens=8, cache_dir=None, holdout_fraction=Decimal(0))
    stream = SourceStream(order, initial_state())
    assert stream.take(0, 8) == []
    stream.skip(0, 8)
    assert stream.state == initial_state()
    for length, seq_length in ((-1, 8), (8, 0)):
        with pytest.raises(ValueError, match="cannot take"):
            stream.take(length, seq_length)
        with pytest.raises(ValueError, match="cannot take"):
            stream.skip(1 if seq_length == 0 else -1, seq_length)
