"""Gathering and scattering one tensor over a group, by the names that this version of torch has for them.

torch 2.13 renamed `all_gather_into_tensor` and `reduce_scatter_tensor`, and warns of the old names at every call.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def all_gather(
    output: Tensor, own: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Fills output with the tensors of all ranks, one after the other along the first dimension."""
    return getattr(dist, ALL_GATHER)(output, own, group=group, async_op=async_op)  # type: ignore[no-any-return]


def reduce_scatter(
    output: Tensor, every: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """Fills output with this rank's part, along the first dimension, of the sum of all ranks' tensors."""
    return getattr(dist, REDUCE_SCATTER)(output, every, group=group, async_op=async_op)  # type: ignore[no-any-return]
