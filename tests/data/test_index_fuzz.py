"""Damaged `.idx` files: whatever stands in them, opening says DataError or every read stays within the file.

With the extension built under AddressSanitizer (tests/data/test_sanitizers.py) these are the tests that it runs.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_files import BACKENDS, backend

from megatron.config.errors import DataError
from megatron.data.assembly import BatchArrays, gather
from megatron.data.epoch_index import SourceOrder
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_format import check_document_index, check_sequences
from megatron.data.source_stream import CursorState, SourceStream

WIDTHS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
HEADER_BYTES = 34
EXTREMES = [0, 1, -1, 2, 255, 2**31 - 1, -(2**31), 2**31, 2**32, 2**61, 2**62, 2**63 - 1, -(2**63), 2**64 - 1]


@st.composite
def valid_files(draw: st.DrawFn) -> tuple[bytearray, bytes, int]:
    """`.idx`, `.bin` and the number of sequences of a sound dataset, laid out by hand."""
    code = draw(st.sampled_from(sorted(WIDTHS)))
    width = struct.calcsize("<" + WIDTHS[code])
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    cuts = draw(st.lists(st.integers(0, len(sizes)), max_size=6))
    index = list(range(len(sizes) + 1)) if draw(st.booleans()) else [0, *sorted(cuts), len(sizes)]
    pointers = [width * sum(sizes[:i]) for i in range(len(sizes))]
    content = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(index))
    for letter, values in (("i", sizes), ("q", pointers), ("q", index)):
        content += struct.pack(f"<{len(values)}{letter}", *values)
    return bytearray(content), bytes(place % 127 + 1 for place in range(sum(sizes) * width)), len(sizes)


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A sound dataset after one to four changes: bits, fields, lengths of the files."""
    index, tokens, sequences = draw(valid_files())
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["bit", "field", "cut", "grow", "count", "zeros", "bin", "swap"]))
        if kind == "bit" and index:
            index[draw(st.integers(0, len(index) - 1))] ^= 1 << draw(st.integers(0, 7))
        elif kind == "field" and len(index) > HEADER_BYTES + 8:
            # one of the arrays' own numbers, or eight bytes anywhere behind the header
            places = [HEADER_BYTES + 4 * i for i in range(sequences)]
            places += [HEADER_BYTES + 4 * sequences + 8 * i for i in range(2 * sequences + 1)]
            at = draw(st.one_of(st.sampled_from(places), st.integers(HEADER_BYTES, len(index) - 8)))
            width = 4 if at < HEADER_BYTES + 4 * sequences else 8
            value = draw(st.one_of(st.sampled_from(EXTREMES), st.integers(-300, 300))) % 2 ** (8 * width)
            index[at : at + width] = value.to_bytes(width, "little")
        elif kind == "count" and len(index) >= HEADER_BYTES:
            value = draw(st.one_of(st.sampled_from(EXTREMES), st.integers(0, 40))) % 2**64
            struct.pack_into("<Q", index, draw(st.sampled_from([18, 26])), value)
        elif kind == "cut":
            del index[draw(st.integers(0, len(index))) :]
        elif kind == "grow":
            index += draw(st.binary(max_size=24))
        elif kind == "zeros" and index:
            at = draw(st.integers(0, len(index) - 1))
            end = min(len(index), at + draw(st.integers(1, 16)))
            index[at:end] = bytes(end - at)
        elif kind == "bin":
            tokens = tokens[: draw(st.integers(0, len(tokens)))] + draw(st.binary(max_size=4))
        elif kind == "swap" and len(index) > 16:
            one, other = (draw(st.integers(0, len(index) - 8)) for _ in range(2))
            index[one : one + 8], index[other : other + 8] = index[other : other + 8], index[one : one + 8]
    return bytes(index), tokens


