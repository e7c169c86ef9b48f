"""DeepSpeed's gradient norm, watched and bounded: a step whose norm is beyond the bound is dropped as one whose norm is
not finite.

ZeRO 1 to 3 compute the norm inside `step()`, drop the step where it is infinite, and tell nobody before: so the
function that gives it is put behind one that shows an infinite norm instead of one beyond the bound. DeepSpeed then
frees gradients and keeps masters, moments and step counts, as it does on its own. The norm is that of all ranks: all
of them drop alike. Tried at the version that requirements/run.txt pins; a test per ZeRO stage holds it to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class BoundedNorm:
    """hidden: of the last step, the 2-norm of the whole gradient where an infinite one was shown instead; else None."""

    def __init__(self, optimizer: Any, of_tensors: Callable[..., Any]) -> None:
        """optimizer: DeepSpeed's own, around torch's. of_tensors: its get_global_norm_of_tensors."""
        self.hidden: float | None = None
        self._bound = math.inf
        self._scale = lambda: float(getattr(optimizer, "loss_scale", 1.0))
        if hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
            self._parts = optimizer._get_norm_groups
            optimizer._get_norm_groups = self._of_parts
        elif hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
            self._whole = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = self._of_whole
        else:  # ZeRO 1 in bf16, which takes a norm of the tensors that it is given here
            self._gradients = optimizer.get_grads_for_norm
            self._norm_of = lambda tensors: of_tensors(tensors, mpu=optimizer.mpu, norm_type=optimizer.norm_type)
            optimizer.get_grads_for_norm = self._of_gradients

    def at_most(self, bound: float) -> None:
        """The bound of the next step: infinite for none, minus infinite for a step that is to be dropped anyway."""
        self.hidden, self._bound = None, bound

    def _of_whole(self, *arguments: Any, **named: Any) -> Tensor:
        return self._shown([self._whole(*arguments, **named)])[0]

    def _of_parts(self) -> list[Tensor]:
        return self._shown(self._parts())

    def _of_gradients(self, for_clipping: bool = False) -> Any:
        given = self._gradients(for_clipping=for_clipping)
        if for_clipping or self._bound == math.inf:
            return given
        dense, experts = given
        if self._shown([norm := self._norm_of(dense)])[0] is norm:
            return given
        return [torch.full((1,), math.inf, device=tensor.device) for tensor in dense[:1]], experts

    def _shown(self, norms: list[Any]) -> list[Any]:
        """DeepSpeed marks a norm that is not finite as -1; those pass as they are."""
        if self._bound == math.inf:
            return norms
        values = [float(norm) for norm in norms]
        if all(math.isfinite(value) and value >= 0 for value in values):
            norm = math.sqrt(math.fsum(value * value for value in values)) / self._scale()
            if norm > self._bound:
                self.hidden = norm
                return [torch.full_like(torch.as_tensor(part), math.inf) for part in norms]
        return norms
