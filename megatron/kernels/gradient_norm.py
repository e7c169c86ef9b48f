"""The square of many tensors' common 2-norm, and what clipping by it means, without the host ever seeing a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norm(tensors: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """The sum of the squares of all elements, float64 of no dimension: squared and added in float64, so that neither
    large elements overflow nor many small ones are lost. Infinite or not a number where an element is.

    device: of the result where there are no tensors; otherwise it is that of the first.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else device)
    for tensor in tensors:
        total += tensor.double().square().sum()
    return total


def clip_scale(squared: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """What gradients are multiplied by so that their norm is at most `bound`, and whether they are unusable.

    squared: of no dimension, the square of the norm. bound: 0 for no clipping. Gives a float64 factor, at most 1, and a
    float32 flag, 1 where the norm is not finite and 0 otherwise, both of no dimension on squared's device.
    """
    norm = squared.double().sqrt()
    scale = (bound / norm).clamp(max=1.0) if bound > 0 else torch.ones_like(norm)
    return scale, torch.isfinite(norm).logical_not().float()
