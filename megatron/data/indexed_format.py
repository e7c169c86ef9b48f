"""Megatron's indexed dataset format (MMIDIDX version 1): its layout, and the checks that a file must pass before use.

Layout of `.idx`, little endian, as Megatron-LM defines it: magic `MMIDIDX\\0\\0`, u64 version (1), u8 dtype code, u64
sequence count, u64 document index count, int32 sizes (tokens) [sequences], int64 pointers (bytes) [sequences], int64
document index [documents + 1]: document d is the sequences index[d] .. index[d + 1] - 1. `.bin` is the token ids.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import DataError
from megatron.data.native import native

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, str] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16",
}  # fmt: skip
CODE_OF_DTYPE: dict[str, int] = {name: code for code, name in DTYPE_OF_CODE.items()}

CHUNK = 1 << 20
_MOST_BYTES = 2**63 - 1


def dtype_for_vocab(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron stores ids of this vocabulary in: uint16 below 65,500, int32 from there."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def path_of(prefix: str | Path, suffix: str) -> Path:
    """`P` and ".idx" give `P.idx`, also where P itself has dots in it."""
    return Path(f"{prefix}{suffix}")


def refuse(path: Path, field: str, value: object, reason: str) -> NoReturn:
    """Raise DataError naming file, field, value and reason."""
    raise DataError(f"{path}: {field} = {value!r}: {reason}")


def map_file(path: Path) -> mmap.mmap:
    """The file, mapped read-only. DataError where it is missing, empty or unreadable."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Both .bin and .idx are needed: preprocess again") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a directory, not a file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    except ValueError:
        raise DataError(f"{path}: the file is empty: it was cut off or never finished. Preprocess again") from None


def read_header(path: Path, content: mmap.mmap) -> tuple[np.dtype[Any], int, int]:
    """dtype of the tokens, sequence count and document index count, each checked against the file's size."""
    if len(content) < HEADER.size:
        refuse(path, "file size", len(content), f"shorter than the header of {HEADER.size} bytes: it was cut off")
    magic, version, code, sequences, entries = HEADER.unpack_from(content)
    if magic != MAGIC:
        refuse(path, "magic", magic, f"{MAGIC!r} is expected: this is not a Megatron .idx file")
    if version != VERSION:
        refuse(path, "version", version, f"only version {VERSION} of the format exists")
    if code not in DTYPE_OF_CODE:
        refuse(path, "dtype code", code, f"known codes are {DTYPE_OF_CODE}")
    dtype = np.dtype(DTYPE_OF_CODE[code])
    if dtype.kind == "f":
        refuse(path, "dtype code", code, f"{dtype.name} cannot hold token ids")
    if sequences == 0:
        refuse(path, "sequence count", 0, "the dataset holds no documents")
    if entries < 2:
        refuse(path, "document index count", entries, "at least 2 are needed: 0 and the sequence count")
    expected = HEADER.size + 12 * sequences + 8 * entries
    if len(content) == expected + sequences:
        refuse(
            path, "file size", len(content), "it carries a mode for each sequence (multimodal), which is not supported"
        )
    if len(content) != expected:
        refuse(
            path, "file size", len(content),
            f"{sequences} sequences and {entries} document indices need {expected}: it was cut off or its counts lie",
        )  # fmt: skip
    return dtype, sequences, entries


def check_document_index(path: Path, index: NDArray[np.int64], sequences: int, threads: int = 1) -> bool:
    """Check that the index runs from 0 to the sequence count and never back; True where a document is one sequence.

    Raises DataError naming the first entry that is wrong.
    """
    if (extension := native()) is not None and (steps := extension.document_steps(index, sequences, threads)):
        return bool(steps == 2)
    return _check_document_index_twin(path, index, sequences)


def _check_document_index_twin(path: Path, index: NDArray[np.int64], sequences: int) -> bool:
    if int(index[0]) != 0:
        refuse(path, "document index 0", int(index[0]), "the first must be 0")
    if int(index[-1]) != sequences:
        refuse(
            path, f"document index {len(index) - 1}", int(index[-1]), f"the last must be the sequence count {sequences}"
        )
    single = len(index) == sequences + 1
    for begin in range(0, len(index) - 1, CHUNK):
        chunk = index[begin : begin + CHUNK + 1]
        back = chunk[1:] < chunk[:-1]  # not a difference, which a lie of -2^63 would overflow
        if back.any():
            place = begin + int(np.argmax(back)) + 1
            refuse(
                path,
                f"document index {place}",
                int(index[place]),
                f"less than the one before it, {int(index[place - 1])}",
            )
        single = single and bool((chunk[1:] == chunk[:-1] + 1).all())
    return single


def check_sequences(
    path: Path, sizes: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int, threads: int = 1
) -> int:
    """Bytes of `.bin` that the sequences cover, each checked to begin where the one before it ends.

    Raises DataError naming the first sequence that is wrong.
    """
    extension = native()
    if extension is not None:
        covered: int = extension.covered_bytes(sizes, pointers, itemsize.bit_length() - 1, threads)
        if covered >= 0:
            return covered
    return _check_sequences_twin(path, sizes, pointers, itemsize)


def _check_sequences_twin(path: Path, sizes: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int) -> int:
    expected_start = 0
    for begin in range(0, len(sizes), CHUNK):
        chunk = sizes[begin : begin + CHUNK].astype(np.int64)
        if int(chunk.min()) < 0:
            place = int(np.argmax(chunk < 0))
            refuse(path, f"size of sequence {begin + place}", int(chunk[place]), "a length cannot be negative")
        lengths = chunk * itemsize
        if expected_start + int(lengths.sum()) > _MOST_BYTES:
            refuse(path, f"sizes up to sequence {begin + len(chunk) - 1}", int(lengths.sum()), "more than 2^63 bytes")
        ends = np.cumsum(lengths) + expected_start
        starts = ends - lengths
        wrong = pointers[begin : begin + CHUNK] != starts
        if wrong.any():
            place = int(np.argmax(wrong))
            refuse(
                path, f"pointer of sequence {begin + place}", int(pointers[begin + place]),
                f"the sequences before it end at byte {int(starts[place])}: the sizes or the pointers lie",
            )  # fmt: skip
        expected_start = int(ends[-1])
    return expected_start


def map_bin(path: Path, index_path: Path, token_bytes: int) -> mmap.mmap:
    """`.bin`, mapped read-only. DataError where its size is not what `.idx` says."""
    if token_bytes == 0:
        raise DataError(f"{index_path}: every document has 0 tokens: the dataset is empty")
    content = map_file(path)
    if len(content) < token_bytes:
        refuse(
            path, "file size", len(content), f"{index_path} needs {token_bytes} bytes: it was cut off. Preprocess again"
        )
    if len(content) > token_bytes:
        refuse(path, "file size", len(content), f"{index_path} describes {token_bytes} bytes: the two are not a pair")
    return content