def read_everything(prefix: Path, tokens: bytes) -> None:
    """Reads all that an opened dataset offers, in every way that a run does, and checks it against the bytes."""
    data = IndexedDataset(prefix)
    ids = np.frombuffer(tokens, data.dtype)
    lengths, starts = data.document_lengths(), data.document_starts()
    assert int(lengths.sum()) == data.token_count == len(ids) and int(lengths.min()) >= 0
    assert starts.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert len(data.fingerprint) == 64
    order = SourceOrder([data], seed=1, piece_tokens=3, cache_dir=None, threads=2)
    assert order.epoch_tokens == data.token_count
    for document in range(data.document_count):
        start, length = int(starts[document]), int(lengths[document])
        assert data.tokens(document).tolist() == ids[start : start + length].tolist()
        if length:
            out = BatchArrays.empty(1, length + 1)
            gather([order.files], [[(0, document, 0, length)]], out)
            assert out.tokens[0].tolist() == [*ids[start : start + length].tolist(), 0]
    rows = SourceStream(order, CursorState()).take_rows(data.token_count, data.token_count)
    out = BatchArrays.empty(1, data.token_count)
    gather([order.files], [rows], out)
    assert sorted(out.tokens[0].tolist()) == sorted(ids.tolist())


@pytest.mark.parametrize("name", BACKENDS)
@given(files=damaged_files())
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_read_within_its_bounds(tmp_path: Path, name: str, files: Any) -> None:
    prefix = tmp_path / "p"
    Path(f"{prefix}.idx").write_bytes(files[0])
    Path(f"{prefix}.bin").write_bytes(files[1])
    with backend(name):
        try:
            read_everything(prefix, files[1])
        except DataError as error:
            assert str(prefix) in str(error)


@pytest.mark.parametrize("name", BACKENDS)
@given(files=valid_files())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sound_file_is_read(tmp_path: Path, name: str, files: Any) -> None:
    prefix = tmp_path / "p"
    Path(f"{prefix}.idx").write_bytes(files[0])
    Path(f"{prefix}.bin").write_bytes(files[1])
    with backend(name):
        read_everything(prefix, files[1])


NUMBERS = st.one_of(st.integers(-2, 12), st.sampled_from([n for n in EXTREMES if -(2**63) <= n < 2**63]))


@given(
    sizes=st.lists(NUMBERS, min_size=1, max_size=6),
    shift=st.integers(0, 3),
    lie=st.none() | st.tuples(st.integers(0, 5), NUMBERS),
    threads=st.integers(1, 3),
)
@settings(deadline=None, max_examples=400)
def test_sequences_are_believed_by_both_backends_or_neither(
    sizes: list[int], shift: int, lie: tuple[int, int] | None, threads: int
) -> None:
    size = np.array([n % 2**32 for n in sizes], dtype=np.uint32).view(np.int32)
    exact = [0]
    for n in size.tolist():
        exact.append(exact[-1] + (n << shift))
    pointers = np.array([n % 2**64 for n in exact[:-1]], dtype=np.uint64).view(np.int64)
    if lie is not None:
        pointers[lie[0] % len(pointers)] = lie[1]
    sound = min(size.tolist()) >= 0 and pointers.tolist() == exact[:-1]
    for name in BACKENDS:
        with backend(name):
            if sound:
                assert check_sequences(Path("x"), size, pointers, 1 << shift, threads) == exact[-1]
            else:
                with pytest.raises(DataError, match="sequence"):
                    check_sequences(Path("x"), size, pointers, 1 << shift, threads)


@given(index=st.lists(NUMBERS, min_size=2, max_size=7), ordered=st.booleans(), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=400)
def test_document_indexes_are_believed_by_both_backends_or_neither(
    index: list[int], ordered: bool, threads: int
) -> None:
    if ordered:
        index = [0, *sorted(abs(n) % 2**62 for n in index)]
    sequences = max(index[-1], 1)
    entries = np.array(index, dtype=np.int64)
    sound = index[0] == 0 and index[-1] == sequences and index == sorted(index)
    for name in BACKENDS:
        with backend(name):
            if sound:
                single = check_document_index(Path("x"), entries, sequences, threads)
                assert single == (index == list(range(sequences + 1) if sequences < 99 else []))
            else:
                with pytest.raises(DataError, match="document index"):
                    check_document_index(Path("x"), entries, sequences, threads)
