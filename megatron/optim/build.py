"""Optimizers from their section of the config, over what one rank holds of the parameters.

Parameters are plain local tensors by global name: whole, or a rank's shards, which may be empty where a small tensor is
cut over many ranks. State lies beside its parameter, shard by shard, so that whatever says which box of the whole
tensor a shard is says the same of its state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.schema import OptimizerSection
from megatron.kernels.adamw import wide_dtype
from megatron.optim.apex_adam import ApexAdam
from megatron.optim.groups import is_layer_matrix, parameter_groups
from megatron.optim.muon import MuonAndAdamW
from megatron.optim.triton_adamw import TritonAdamW

_WRITER = "another optimizer or another model wrote it"
_ADAM_KEYS = ("exp_avg", "exp_avg_sq", "step")


def build_optimizer(
    parameters: Mapping[str, Tensor], section: OptimizerSection, cut: Collection[str] = ()
) -> Optimizer:
    """AdamW (torch's fused kernel: one pass over weights, gradients and moments; or apex's, or ours in Triton), Muon
    with AdamW, or SGD with momentum. The learning rate is 0 until a step sets it.

    parameters: local float32 or float64 tensors by global name, with `.grad` set before each step; for Triton's kernel
    also bfloat16 ones, the high halves of masters.
    cut: names of those that are parts of whole tensors; only Muon minds.
    Raises ConfigError where Muon would get a part of a matrix, UnavailableError where apex or Triton cannot run.
    """
    if section.name == "muon":
        _refuse_cut_matrices(parameters, cut)
        return MuonAndAdamW(parameters, section)
    groups = parameter_groups(parameters.items(), section.weight_decay)
    if section.name == "sgd":
        return SGD(groups, lr=0.0, momentum=section.momentum)
    if section.implementation == "apex":
        return ApexAdam(groups, section.betas, section.eps)
    if section.implementation == "triton":
        return TritonAdamW(groups, section.betas, section.eps)
    return AdamW(groups, lr=0.0, betas=section.betas, eps=section.eps, fused=True)


def describe_optimizer(section: OptimizerSection) -> str:
    """What runs, in words."""
    if section.name == "sgd":
        return f"SGD, momentum {section.momentum:g}" if section.momentum else "SGD"
    if section.name == "muon":
        return "torch's Muon for the matrices of layers, AdamW (torch's fused kernel) for the rest"
    kernels = {"torch": "torch's fused kernel", "apex": "apex's FusedAdam", "triton": "this project's Triton kernel"}
    split = ", masters in two halves" if section.master_weights == "split" else ""
    return f"AdamW, {kernels[section.implementation]}{split}"


def squares_of(section: OptimizerSection) -> Callable[[Sequence[Tensor], torch.device], Tensor] | None:
    """The sum of squares that goes with an optimizer: one launch, beside Triton's AdamW. None: any will do."""
    if (section.name, section.implementation) != ("adamw", "triton"):
        return None
    found: Callable[..., Tensor] = import_module("megatron.kernels.gradient_norm_triton").squared_norm_triton
    return found


def keeps_high_halves(section: OptimizerSection) -> bool:
    """Whether a bfloat16 copy of float32 masters is their high halves (`kernels/adamw.py`): Triton's AdamW writes it
    so, whether it keeps the masters whole or split.
    """
    return (section.name, section.implementation) == ("adamw", "triton")


def waits_for_no_numbers(section: OptimizerSection) -> bool:
    """Whether the optimizer takes `grad_scale` and `found_inf` as tensors, as torch's fused AdamW does: gradients are
    divided by the one as they are read, and nothing changes where the other is not 0.
    """
    return section.name == "adamw" and section.implementation in ("torch", "triton")


def state_keys(section: OptimizerSection, name: str, ndim: int) -> tuple[str, ...]:
    """Names of the tensors that a parameter has after a step. All are of its shape but "step", of none."""
    if section.name == "sgd":
        return ("momentum_buffer",) if section.momentum else ()
    if section.name == "muon" and is_layer_matrix(name, ndim):
        return ("momentum_buffer",)
    return _ADAM_KEYS


def flatten_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ "<parameter>/<key>" -> the live local tensor ("step": float32 of no dimension); empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, Tensor)
    }


def check_state_names(names: Iterable[str], parameters: Mapping[str, Tensor], section: OptimizerSection) -> None:
    """Raises CheckpointError for names "<parameter>/<key>" that are missing or unknown. No names at all reset.

    parameters: only names and numbers of dimensions are read.
    """
    given = set(names)
    if not given:
        return
    wanted = {f"{name}/{key}" for name, p in parameters.items() for key in state_keys(section, name, p.ndim)}
    if missing := sorted(wanted - given):
        raise CheckpointError(f"optimizer state lacks {_some(missing)}: {_WRITER}")
    if unknown := sorted(given - wanted):
        raise CheckpointError(f"optimizer state has unknown {_some(unknown)}: {_WRITER}")


def load_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], section: OptimizerSection, tensors: Mapping[str, Tensor]
) -> None:
    """Replaces the optimizer's state by copies of `tensors`, each of its parameter's local shape; an empty mapping
    resets it.

    Raises CheckpointError for names that are missing or unknown, and for tensors of another shape or dtype; nothing is
    changed then.
    """
    check_state_names(tensors, parameters, section)
    fresh: dict[Tensor, dict[str, Tensor]] = {}
    for place, value in sorted(tensors.items()):
        name, key = place.rsplit("/", 1)
        parameter = parameters[name]
        shape = torch.Size() if key == "step" else parameter.shape
        dtype = torch.float32 if key == "step" else wide_dtype(parameter)
        if value.shape != shape or value.dtype != dtype:
            raise CheckpointError(
                f"optimizer state {place} is {value.dtype} {list(value.shape)}, the model needs {dtype} {list(shape)}"
            )
        fresh.setdefault(parameter, {})[key] = value.detach().to(parameter.device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(fresh)


def _refuse_cut_matrices(parameters: Mapping[str, Tensor], cut: Collection[str]) -> None:
    """Muon makes each matrix's update orthogonal, and that of a part is not the part of that of the whole."""
    for name, parameter in parameters.items():
        if is_layer_matrix(name, parameter.ndim) and (name in cut or not parameter.numel()):
            raise ConfigError(
                f'optimizer.name "muon" needs whole matrices, and {name} is cut over ranks: set parallel.tensor = 1 '
                'and parallel.data_shard = "none", or use optimizer.name = "adamw"'
            )


def _some(names: list[str]) -> str:
    """A few of the names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
