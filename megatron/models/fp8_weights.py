"""Weights of layers that multiply in 8 bits, cast once an optimizer step instead of in each forward pass."""

from __future__ import annotations

import torch
from torch import nn

from megatron.models.layers import Linear


class Fp8Weights:
    """The casts of a model's 8-bit linear maps; none where its products are wider.

    Each forward pass of a step, a recomputed one and one that only looks too, reads the same cast; a refresh fills the
    same memory, so that neither a recorded CUDA graph nor a compiled layer notices.
    """

    def __init__(self, model: nn.Module) -> None:
        """From now on the maps compute with their casts: `refresh` must be called before the first forward pass."""
        self._linears = [module for module in model.modules() if isinstance(module, Linear) and module.fp8]
        for linear in self._linears:
            linear.keep_cast()

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts every weight, after they have changed. Not between a forward pass and its backward pass."""
        for linear in self._linears:
            linear.cast_weight()
