"""Starts of documents against a count in plain Python, and without ever looking at a device's numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.kernels.attention import piece_starts
from megatron.kernels.document_lengths import (
    DocumentBounds,
    asked_bounds,
    document_bounds,
    document_starts,
    loosest_bounds,
    roomy,
)


def counted(rows: list[list[int]], cut: int | None = None) -> list[int]:
    """Where documents start among the packed positions, and their end."""
    starts, length = [], len(rows[0])
    for number, row in enumerate(rows):
        for place, document in enumerate(row):
            if place == 0 or document != row[place - 1] or place == cut:
                starts.append(number * length + place)
    return [*starts, len(rows) * length]


ids_of = st.integers(1, 12).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=1, max_size=4)
)


@settings(max_examples=200, deadline=None)
@given(ids_of, st.integers(0, 5))
def test_starts_and_bounds_are_those_that_are_counted(rows: list[list[int]], room: int) -> None:
    ids = torch.tensor(rows, dtype=torch.int32)
    expected = counted(rows)
    lengths = [b - a for a, b in itertools.pairwise(expected)]
    assert document_bounds(ids) == DocumentBounds(len(lengths), max(lengths))
    starts = document_starts(piece_starts(ids), len(lengths) + room)
    assert starts.dtype == torch.int32
    assert starts.tolist() == expected + room * [ids.numel()]
    loosest = loosest_bounds(*ids.shape)
    assert loosest.documents >= len(lengths) and loosest.longest >= max(lengths)


@settings(max_examples=200, deadline=None)
@given(ids_of, st.data())
def test_a_cut_ends_every_rows_document(rows: list[list[int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(rows[0])))
    ids = torch.tensor(rows, dtype=torch.int32)
    bounds = document_bounds(ids)
    starts = document_starts(piece_starts(ids), bounds.documents, cut)
    expected = counted(rows, cut)
    assert starts.shape == (bounds.documents + 1 + len(rows),)
    assert starts.tolist() == expected + (len(starts) - len(expected)) * [ids.numel()]


def test_too_small_a_bound_keeps_the_first_documents() -> None:
    first = piece_starts(torch.tensor([[0, 1, 2, 3]]))
    assert document_starts(first, 2).tolist() == [0, 1, 2]


def test_no_number_of_a_device_is_asked_for() -> None:
    first = torch.empty(4, 4096, dtype=torch.int64, device="meta")
    assert document_starts(first, 72).shape == (73,)
    assert document_starts(first, 72, cut=1024).shape == (77,)
    with pytest.raises(ValueError, match="counted on the CPU before they are copied, not on meta"):
        document_bounds(first)


def test_no_rows() -> None:
    empty = torch.empty(0, 8, dtype=torch.int64)
    assert document_bounds(empty) == DocumentBounds(0, 0)
    assert document_starts(piece_starts(empty), 3).tolist() == [0, 0, 0, 0]


@given(st.integers(1, 1 << 20))
def test_a_roomy_count_is_at_most_an_eighth_more_and_one_of_few(count: int) -> None:
    assert count <= roomy(count) <= count + max(0, count // 8)
    assert roomy(roomy(count)) == roomy(count)


def test_roomy_counts_are_eight_between_powers_of_two() -> None:
    assert len({roomy(count) for count in range(1025, 2049)}) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")
def test_starts_on_a_gpu_without_waiting() -> None:
    ids = (torch.rand(4, 4096) < 0.01).cumsum(1).int()
    bounds = document_bounds(ids)
    first: Tensor = piece_starts(ids.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        starts = document_starts(first, bounds.documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert starts.tolist() == counted(ids.tolist())
    assert asked_bounds(first) == bounds
