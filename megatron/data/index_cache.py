"""Epoch index files: the sparse sums of one epoch of one source, published atomically, verified when opened.

A file's name is a digest of all that its content depends on, and nothing else, so that every arm of a study shares
it. Two jobs that build the same one at once write the same bytes; the later rename replaces the earlier one's.

Layout, little endian: magic `STGXORD2`, u32 stride, u32 bytes of an entry (4, or 8 where a stride of pieces may hold
2^32 tokens), u64 permutation key, u64 pieces, u64 tokens, u64 entries, 32 bytes name digest, 32 bytes checksum, 16
bytes zero; then the entries: the tokens of each stride of pieces, whose running sums are what is given out. 10M
documents take 1.25 MB. The checksum is blake2b-256 of the fields before it and the entries: it reads 1 GB/s, needs
nothing but the standard library, and sees any damage, where a crc32 (as fast) would miss one in 2^32.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.config.durable_files import sync_path
from megatron.config.errors import StorageError
from megatron.data.permutation import Words
from megatron.data.piece_table import STRIDE

_MAGIC = b"STGXORD2"
_FIELDS = struct.Struct("<8sIIQQQQ32s")
_CHECKSUM_BYTES = 32
_HEADER_BYTES = 128
_LEFTOVER_SECONDS = 86_400


@dataclass(frozen=True)
class IndexKey:
    """What an index depends on: digest names it (64 hex digits), the rest must agree with what the file says."""

    digest: str
    permutation_key: int
    pieces: int
    piece_tokens: int
    tokens: int

    @property
    def entries(self) -> int:
        """Entries of the sparse sums."""
        return -(-self.pieces // STRIDE)

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry: no stride of pieces holds more tokens than all of them."""
        return 4 if min(self.tokens, STRIDE * self.piece_tokens) < 2**32 else 8

    @property
    def file_name(self) -> str:
        """Name of the index file within its cache."""
        return f"{self.digest}.order"


class DamagedIndex(Exception):
    """An index file that is not what its name promises; the message says why."""


def open_or_build(folder: Path, key: IndexKey, build: Callable[[], Words]) -> Words:
    """The sparse sums of `key`: read from its file in the folder, or built, published there and read.

    A damaged file is named on stderr and built anew. Raises StorageError where the folder cannot be read, or lacks
    the file and cannot be written.
    """
    path = folder / key.file_name
    try:
        return read_index(path, key)
    except FileNotFoundError:
        pass
    except DamagedIndex as damage:
        print(f"warning: epoch index {path} is damaged ({damage}): building it anew", file=sys.stderr, flush=True)
    except OSError as error:
        raise StorageError(f"{path}: this epoch index cannot be read: {error.strerror or error}") from error
    began = time.perf_counter()
    sums = build()
    try:
        publish(path, key, sums)
    except OSError as error:
        raise StorageError(
            f"{folder}: the epoch index {path.name} cannot be written: {error.strerror or error}. Set [data] cache to "
            "a folder that can be written, or build the index once where this one can be"
        ) from error
    _note(folder, path.name, time.perf_counter() - began)
    return read_index(path, key)


def builds_of(folder: Path) -> Path:
    """Where it is noted which indexes of a folder were built: a line each, {"file", "time" (unix seconds, at its end),
    "seconds", "host", "pid"}. Beside the folder, so that nothing but indexes lies in it; where that cannot be
    written, it is not noted."""
    return folder.with_name(f"{folder.name}.jsonl")


def _note(folder: Path, name: str, seconds: float) -> None:
    row = {"file": name, "time": time.time(), "seconds": seconds, "host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError), open(builds_of(folder), "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def read_index(path: Path, key: IndexKey) -> Words:
    """The sparse sums in a file, uint64 [entries]. Raises DamagedIndex unless file, key and checksum agree; OSError."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
        expected = _HEADER_BYTES + key.entry_bytes * key.entries
        if size != expected:
            raise DamagedIndex(f"it has {size} bytes where {expected} are needed")
        fields = _header_fields(key)
        if header[: _FIELDS.size] != fields:
            raise DamagedIndex("its header is not the one that its name stands for")
        strides = np.fromfile(file, dtype=f"<u{key.entry_bytes}", count=key.entries)
    if header[_FIELDS.size :] != _checksum(fields, strides).ljust(_HEADER_BYTES - _FIELDS.size, b"\0"):
        raise DamagedIndex("its checksum does not match its content")
    sums: Words = np.zeros(key.entries, np.uint64)
    np.cumsum(strides[:-1], out=sums[1:])
    return sums


def publish(path: Path, key: IndexKey, sums: Words) -> None:
    """Writes an index aside, forces it to disk and renames it into place, making its folder where needed. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    fields = _header_fields(key)
    strides = np.diff(sums, append=np.uint64(key.tokens)).astype(f"<u{key.entry_bytes}")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write((fields + _checksum(fields, strides)).ljust(_HEADER_BYTES, b"\0"))
            file.write(strides.data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide it from colleagues who share the cache
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync_path(path.parent)


def _clear_leftovers(path: Path) -> None:
    """Removes what builds of this index left that were killed over a day ago; a younger one may still be at work."""
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()


def _header_fields(key: IndexKey) -> bytes:
    digest = bytes.fromhex(key.digest)
    return _FIELDS.pack(
        _MAGIC, STRIDE, key.entry_bytes, key.permutation_key, key.pieces, key.tokens, key.entries, digest
    )


def _checksum(fields: bytes, strides: npt.NDArray[np.unsignedinteger]) -> bytes:
    digest = blake2b(fields, digest_size=_CHECKSUM_BYTES)
    digest.update(strides.data)
    return digest.digest()
