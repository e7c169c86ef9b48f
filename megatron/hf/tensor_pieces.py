"""A tensor of theirs from a checkpoint's, piece by piece: each a few MB, made of the dtype wanted, and finite."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from math import prod

import torch
from torch import Tensor

from megatron.checkpoint.finite import check_finite
from megatron.checkpoint.stored_tensors import StoredTensors
from megatron.config.model_shape import ModelShape
from megatron.hf.layout import pack, rows_of
from megatron.hf.name_table import our_size
from megatron.hf.shard_plan import PlannedTensor

CHUNK = 4 * 2**20
"""Bytes of a piece: it is still in the processor's cache when it is looked at, summed up and written."""
_REMEDY = "choose an earlier checkpoint"


class Buffer:
    """Memory that a thread uses again and again: a new piece takes the place of the one before."""

    def __init__(self) -> None:
        self._memory = torch.empty(CHUNK, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A contiguous tensor of any values."""
        size = prod(shape) * dtype.itemsize
        if size > self._memory.numel():
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(shape)


class Pieces:
    """Pieces of planned tensors, for one thread. whole: a lock that all threads of a job share."""

    def __init__(self, source: StoredTensors, shape: ModelShape, whole: threading.Lock) -> None:
        self._source, self._shape, self._whole = source, shape, whole
        self._buffer = Buffer()

    def of(self, tensor: PlannedTensor) -> Generator[tuple[int, Tensor]]:
        """(position in the file, contiguous values as they go there), every value once, in the order of `spans`. A
        piece holds until the next one is asked for.

        Raises CheckpointError for values that are not finite, or not in the dtype wanted.
        """
        if tensor.entry.transposed:
            yield from self._transposed(tensor)
            return
        row = row_bytes(tensor)
        for number, name in enumerate(tensor.entry.ours):
            for first, values in self._rows(name, tensor.place.dtype):
                for rows in rows_of(tensor.entry, number, first, first + len(values), self._shape):
                    yield tensor.place.begin + rows.theirs * row, values[rows.ours - first :][: rows.count]

    def _rows(self, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, rows of `dtype`) of one of our tensors."""
        shape, stored = self._source.shape(name), self._source.dtype(name)
        step = max(1, CHUNK // (prod(shape[1:]) * stored.itemsize))
        for begin in range(0, shape[0], step):
            read = self._buffer.tensor(stored, (min(step, shape[0] - begin), *shape[1:]))
            self._source.read_into(read, name, (begin, *(0 for _ in shape[1:])))
            values = read.to(dtype)
            check_finite(values, read, f"tensor {name}", _REMEDY)
            yield begin, values

    def _transposed(self, tensor: PlannedTensor) -> Iterator[tuple[int, Tensor]]:
        """Whole tensors are turned, one at a time among all threads, so that never more than two are in memory."""
        dtype, begin = tensor.place.dtype, tensor.place.begin
        with self._whole:
            parts = [torch.cat([rows.clone() for _, rows in self._rows(name, dtype)]) for name in tensor.entry.ours]
            flat = pack(tensor.entry, parts, self._shape).view(-1)
            del parts
            step = CHUNK // dtype.itemsize
            for first in range(0, flat.numel(), step):
                yield begin + first * dtype.itemsize, flat[first : first + step]


def spans(tensor: PlannedTensor, shape: ModelShape) -> Iterator[tuple[int, int]]:
    """(position in the file, bytes) of a tensor's values, in the order in which `Pieces.of` gives them."""
    if tensor.entry.transposed:
        yield tensor.place.begin, tensor.place.size
        return
    row = row_bytes(tensor)
    for number, size in enumerate(tensor.entry.size):
        for rows in rows_of(tensor.entry, number, 0, our_size(size, shape)[0], shape):
            yield tensor.place.begin + rows.theirs * row, rows.count * row


def row_bytes(tensor: PlannedTensor) -> int:
    """Of one row of theirs."""
    return prod(tensor.place.shape[1:]) * tensor.place.dtype.itemsize
