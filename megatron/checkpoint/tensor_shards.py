"""Tensors in shards: what a rank holds of a tensor that may be cut over ranks, and reading any part of a stored one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """A box of a whole tensor. tensor: its values · shape: of the whole · offset: where the box begins in it."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> TensorShard:
        """A tensor that is not cut."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.ndim)


TensorShards = Mapping[str, Sequence[TensorShard]]
"""By global tensor name, the shards that one rank is to write. Over all ranks they cover each tensor exactly once."""


class TensorSource(Protocol):
    """Stored tensors by global name, read in any box."""

    def names(self) -> Iterable[str]:
        """Every name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Of its values."""

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A copy, on the CPU, of the box of `shape` that begins at `offset`."""


@dataclass(frozen=True)
class WholeTensors:
    """A TensorSource over tensors in memory."""

    tensors: Mapping[str, Tensor]

    def names(self) -> Iterable[str]:
        """Every name."""
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of its values."""
        return self.tensors[name].dtype

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A copy, on the CPU, of a box."""
        box = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return self.tensors[name][box].detach().to("cpu", copy=True)


def whole_shards(tensors: Mapping[str, Tensor]) -> dict[str, list[TensorShard]]:
    """Shards of tensors that are not cut."""
    return {name: [TensorShard.whole(tensor)] for name, tensor in tensors.items()}
