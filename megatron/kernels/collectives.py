"""Gathering and scattering one tensor over a group, by the names that this version of torch has for them.

torch 2.13 renamed `all_gather_into_tensor` and `reduce_scatter_tensor`, and warns of the old names at every call.
"""

from __future__ import annotations

import torch.distributed as dist

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(output, input, group=, async_op=): the inputs of all ranks, one after the other along the first dimension."""

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(output, input, group=, async_op=): this rank's part, along the first dimension, of the sum of all ranks' inputs."""
