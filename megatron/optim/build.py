"""Optimizers from their section of the config, and their state as a flat dict of tensors with global names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from megatron.config.errors import CheckpointError
from megatron.config.schema import OptimizerSection
from megatron.optim.groups import parameter_groups

_WRITER = "another optimizer or another model wrote it"


def build_optimizer(parameters: Mapping[str, nn.Parameter], section: OptimizerSection) -> Optimizer:
    """AdamW (torch's fused kernel: one pass over weights, gradients and moments) or SGD with momentum.

    The learning rate is 0 until a step sets it.
    """
    groups = parameter_groups(parameters.items(), section.weight_decay)
    if section.name == "adamw":
        return AdamW(groups, lr=0.0, betas=section.betas, eps=section.eps, fused=True)
    return SGD(groups, lr=0.0, momentum=section.momentum)


def state_keys(section: OptimizerSection) -> tuple[str, ...]:
    """Names of the tensors that each parameter has after a step."""
    if section.name == "adamw":
        return ("exp_avg", "exp_avg_sq", "step")
    return ("momentum_buffer",) if section.momentum else ()


def flatten_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """ "<parameter>/<key>" -> the live tensor; empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, Tensor)
    }


def load_state(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    section: OptimizerSection,
    state: Mapping[str, Tensor],
) -> None:
    """Replaces the optimizer's state by copies of `state`; an empty mapping resets it.

    Raises CheckpointError for names that are missing or unknown, and for tensors of another shape; nothing is changed
    then.
    """
    fresh: dict[nn.Parameter, dict[str, Tensor]] = {}
    wanted = {f"{name}/{key}" for name in parameters for key in state_keys(section)} if state else set()
    if missing := sorted(wanted - state.keys()):
        raise CheckpointError(f"optimizer state lacks {_some(missing)}: {_WRITER}")
    if unknown := sorted(state.keys() - wanted):
        raise CheckpointError(f"optimizer state has unknown {_some(unknown)}: {_WRITER}")
    for place in sorted(wanted):
        name, key = place.rsplit("/", 1)
        parameter, value = parameters[name], state[place]
        shape = torch.Size() if key == "step" else parameter.shape
        dtype = torch.float32 if key == "step" else parameter.dtype
        if value.shape != shape or value.dtype != dtype:
            raise CheckpointError(
                f"optimizer state {place} is {value.dtype} {list(value.shape)}, the model needs {dtype} {list(shape)}"
            )
        fresh.setdefault(parameter, {})[key] = value.detach().to(parameter.device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(fresh)


def _some(names: list[str]) -> str:
    """A few of the names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
