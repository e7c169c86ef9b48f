"""A source's order around the stream itself: overlap, held-out documents, tokens, identity, background builds."""

from __future__ import annotations

import pickle
import threading
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import HOLDOUTS, LENGTHS, SLICES, FakeFile, shapes

from megatron.config.errors import DataError
from megatron.data import epoch_index
from megatron.data.epoch_index import SourceOrder, Span, overlapping
from megatron.data.holdout import held_out


def make(*files: FakeFile, **options: Any) -> SourceOrder:
    return SourceOrder(files, **{"seed": 1, "piece_tokens": 8, "cache_dir": None, **options})


def documents_of(order: SourceOrder) -> set[tuple[str, int]]:
    """(file content, document in it) of everything in the slice."""
    start, end = order.files.document_slice
    through = [(file.fingerprint, i) for file in order.files.files for i in range(file.document_count)]
    return set(through[int(start * len(through)) : int(end * len(through))])


CONTENTS = {name: FakeFile([3] * count, name) for name, count in [("a", 7), ("b", 1), ("c", 0), ("d", 12)]}
NAMES = st.lists(st.sampled_from(sorted(CONTENTS)), min_size=1, max_size=4, unique=True)


@settings(deadline=None, max_examples=300)
@given(names=st.tuples(NAMES, NAMES), slices=st.tuples(SLICES, SLICES))
def test_M2_sources_overlap_where_they_hold_a_document_in_common(names: Any, slices: Any) -> None:
    one, other = (
        make(*(CONTENTS[name] for name in mine), document_slice=(Decimal(part[0]), Decimal(part[1])))
        for mine, part in zip(names, slices, strict=True)
    )
    assert overlapping(one, other) == bool(documents_of(one) & documents_of(other)) == overlapping(other, one)


def test_M2_the_same_content_twice_in_one_source_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\[0\] and data\[2\].*max_epochs"):
        make(FakeFile([3] * 4), FakeFile([3] * 4, "b"), FakeFile([3] * 4))
    half = (0, Decimal("0.5"))
    assert make(FakeFile([3] * 4), FakeFile([3] * 4), document_slice=half).epoch_tokens == 12


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=3), part=SLICES, fraction=HOLDOUTS, seed=st.integers(0, 9))
def test_M2_held_out_documents_are_never_in_the_stream(lengths: Any, part: Any, fraction: str, seed: int) -> None:
    files = [FakeFile(each, f"file {number}") for number, each in enumerate(lengths)]
    share = (Decimal(part[0]), Decimal(part[1]))
    order = make(*files, document_slice=share, holdout_fraction=Decimal(fraction), seed=seed)
    masks = [held_out(file.fingerprint, file.document_count, Decimal(fraction)) for file in files]
    flags = np.concatenate(masks)
    total = len(flags)
    inside = range(int(Fraction(share[0]) * total), int(Fraction(share[1]) * total))
    assert order.held_out_documents().tolist() == [i for i in inside if flags[i]]
    flat = [length for each in lengths for length in each]
    assert order.epoch_tokens == sum(flat[i] for i in inside if not flags[i])
    trained = {span.document for span in order.pieces_at(0, 0, order.epoch_tokens)} if order.epoch_tokens else set()
    assert trained == {i for i in inside if not flags[i] and flat[i]}


@settings(deadline=None, max_examples=100)
@given(shape=shapes(), seq_length=st.integers(1, 40), count=st.integers(0, 6))
def test_validation_windows_are_the_held_out_tokens_in_order(shape: Any, seq_length: int, count: int) -> None:
    order = SourceOrder(**shape)
    numbers = order.held_out_documents().tolist()
    tokens = [(document, i) for document in numbers for i in range(order.files.document_length(document))]
    whole = [tokens[i : i + seq_length] for i in range(0, len(tokens) - seq_length + 1, seq_length)][:count]
    expected = whole or ([tokens[:seq_length]] if tokens and count else [])
    windows = order.validation_spans(seq_length, count)
    assert [
        [(span.document, i) for span in window for i in range(span.start, span.end)] for window in windows
    ] == expected


