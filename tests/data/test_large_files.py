"""Sizes past 32 bits, by sparse files and synthetic indexes: no test here writes the bytes that it speaks of."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from token_files import BACKENDS, FakeFile, backend, needs_native

from megatron.config.errors import DataError
from megatron.data.assembly import BatchArrays, gather
from megatron.data.epoch_index import SourceOrder
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.native import native
from megatron.data.source_files import SourceFiles
from megatron.data.source_stream import CursorState, SourceStream

MOST = 2**31 - 1
CODES = {"uint8": 1, "uint16": 8, "int32": 4}


def sparse(prefix: Path, sizes: list[int], index: list[int], dtype: str, written: dict[int, list[int]]) -> Path:
    """A dataset of these sequences and documents; its `.bin` a hole but for ids `written` at token places."""
    width = np.dtype(dtype).itemsize
    pointers = np.cumsum([0, *sizes[:-1]], dtype=np.int64) * width
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(index)))
        file.write(np.array(sizes, dtype="<i4").tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.array(index, dtype="<i8").tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        for place, ids in written.items():
            file.seek(place * width)
            file.write(np.array(ids, dtype=dtype).tobytes())
        try:
            file.truncate(sum(sizes) * width)
        except OSError as error:  # a file system without holes, or with a limit on a file's size
            pytest.skip(f"no sparse file of {sum(sizes) * width} bytes here: {error}")
    return prefix


@pytest.mark.parametrize("name", BACKENDS)
def test_one_document_of_more_tokens_than_a_sequence_can_have(tmp_path: Path, name: str) -> None:
    """Three sequences, 5e9 tokens, and a short document behind them."""
    sizes = [MOST, MOST, 5 * 10**9 - 2 * MOST, 4]
    written = {2**32 + 5: [7, 8, 9], 5 * 10**9 - 1: [3, 11, 12, 13, 14]}
    prefix = sparse(tmp_path / "p", sizes, [0, 3, 4], "uint8", written)
    with backend(name):
        data = IndexedDataset(prefix)
        assert data.document_lengths().tolist() == [5 * 10**9, 4] and data.token_count == 5 * 10**9 + 4
        assert data.tokens(0, 2**32 + 5, 2**32 + 8).tolist() == [7, 8, 9]
        files = SourceFiles([data], (0, 1), 0)
        out = BatchArrays.empty(1, 8)
        spans = [(0, 0, 2**32 + 5, 2**32 + 7), (0, 0, 5 * 10**9 - 2, 5 * 10**9), (0, 1, 0, 4)]
        assert gather([files], [spans], out).tolist() == [0, 2, 4, 8]
        assert out.tokens.tolist() == [[7, 8, 0, 3, 11, 12, 13, 14]]
        assert out.targets.tolist() == [[8, 9, 3, -100, 12, 13, 14, -100]]
        with pytest.raises(IndexError):
            gather([files], [[(0, 0, 5 * 10**9 - 1, 5 * 10**9 + 1)]], out)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_epoch_of_20_000_000_513_tokens_is_counted_to_the_token(tmp_path: Path, name: str) -> None:
    """A number that float32 rounds by 513 and float64 holds; its last tokens are still found."""
    total, longest = 20_000_000_513, 2 * 10**9
    sizes = [longest] * 10 + [513]
    prefix = sparse(tmp_path / "p", sizes, list(range(12)), "uint8", {total - 2: [5, 6]})
    with backend(name):
        order = SourceOrder([IndexedDataset(prefix)], seed=1, piece_tokens=2**28, cache_dir=None)
        assert order.epoch_tokens == total == sum(sizes)
        stream = SourceStream(order, CursorState())
        stream.skip(total - 1, 1)
        rows = stream.take_rows(3, 3)
        assert rows[:, 3].sum() - rows[:, 2].sum() == 3 and rows[0, 0] == 0 and set(rows[1:, 0].tolist()) <= {0, 1}
        out = BatchArrays.empty(1, 2)
        gather([order.files], [[(0, 10, 511, 513)]], out)
        assert out.tokens.tolist() == [[5, 6]] and out.targets.tolist() == [[6, -100]]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_places_past_four_gigabytes_of_wider_ids(tmp_path: Path, dtype: str) -> None:
    prefix = sparse(tmp_path / "p", [MOST, MOST, 10], [0, 1, 2, 3], dtype, {2 * MOST: list(range(100, 110))})
    out = BatchArrays.empty(1, 10)
    gather([SourceFiles([IndexedDataset(prefix)], (0, 1), 0)], [[(0, 2, 0, 10)]], out)
    assert out.tokens.tolist() == [list(range(100, 110))]


@needs_native
def test_more_than_65_535_files_in_a_source() -> None:
    """One document in each; a 16-bit number of the file would come round."""
    count = 70_000
    files = [FakeFile([number % 5], f"{number}") for number in range(count)]
    order = SourceOrder(files, seed=3, piece_tokens=4, cache_dir=None, threads=2)
    total = sum(number % 5 for number in range(count))
    assert order.epoch_tokens == total
    rows = order.rows(0, 0, total, total, 0, 0, total, total, 0)
    assert sorted(rows[:, 1].tolist()) == [number for number in range(count) if number % 5]
    assert order.files.locate(65_536 + 7) == (65_536 + 7, 0)


@needs_native
def test_many_mapped_files_are_read_by_their_number(tmp_path: Path) -> None:
    prefix = sparse(tmp_path / "p", [1, 2], [0, 1, 2], "uint8", {0: [9, 4, 5]})
    data = IndexedDataset(prefix)
    extension = native()
    assert extension is not None
    reader = extension.TokenFiles([data.arrays] * 70_000)
    out = BatchArrays.empty(1, 3)
    spans = [[(0, 2 * 69_999 + 1, 0, 2), (0, 2 * 65_536, 0, 1)]]
    extension.gather([reader], spans, out.tokens, out.targets, out.document_ids, out.position_ids)
    assert out.tokens.tolist() == [[4, 5, 9]] and out.targets.tolist() == [[5, -100, -100]]


@pytest.mark.parametrize("name", BACKENDS)
def test_documents_and_sources_without_tokens(tmp_path: Path, name: str) -> None:
    with backend(name):
        empty = SourceOrder([FakeFile([0, 0])], seed=1, piece_tokens=4, cache_dir=None)
        assert empty.epoch_tokens == 0
        with pytest.raises(DataError, match="no tokens"):
            SourceStream(empty, CursorState())
        prefix = sparse(tmp_path / "p", [0, 3, 0], [0, 1, 2, 3], "uint8", {0: [1, 2, 3]})
        order = SourceOrder([IndexedDataset(prefix)], seed=1, piece_tokens=4, cache_dir=None)
        assert SourceStream(order, CursorState()).take_rows(6, 3)[:, 1].tolist() == [1, 1]
        Path(f"{prefix}.bin").write_bytes(b"")
        index = bytearray(Path(f"{prefix}.idx").read_bytes())
        index[34 + 4 : 34 + 8] = bytes(4)
        index[34 + 12 + 16 : 34 + 12 + 24] = bytes(8)
        Path(f"{prefix}.idx").write_bytes(index)
        with pytest.raises(DataError, match="0 tokens"):
            IndexedDataset(prefix)


def test_a_large_index_is_hashed_aside_and_once_forked_anew(tmp_path: Path) -> None:
    """The digest begun in a thread is that of the file, also asked for from several threads and by a forked child."""
    count = 200_000
    prefix = sparse(tmp_path / "p", [1] * count, list(range(count + 1)), "uint8", {})
    expected = hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
    opened = [IndexedDataset(prefix) for _ in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, for a process with threads: the point here
        child = os.fork()
    if child == 0:
        os._exit(0 if all(data._index_digest.hexdigest() == expected for data in opened) else 1)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(opened[0]._index_digest.hexdigest())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3 and len({data.fingerprint for data in opened}) == 1
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
