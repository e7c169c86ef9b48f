"""Tensors of many shapes and dtypes, and several ways to cut them over ranks, for tests of saving."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorShard

WAYS = ("rows", "columns", "grid", "flat", "whole", "late")


def tensors_of(step: int) -> dict[str, Tensor]:
    """By name: sizes that no number of ranks divides, one without dimensions, an empty one, four dtypes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "layers.0.weight": torch.randn(7, 5, generator=generator),
        "layers.0.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "layers.1.cube": torch.randn(3, 4, 2, generator=generator).double(),
        "layers.1.weight": torch.randn(9, 6, generator=generator).t(),
        "step": torch.tensor(float(step)),
        "none": torch.zeros(0, 5),
        "counts": torch.arange(step, step + 11),
    }


def cut(tensors: dict[str, Tensor], way: str, rank: int, ranks: int) -> dict[str, list[TensorShard]]:
    """What one rank holds.

    rows, columns: even chunks, the last ones smaller or empty. grid: both at once. flat: a range of the elements in
    order, as boxes. whole: tensors dealt out. late: one rank after the first holds all.
    """
    found: dict[str, list[TensorShard]] = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if not tensor.ndim or way == "whole":
            if number % ranks == rank:
                found[name] = [TensorShard.whole(tensor)]
        elif way == "late":
            if rank == ranks - 1:
                found[name] = [TensorShard.whole(tensor)]
        elif way == "flat":
            found[name] = _flat(tensor, rank, ranks)
        else:
            found[name] = [_box(tensor, way, rank, ranks)]
    return found


def _box(tensor: Tensor, way: str, rank: int, ranks: int) -> TensorShard:
    down = 2 if way == "grid" and ranks % 2 == 0 and tensor.ndim > 1 else ranks if way == "rows" else 1
    across = ranks // down
    if tensor.ndim == 1:
        down, across = ranks, 1
    offset, size = [0] * tensor.ndim, list(tensor.shape)
    for dim, number, parts in ((0, rank // across, down), (tensor.ndim - 1, rank % across, across)):
        if parts > 1:
            chunk = -(-tensor.shape[dim] // parts)
            offset[dim] = min(number * chunk, tensor.shape[dim])
            size[dim] = min(chunk, tensor.shape[dim] - offset[dim])
    box = tuple(slice(begin, begin + n) for begin, n in zip(offset, size, strict=True))
    return TensorShard(tensor[box], tuple(tensor.shape), tuple(offset))


def _flat(tensor: Tensor, rank: int, ranks: int) -> list[TensorShard]:
    """A range of the elements in row-major order, cut into rows of the flattened trailing dimensions' boxes."""
    if not tensor.numel():
        return [TensorShard(tensor, tuple(tensor.shape), (0,) * tensor.ndim)]
    chunk = -(-tensor.numel() // ranks)
    begin, end = min(rank * chunk, tensor.numel()), min((rank + 1) * chunk, tensor.numel())
    shards = []
    for place in range(begin, end):
        index = torch.unravel_index(torch.tensor(place), tensor.shape)
        offset = tuple(int(i) for i in index)
        box = tuple(slice(i, i + 1) for i in offset)
        shards.append(TensorShard(tensor[box], tuple(tensor.shape), offset))
    return shards
