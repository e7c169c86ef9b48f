"""A part: what one block of the corpus became, in one file that is whole or absent.

Layout of `fFFFFFFF-bBBBBBB.part`, little endian: the token ids; then sections, each from a multiple of 8 bytes on
(`lengths` and whatever else has one row a document, `quarantine` in JSON lines); the summary in JSON, which says where
each section lies, and its CRC-32; u64 length and u32 CRC-32 of that JSON; the magic. A part is written aside by a
worker and renamed by the main process: whatever is killed, its name says that it is whole. It is not forced to the
disk, which took a tenth of the whole time and mostly wrote what is soon removed: the checksums find what a power
failure or a bad disk does to it, and the part is then made again.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import DataError
from megatron.preprocessing.storage import storage_errors

_TRAILER = struct.Struct("<QI8s")
_MAGIC = b"SMPART01"
_NAME = re.compile(r"f(\d{7,})-b(\d{6,})\.part")
_CHUNK_BYTES = 4 << 20


class PartKey(NamedTuple):
    """The place of a part in the corpus: the number of the file its block begins in, and the block's number there."""

    file_number: int
    block_number: int

    @property
    def name(self) -> str:
        return f"f{self.file_number:07d}-b{self.block_number:06d}.part"


class PartWriter:
    """Writes one part aside, for `publish_part`. Left by an error, nothing remains. I/O errors are StorageError."""

    def __init__(self, folder: Path, key: PartKey) -> None:
        self._partial = _aside(folder, key)
        with storage_errors(self._partial):
            self._file = self._partial.open("wb")
        self._crc = 0
        self._bytes = 0
        self._finished = False

    def add_ids(self, ids: NDArray[Any]) -> None:
        """More token ids, in the dtype in which they are kept."""
        content = _bytes_of(ids)
        with storage_errors(self._partial):
            self._file.write(content)
        self._crc = zlib.crc32(content, self._crc)
        self._bytes += len(content)

    def finish(self, summary: dict[str, Any], arrays: dict[str, NDArray[Any]], quarantine: bytes) -> None:
        """Write the sections and the summary."""
        sections: dict[str, Any] = {"ids": {"offset": 0, "bytes": self._bytes, "crc": self._crc}}
        with storage_errors(self._partial):
            for name, array in arrays.items():
                place = self._section(_bytes_of(array))
                sections[name] = place | {"dtype": array.dtype.newbyteorder("<").str, "shape": list(array.shape)}
            if quarantine:
                sections["quarantine"] = self._section(quarantine)
            content = json.dumps({**summary, "sections": sections}).encode()
            self._file.write(content + _TRAILER.pack(len(content), zlib.crc32(content), _MAGIC))
            self._file.close()
        self._finished = True

    def _section(self, content: bytes | memoryview) -> dict[str, Any]:
        padding = -self._file.tell() % 8
        self._file.write(b"\0" * padding)
        offset = self._file.tell()
        self._file.write(content)
        return {"offset": offset, "bytes": len(content), "crc": zlib.crc32(content)}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            with suppress(OSError):  # closing may try to write what is buffered once more
                self._file.close()
            self._partial.unlink(missing_ok=True)


def publish_part(folder: Path, key: PartKey) -> None:
    """Give what a PartWriter has finished its name. Raises StorageError."""
    partial = _aside(folder, key)
    with storage_errors(partial):
        os.replace(partial, folder / key.name)


@dataclass(frozen=True)
class Part:
    """A whole part: its path and its summary. Content is read, and its checksum compared, on demand."""

    path: Path
    summary: dict[str, Any]

    def array(self, name: str) -> NDArray[Any]:
        """A section with one row a document. Raises DataError where the disk did not keep it."""
        section = self.summary["sections"][name]
        array: NDArray[Any] = np.frombuffer(self._read(name), section["dtype"]).reshape(section["shape"])
        return array

    def has(self, name: str) -> bool:
        return name in self.summary["sections"]

    def quarantine(self) -> bytes:
        """JSON lines; empty where nothing was set aside."""
        return self._read("quarantine") if self.has("quarantine") else b""

    def id_chunks(self, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        """The token ids in pieces of a few MiB. Raises DataError at the end where the checksum does not fit."""
        section = self.summary["sections"]["ids"]
        left, crc = int(section["bytes"]), 0
        with self.path.open("rb", buffering=0) as file:
            while left:
                content = file.read(min(left, _CHUNK_BYTES))
                content = content[: len(content) // dtype.itemsize * dtype.itemsize]
                if not content:
                    break
                file.seek(int(section["bytes"]) - left + len(content))
                crc = zlib.crc32(content, crc)
                left -= len(content)
                yield np.frombuffer(content, dtype.newbyteorder("<"))
        if left or crc != section["crc"]:
            raise self._damaged()

    def _read(self, name: str) -> bytes:
        section = self.summary["sections"][name]
        with self.path.open("rb") as file:
            file.seek(section["offset"])
            content = file.read(section["bytes"])
        if len(content) != section["bytes"] or zlib.crc32(content) != section["crc"]:
            raise self._damaged()
        return content

    def _damaged(self) -> DataError:
        self.path.unlink(missing_ok=True)
        return DataError(
            f"{self.path}: the part was damaged on the disk since it was written, and has been removed: run the "
            "preprocessing command again, which makes it anew and keeps the others"
        )


def open_part(folder: Path, key: PartKey) -> Part | None:
    """The part if it is whole, else None."""
    path = folder / key.name
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < _TRAILER.size:
                return None
            file.seek(size - _TRAILER.size)
            length, crc, magic = _TRAILER.unpack(file.read(_TRAILER.size))
            if magic != _MAGIC or length > size - _TRAILER.size:
                return None
            file.seek(size - _TRAILER.size - length)
            content = file.read(length)
    except FileNotFoundError:
        return None
    return Part(path, json.loads(content)) if zlib.crc32(content) == crc else None


def whole_parts(folder: Path) -> int:
    """How many parts the folder holds."""
    return sum(_NAME.fullmatch(name) is not None for name in os.listdir(folder)) if folder.is_dir() else 0


def _aside(folder: Path, key: PartKey) -> Path:
    return folder / f"{key.name}.partial"


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
