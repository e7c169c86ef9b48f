"""Whether weights are finite, before and after they are made narrower."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.config.errors import CheckpointError


def is_finite(values: Tensor) -> bool:
    """Whether every value is; no copy is made: smallest and largest say the same, NaN included."""
    return not values.numel() or all(bool(extreme.isfinite()) for extreme in values.aminmax())


def check_finite(values: Tensor, stored: Tensor, name: str, remedy: str) -> None:
    """Raises CheckpointError unless every value is finite.

    stored: the same values as they were read. name: of the tensor, with what holds it. remedy: where they were damaged.
    """
    if is_finite(values):
        return
    if not is_finite(stored):
        raise CheckpointError(f"{name} holds NaN or infinity: {remedy}")
    largest = float(torch.stack(stored.aminmax()).abs().max())
    word = str(values.dtype).removeprefix("torch.")
    raise CheckpointError(f"{name} holds {largest:g}, which {word} cannot say: choose --dtype bfloat16 or float32")
