"""The one door to NVIDIA apex: AdamW by its FusedAdam, whose state is kept under torch's names.

Two packages are called apex, and the one on PyPI is another's; which of them is installed is told by what is inside.
Written against apex's sources of July 2026; no machine of the project's tests has it installed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron.config.errors import CheckpointError, ConfigError, UnavailableError

_REMEDY = (
    "install NVIDIA's from its sources (git clone https://github.com/NVIDIA/apex; in it: APEX_CPP_EXT=1 "
    'APEX_CUDA_EXT=1 pip install -v --no-build-isolation .), or set optimizer.implementation = "torch"'
)


class ApexAdam(Optimizer):
    """FusedAdam in its decoupled mode over float32 tensors on a GPU. State as torch's AdamW has it: exp_avg,
    exp_avg_sq and step, the last on the CPU.

    FusedAdam counts steps by group, so this object owns the count of each parameter, and sets the group's before each
    step. It is given no empty tensors: its kernel is launched at a list's last chunk, and where the last tensor is
    empty, hence without chunks, tensors before it would be left as they were, without an error.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        """groups: parameters with their weight decay. Raises UnavailableError where apex cannot run here, ConfigError
        for parameters that are not float32."""
        fused_adam = _fused_adam()
        for dtype in {p.dtype for group in groups for p in group["params"]} - {torch.float32}:
            raise ConfigError(
                f'optimizer.implementation "apex" updates float32 weights, and these are {dtype}: set train.precision '
                'to bf16 or fp32, or optimizer.implementation to "torch"'
            )
        super().__init__(groups, {"lr": 0.0})
        self._pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        full = [(group, [p for p in group["params"] if p.numel()]) for group in self.param_groups]
        full = [(group, parameters) for group, parameters in full if parameters]
        self._fused = None
        if full:
            inner = [{"params": parameters, "weight_decay": group["weight_decay"]} for group, parameters in full]
            self._fused = fused_adam(inner, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)
            self._fused.state = self.state
            self._pairs = [(mine, its) for (mine, _), its in zip(full, self._fused.param_groups, strict=True)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of the parameters that have a gradient; no closure is called."""
        counted = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in counted:
            state = self.state[parameter]
            if not state:
                state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                state["step"] = torch.zeros(())
            state["step"] = state["step"].cpu()
        for mine, its in self._pairs:
            its["lr"], its["step"] = mine["lr"], self._steps_of(its["params"])
        if self._fused is not None:
            self._fused.step()
        torch._foreach_add_([self.state[p]["step"] for p in counted], 1)

    def _steps_of(self, parameters: list[Tensor]) -> int:
        steps = {int(self.state[p]["step"]) for p in parameters if p.grad is not None}
        if len(steps) > 1:
            raise CheckpointError(
                f"optimizer state has parameters after {min(steps)} and after {max(steps)} steps, and apex's FusedAdam "
                'counts them together: set optimizer.implementation = "torch"'
            )
        return steps.pop() if steps else 0


def _fused_adam() -> Any:
    """The class, or UnavailableError that says which of its parts is not there."""
    asked = 'optimizer.implementation "apex" cannot run:'
    if find_spec("apex") is None:
        raise UnavailableError(f"{asked} NVIDIA apex is not installed (PyPI's apex is another package): {_REMEDY}")
    try:
        fused_adam = import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise UnavailableError(
            f"{asked} the apex that is installed has no apex.optimizers.FusedAdam ({error}); PyPI's apex is another "
            f"package of that name: pip uninstall apex, then {_REMEDY}"
        ) from None
    try:
        import_module("amp_C")
    except ImportError as error:
        raise UnavailableError(
            f"{asked} NVIDIA apex is installed without its CUDA extension amp_C ({error}): {_REMEDY}"
        ) from None
    if not _has_gpu():
        raise UnavailableError(f'{asked} there is no GPU here; set optimizer.implementation = "torch"')
    return fused_adam


def _has_gpu() -> bool:
    return torch.cuda.is_available()
