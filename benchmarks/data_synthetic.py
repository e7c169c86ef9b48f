"""Indexed datasets (`.bin/.idx`) written straight from NumPy in Megatron's format, for measurements that need shapes.

Independent of both sides' writers, so that neither reads what only it could have written. Without tokens the `.bin` is
a sparse file of zeros: an index build never reads it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}
MEDIAN_TOKENS, SPREAD, LONGEST = 600, 1.0, 1 << 20


def web_lengths(documents: int, seed: int) -> npt.NDArray[np.int32]:
    """Lengths with a web corpus's spread: log-normal, median 600 tokens, at most 2^20. Shape [documents]."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SPREAD, documents)
    return np.clip(drawn, 1, LONGEST).astype(np.int32)


def write_indexed(
    prefix: Path, lengths: npt.NDArray[np.int32], tokens: npt.NDArray[np.generic] | None, dtype: str
) -> Path:
    """One sequence a document. `tokens`: the ids of all documents one after another; None: a sparse file of zeros."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    itemsize = np.dtype(dtype).itemsize
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) * itemsize
    with Path(f"{prefix}.bin").open("wb") as file:
        if tokens is None:
            file.truncate(int(ends[-1]) * itemsize)
        else:
            tokens.astype(dtype).tofile(file)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, DTYPE_CODES[dtype], len(lengths), len(lengths) + 1))
        lengths.tofile(file)
        pointers.tofile(file)
        np.arange(len(lengths) + 1, dtype=np.int64).tofile(file)
    return prefix


def web_like(prefix: Path, documents: int, seed: int) -> Path:
    """A dataset of `documents` lengths without tokens, made where it is not there yet."""
    if not Path(f"{prefix}.idx").is_file():
        write_indexed(prefix, web_lengths(documents, seed), None, "uint16")
    return prefix


def numbered(prefix: Path, tokens: int, mean: int, seed: int) -> Path:
    """Documents whose ids are 0, 1, 2, … through the whole file: whoever reads one knows where it stands."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, 2 * tokens // mean), 1, 64 * mean).astype(np.int32)
    kept = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    lengths = lengths[:kept]
    return write_indexed(prefix, lengths, np.arange(int(lengths.sum())), "int32")
