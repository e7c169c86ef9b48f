"""Pieces, sparse sums and spans against plain lists, and the C++ against NumPy, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import BACKENDS, backend, needs_native, shapes

from megatron.config.errors import DataError
from megatron.data.epoch_index import SourceOrder
from megatron.data.holdout import held_out
from megatron.data.permutation import permute
from megatron.data.piece_table import STRIDE, NumpyPieceTable, make_epoch_order, make_piece_table


def pieces_by_hand(order: SourceOrder, lengths: list[int], held: list[bool]) -> list[tuple[int, int, int]]:
    """(document, start, end) of each piece in the order of their ids: first pieces, then the further ones."""
    size = order.piece_tokens
    numbers = range(order.files.first, order.files.last)
    kept = {document: 0 if held[document] else lengths[document] for document in numbers}
    first = [(document, 0, min(length, size)) for document, length in kept.items()]
    further = [
        (document, start, min(start + size, length))
        for document, length in kept.items()
        for start in range(size, length, size)
    ]
    return first + further


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=100)
@given(shape=shapes(), epoch=st.integers(0, 3), where=st.data())
def test_the_stream_is_the_permuted_pieces(name: str, shape: dict[str, Any], epoch: int, where: st.DataObject) -> None:
    with backend(name):
        order = SourceOrder(**shape)
        lengths = [int(length) for file in shape["files"] for length in file.document_lengths()]
        masks = [held_out(file.fingerprint, file.document_count, shape["holdout_fraction"]) for file in shape["files"]]
        held = [bool(flag) for mask in masks for flag in mask]
        pieces = pieces_by_hand(order, lengths, held)
        assert order.piece_count == len(pieces)
        assert order.epoch_tokens == sum(end - start for _, start, end in pieces)
        if order.epoch_tokens == 0:
            with pytest.raises(DataError, match="no tokens"):
                order.prepare(epoch)
            return
        key = order.permutation_key(epoch)
        permuted = [pieces[permute(place, len(pieces), key)] for place in range(len(pieces))]
        stream = [(document, i) for document, start, end in permuted for i in range(start, end)]
        start = where.draw(st.integers(0, len(stream)))
        length = where.draw(st.integers(0, len(stream) - start))
        spans = order.pieces_at(epoch, start, length)
        assert [(document, i) for document, a, b in spans for i in range(a, b)] == stream[start : start + length]
        assert all(0 < b - a <= order.piece_tokens for _, a, b in spans)
        with pytest.raises(ValueError, match="within"):
            order.pieces_at(epoch, start, len(stream) - start + 1)


@needs_native
@settings(deadline=None, max_examples=200)
@given(shape=shapes(), key=st.integers(0, 2**64 - 1), where=st.data())
def test_native_equals_numpy_byte_for_byte(shape: dict[str, Any], key: int, where: st.DataObject) -> None:
    files = SourceOrder(**shape).files
    tables = []
    for name in BACKENDS:
        with backend(name):
            tables.append(files.piece_table(shape["piece_tokens"], shape["threads"]))
    twin, fast = tables
    assert isinstance(twin, NumpyPieceTable)
    assert not isinstance(fast, NumpyPieceTable)
    assert (twin.epoch_tokens, twin.piece_count) == (fast.epoch_tokens, fast.piece_count)
    sums = twin.sparse_sums(key)
    assert sums.tobytes() == fast.sparse_sums(key, shape["threads"]).tobytes()
    tokens = twin.epoch_tokens
    offset = where.draw(st.integers(0, tokens))
    length = where.draw(st.integers(0, tokens - offset))
    start = where.draw(st.integers(0, length))
    count = where.draw(st.integers(0, length - start))
    window, cut = where.draw(st.integers(1, 40)), where.draw(st.integers(1, 40))
    asked = (offset, length, window, where.draw(st.integers(0, 2**64 - 1)), start, count, cut, cut // 2)
    rows = [make_epoch_order(table, 7, key, sums).rows(*asked) for table in tables]
    assert np.array_equal(*rows)
    assert int((rows[0][:, 3] - rows[0][:, 2]).sum()) == count


@pytest.mark.parametrize("name", BACKENDS)
def test_documents_and_sources_beyond_32_bits(name: str) -> None:
    lengths = np.array([5, 2**31 + 3, 0, 2**40 + 1, 7, 2**31 - 1], dtype=np.int64)
    size = 2**30
    with backend(name):
        table = make_piece_table([lengths[:3], lengths[3:]], [1, 2], 0, 6, 0, size, 2)
        assert table.epoch_tokens == int(lengths.sum())
        assert table.piece_count == 6 + 2 + 1024 + 1
        order = make_epoch_order(table, 0, 99, table.sparse_sums(99, 2))
        rows = order.rows(0, table.epoch_tokens, table.epoch_tokens, 0, 0, table.epoch_tokens, 2**62, 0)
    taken = {document: rows[rows[:, 1] == document] for document in range(6)}
    for document, length in enumerate(lengths.tolist()):
        mine = taken[document][np.argsort(taken[document][:, 2])]
        assert mine[:, 2].tolist() == list(range(0, length, size))
        assert mine[:, 3].tolist() == [min(start + size, length) for start in mine[:, 2].tolist()]


@pytest.mark.parametrize("name", BACKENDS)
def test_impossible_lengths_are_refused(name: str) -> None:
    with backend(name):
        with pytest.raises(ValueError, match="document 1 has a negative length"):
            make_piece_table([np.array([5, -3])], [1], 0, 2, 0, 8, 2)
        with pytest.raises(ValueError, match="2\\^62"):
            make_piece_table([np.full(3, 2**61)], [1], 0, 3, 0, 2**40, 2)
        with pytest.raises(ValueError, match="2\\^62"):
            make_piece_table([np.full(8, 2**62)], [1], 0, 8, 0, 2**40, 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_outside_the_block_and_foreign_sums_are_refused(name: str) -> None:
    with backend(name):
        table = make_piece_table([np.full(100, 3)], [1], 0, 100, 0, 8, 1)
        sums = table.sparse_sums(1, 1)
        assert len(sums) == -(-100 // STRIDE)
        order = make_epoch_order(table, 0, 1, sums)
        good = [10, 100, 7, 5, 20, 30, 9, 2]
        assert len(order.rows(*good))
        for place, wrong in [(0, 250), (1, 291), (2, 0), (4, 71), (5, 81), (6, 0), (7, 9)]:
            with pytest.raises(ValueError, match="within|positive"):
                order.rows(*good[:place], wrong, *good[place + 1 :])
        with pytest.raises(ValueError, match="do not belong"):
            make_epoch_order(table, 0, 1, sums[:-1])


@needs_native
def test_native_survives_sums_that_lie() -> None:
    table = make_piece_table([np.full(100, 3)], [1], 0, 100, 0, 8, 1)
    for lie in ([0, 2**63, 2**63, 2**63], [0, 0, 0, 0], [0, 299, 5, 2**64 - 1]):
        order = make_epoch_order(table, 0, 1, np.array(lie, dtype=np.uint64))
        for start in range(300):
            try:
                rows = order.rows(0, 300, 300, 0, start, 300 - start, 300, 0)
            except RuntimeError as error:
                assert "epoch index" in str(error)
            else:
                assert np.all((rows[:, 1] >= 0) & (rows[:, 1] < 100))
                assert np.all((rows[:, 2] >= 0) & (rows[:, 3] <= 3))
