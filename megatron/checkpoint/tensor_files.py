"""Safetensors files read and laid out by their public format: 8 bytes of length, a JSON header, raw values.

Values are read with `pread` into memory that is there. A memory map would count every page of a file that was touched
as this process's memory, and end the process by a signal where the file became shorter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.tensor_format import DTYPES
from megatron.config.errors import CheckpointError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The format's names of torch's dtypes."""
_BOUNCE = 8 * 2**20
_LONG_RUN = 64 * 2**10
_HIGHEST_HEADER = 100 * 10**6  # the library's own bound


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a file. begin: of its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file. Any number of threads may read at once."""

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that is no safetensors file, or shorter than its header says; OSError."""
        self.path = Path(path)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.places, self.metadata = self._header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the descriptor back; may be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def read_into(self, box: Tensor, name: str, offset: Sequence[int]) -> None:
        """Fills `box`, on the CPU and of the tensor's dtype, with the part of its shape that begins at `offset`.

        Raises KeyError for an unknown name, ValueError beyond the tensor, CheckpointError where the file ends early.
        """
        place = self.places[name]
        if box.dtype != place.dtype or len(offset) != len(place.shape):
            raise ValueError(f"{name}: no box of {box.dtype} {list(box.shape)} at {list(offset)} in {place}")
        if any(a < 0 or a + n > whole for a, n, whole in zip(offset, box.shape, place.shape, strict=True)):
            raise ValueError(f"{name}: no box of {list(box.shape)} at {list(offset)} in {list(place.shape)}")
        if box.numel():
            self._fill(box, place, place.begin, place.shape, tuple(offset))

    def _fill(self, box: Tensor, place: TensorPlace, begin: int, whole: tuple[int, ...], at: tuple[int, ...]) -> None:
        """begin: of a tensor of the shape `whole` within the file, of which `box` is a part at `at`."""
        item = place.dtype.itemsize
        if tuple(box.shape[1:]) == whole[1:]:
            first = begin + (at[0] * prod(whole[1:]) * item if whole else 0)
            if box.is_contiguous():
                self._read(box, first)
            else:
                loose = torch.empty(box.shape, dtype=box.dtype)
                self._read(loose, first)
                box.copy_(loose)
            return
        row = prod(whole[1:]) * item
        if prod(box.shape[1:]) * item >= _LONG_RUN or row > _BOUNCE:
            for number in range(box.shape[0]):
                self._fill(box[number], place, begin + (at[0] + number) * row, whole[1:], at[1:])
            return
        # Short pieces of many rows: whole rows are read and cut in memory, a few at a time.
        step = max(1, _BOUNCE // row)
        inside = (slice(None), *(slice(a, a + n) for a, n in zip(at[1:], box.shape[1:], strict=True)))
        rows = torch.empty((min(step, box.shape[0]), *whole[1:]), dtype=box.dtype)
        for number in range(0, box.shape[0], step):
            part = rows[: min(step, box.shape[0] - number)]
            self._read(part, begin + (at[0] + number) * row)
            box[number : number + len(part)] = part[inside]

    def _read(self, box: Tensor, begin: int) -> None:
        self._read_bytes(raw_bytes(box), begin)

    def _read_bytes(self, view: memoryview, begin: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], begin + done)
            if not count:
                raise CheckpointError(f"{self.path}: ends at byte {begin + done}, before what its header names")
            done += count

    def _header(self) -> tuple[dict[str, TensorPlace], dict[str, str]]:
        size = os.fstat(self._descriptor).st_size
        try:
            if size < 8:
                raise ValueError(f"{size} bytes are too few")
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            if length > min(size - 8, _HIGHEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            words = bytearray(length)
            self._read_bytes(memoryview(words), 8)
            header = json.loads(words)
            metadata = header.pop("__metadata__", None) or {}
            places = {name: _place(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: not a whole safetensors file: {error}") from None
        for name, place in places.items():
            if place.begin + place.size > size:
                raise CheckpointError(
                    f"{self.path}: not a whole safetensors file: tensor {name} ends at byte "
                    f"{place.begin + place.size}, the file at {size}"
                )
        return places, metadata


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU as writable bytes."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy()).cast("B")


def lay_out(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorPlace]]:
    """The beginning of a safetensors file of these tensors, and where each one's values go in it.

    Wide elements come first, then by name as the library writes them, so that each tensor is aligned. Raises TypeError
    for a dtype that the format lacks.
    """
    order = sorted(tensors, key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: list[tuple[str, TensorPlace]] = []
    end = 0
    for name, dtype, shape in order:
        if dtype not in DTYPE_NAMES:
            raise TypeError(f"tensor {name} is of {dtype}, which safetensors files do not hold")
        place = TensorPlace(dtype, shape, end)
        end += place.size
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [place.begin, end]}
        spans.append((name, place))
    words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    words += b" " * (-len(words) % 8)
    start = 8 + len(words)
    places = {name: TensorPlace(place.dtype, place.shape, start + place.begin) for name, place in spans}
    return len(words).to_bytes(8, "little") + words, places


def _place(entry: Mapping[str, Any], start: int) -> TensorPlace:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is not known")
    place = TensorPlace(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), start + int(begin))
    if begin < 0 or min(place.shape, default=0) < 0 or end - begin != place.size:
        raise ValueError(f"data_offsets {[begin, end]} do not fit {entry['dtype']} {entry['shape']}")
    return place
