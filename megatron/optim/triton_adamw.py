"""AdamW by this project's Triton kernel: one launch that counts steps and one over all tensors (`adamw_triton.py`).

Nothing of a step waits for the GPU. Besides what torch's own AdamW does it can write the copy that computes in the same
pass, take gradients of another dtype than the parameters', clip them on the way, drop a step by a flag that only the
GPU knows, and step masters that are kept in two halves (`megatron/kernels/adamw.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron.config.errors import UnavailableError
from megatron.kernels.adamw import AdamWTensors, wide_dtype

_REMEDY = 'set optimizer.implementation to "torch"'


class TritonAdamW(Optimizer):
    """AdamW over tensors on one GPU. State as torch's AdamW has it: exp_avg, exp_avg_sq and step; the steps of all
    parameters that are updated together are views of one vector on the GPU.

    "lr" of a group is a number, or a tensor of one number on the GPU, which a CUDA graph reads anew at every replay.
    Parameters are float32 or float64; bfloat16 ones are the high halves of masters, whose low halves `in_halves` tells.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        """groups: parameters with their weight decay. Raises UnavailableError where Triton's kernels cannot run."""
        super().__init__(groups, {"lr": 0.0})
        self._adamw_step = _kernel({p.device.type for group in self.param_groups for p in group["params"]})
        self._betas, self._eps = betas, eps
        self._copies: dict[Tensor, Tensor] = {}
        self._lows: dict[Tensor, Tensor] = {}
        self._counts = torch.empty(0)
        self._views: list[Tensor] = []
        self._rates = torch.empty(0)

    def write_copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """From now on each step also writes the new parameters, rounded, into narrower tensors of their shapes."""
        self._copies = dict(copies)

    def in_halves(self, lows: Mapping[Tensor, Tensor]) -> None:
        """From now on these bfloat16 parameters are the high halves of masters, and the int16 tensors the low ones."""
        self._lows = dict(lows)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradients: Mapping[Tensor, Tensor] | None = None,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One update of the parameters that have a gradient; no closure is called.

        gradients: by parameter, instead of `.grad`; of any floating dtype. scale: one number on the GPU that they are
        multiplied by on the way. found_inf: one number on the GPU; where it is not zero nothing changes, steps neither.
        """
        parameters: list[Tensor] = []
        taken: list[Tensor] = []
        decays: list[float] = []
        spans: list[tuple[float | Tensor, int]] = []
        for group in self.param_groups:
            before = len(parameters)
            for parameter in group["params"]:
                gradient = parameter.grad if gradients is None else gradients.get(parameter)
                if gradient is not None:
                    parameters.append(parameter)
                    taken.append(gradient.contiguous())
                    decays.append(group["weight_decay"])
            spans.append((group["lr"], len(parameters) - before))
        if not parameters:
            return
        states = [self._state(parameter) for parameter in parameters]
        tensors = AdamWTensors(
            parameters,
            taken,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [self._copies.get(parameter) for parameter in parameters],
            [self._lows.get(parameter) for parameter in parameters],
        )
        steps, rates = self._counted(states, parameters[0].device), self._filled(spans, parameters[0].device)
        self._adamw_step(tensors, steps, rates, decays, self._betas, self._eps, scale, found_inf)

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=wide_dtype(parameter))
            state["step"] = torch.zeros((), device=parameter.device)
        return state

    def _counted(self, states: list[dict[str, Any]], device: torch.device) -> Tensor:
        """The states' steps as one vector, of which each is a view from now on."""
        held = [state["step"] for state in states]
        if len(held) != len(self._views) or any(a is not b for a, b in zip(held, self._views, strict=True)):
            self._counts = torch.stack([step.to(device) for step in held])
            self._views = list(self._counts.unbind())
            for state, view in zip(states, self._views, strict=True):
                state["step"] = view
        return self._counts

    def _filled(self, spans: list[tuple[float | Tensor, int]], device: torch.device) -> Tensor:
        """The learning rate of each parameter, float64, from (rate, number of parameters)."""
        count = sum(length for _, length in spans)
        if len(self._rates) != count:
            self._rates = torch.empty(count, dtype=torch.float64, device=device)
        for (rate, _), part in zip(spans, self._rates.split([length for _, length in spans]), strict=True):
            if isinstance(rate, Tensor):
                part.copy_(rate)
            else:
                part.fill_(rate)
        return self._rates


def _kernel(devices: set[str]) -> Callable[..., None]:
    """The step, or UnavailableError that says why it cannot run on tensors of these devices."""
    asked = 'optimizer.implementation "triton" cannot run:'
    if find_spec("triton") is None:
        raise UnavailableError(f"{asked} triton is not installed: pip install triton, or {_REMEDY}")
    interpreted: bool = import_module("megatron.kernels.launch_triton").INTERPRETED
    if outside := devices - ({"cuda", "meta", "cpu"} if interpreted else {"cuda", "meta"}):
        raise UnavailableError(f"{asked} its kernels run on GPUs, and weights are on {', '.join(outside)}; {_REMEDY}")
    step: Callable[..., None] = import_module("megatron.kernels.adamw_triton").adamw_step_triton
    return step