def test_tokens_come_with_the_next_one_where_the_document_goes_on() -> None:
    order = make(FakeFile([4, 9]), FakeFile([5], "b"))
    assert order.tokens_for(Span(1, 2, 6)).tolist() == [1002, 1003, 1004, 1005, 1006]
    assert order.tokens_for(Span(1, 2, 6), extra=0).tolist() == [1002, 1003, 1004, 1005]
    assert order.tokens_for(Span(1, 2, 9)).tolist() == list(range(1002, 1009))
    assert order.tokens_for(Span(2, 0, 4), extra=3).tolist() == [0, 1, 2, 3, 4]
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            order.tokens_for(Span(wrong, 0, 1))


def test_a_source_without_tokens_is_an_inventory_of_zero_and_an_error_to_train_on() -> None:
    for order in (make(FakeFile([])), make(FakeFile([0, 0])), make(FakeFile([5]), document_slice=(0, Decimal("0.5")))):
        assert order.epoch_tokens == 0
        with pytest.raises(DataError, match="no tokens"):
            order.prepare(0)
    with pytest.raises(DataError, match="at least one file"):
        make()


def test_many_files_some_of_them_empty() -> None:
    counts = [0, 0, 3, 0, 5000, 1, 0, 4097, 0]
    files = [FakeFile([1 + (i + j) % 5 for i in range(n)], f"file {j}", np.int32) for j, n in enumerate(counts)]
    order = make(*files, piece_tokens=2)
    lengths = [int(length) for file in files for length in file.document_lengths()]
    spans = order.pieces_at(3, 0, order.epoch_tokens)
    assert sorted(spans) == [
        Span(document, start, min(start + 2, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, 2)
    ]


def test_M6_files_of_equal_documents_otherwise_divided_are_another_source() -> None:
    one = make(FakeFile([3, 4, 5], "abc"))
    assert one.fingerprint != make(FakeFile([3], "a"), FakeFile([4, 5], "bc")).fingerprint
    assert make(CONTENTS["a"], CONTENTS["d"]).fingerprint != make(CONTENTS["d"], CONTENTS["a"]).fingerprint


@pytest.mark.parametrize("wrong", [(Decimal("-0.1"), 1), (0, Decimal("1.1")), (Decimal("0.6"), Decimal("0.5"))])
def test_an_impossible_slice_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="slice"):
        make(CONTENTS["a"], document_slice=wrong)


def test_an_order_travels_to_worker_processes() -> None:
    order = make(FakeFile(list(range(90))), holdout_fraction=Decimal("0.1"), document_slice=(0, Decimal("0.7")))
    order.prepare(0)
    again = pickle.loads(pickle.dumps(order))
    assert again.fingerprint == order.fingerprint
    assert again.pieces_at(2, 0, order.epoch_tokens) == order.pieces_at(2, 0, order.epoch_tokens)


def test_one_thread_builds_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    order = make(FakeFile([5] * 500))
    builds: list[int] = []
    real = epoch_index.make_epoch_order

    def slow(*arguments: Any) -> Any:
        builds.append(1)
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(epoch_index, "make_epoch_order", slow)
    monkeypatch.setattr(epoch_index, "_WORTH_A_THREAD", 1)
    order.prepare_in_background(1)
    threads = [threading.Thread(target=order.prepare, args=(1,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(order.pieces_at(1, 0, 2500)) == 500
    assert len(builds) == 1


def test_a_background_failure_is_raised_where_the_epoch_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    order = make(FakeFile([5] * 500))

    def fail(*_: Any) -> Any:
        raise DataError("the disk went away")

    monkeypatch.setattr(epoch_index, "_WORTH_A_THREAD", 1)
    with monkeypatch.context() as broken:
        broken.setattr(epoch_index, "make_epoch_order", fail)
        order.prepare_in_background(1)
        with pytest.raises(DataError, match="the disk went away"):
            order.pieces_at(1, 0, 10)
        for thread in threading.enumerate():
            if thread.name.startswith("epoch-index"):
                thread.join(timeout=30)
    assert len(order.pieces_at(1, 0, 2500)) == 500


def test_only_a_few_epochs_stay_open() -> None:
    order = make(FakeFile([5] * 100))
    first = order.pieces_at(0, 0, 100)
    for epoch in range(50):
        order.prepare(epoch)
    assert order.pieces_at(0, 0, 100) == first
    assert len(order._open) <= 4
