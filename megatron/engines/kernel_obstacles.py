"""What of a set of kernels cannot run on this process, and why: asked of a config before anything is measured, and of a
choice that another process made or a checkpoint kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.kernels.attention_choice import AttentionCall, attention_obstacle
from megatron.kernels.matrix_product import onednn_obstacle

OPERATIONS = ("norm", "rope", "activation", "cross_entropy")
_INSIDE_LAYERS = ("norm", "rope", "activation")


@dataclass(frozen=True)
class Obstacle:
    """key, value: of [kernels]. reason: completes "cannot run here: ". instead: what to set the key to."""

    key: str
    value: str
    reason: str
    instead: str = "auto"

    def __str__(self) -> str:
        return f"kernels.{self.key} = {self.value} cannot run here: {self.reason}"


def obstacles(names: Mapping[str, Any], call: AttentionCall, no_compiling: str | None = None) -> Iterator[Obstacle]:
    """Every one, in the order of the keys.

    names: by key of [kernels], as asked for, where "auto" can run anywhere; or by field of `Kernels`, as chosen. call:
    what decides on this process. no_compiling: why the config allows no compiled layers; None where it does.
    """
    for operation in OPERATIONS:
        if why := backend_obstacle(names[operation], call.device):
            yield Obstacle(operation, names[operation], why)
    if names.get("product") == "onednn" and (why := onednn_obstacle()):
        yield Obstacle("product", "onednn", why, "torch")
    attention = names["attention"]
    if attention != "auto" and (why := attention_obstacle(attention, call)):
        yield Obstacle("attention", attention, why)
    compiled = names["compile_layers"] if "compile_layers" in names else names["compile"] == "layers"
    if compiled and (why := no_compiling or interpreted_obstacle(names)):
        yield Obstacle("compile", "layers", why, "none")
    for key in ("cuda_graphs", "fp8"):
        if names.get(key) and (why := _without_gpu(key, call.device)):
            yield Obstacle(key, "true", why, "false")


def backend_obstacle(backend: str, device: torch.device) -> str | None:
    """Why a backend ("eager", "compile", "triton") cannot run on a device; None where it can."""
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed (pip install triton; PyTorch's CUDA builds bring it)"
    from megatron.kernels import launch_triton

    if device.type != "cuda" and not launch_triton.INTERPRETED:
        return f"Triton kernels run on GPUs and the model is on {device.type} (TRITON_INTERPRET=1 tests them, slowly)"
    return None


def _without_gpu(key: str, device: torch.device) -> str | None:
    if key == "cuda_graphs":
        return None if device.type == "cuda" else f"it needs a GPU, and the model is on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    return f"it needs a GPU with 8-bit products (compute capability 8.9 or newer), and the model is on {device}"


def interpreted_obstacle(names: Mapping[str, Any]) -> str | None:
    """Why layers with these kernels cannot be compiled on this process; None where they can."""
    inside = [operation for operation in _INSIDE_LAYERS if names[operation] == "triton"]
    if not inside:
        return None
    from megatron.kernels import launch_triton

    if launch_triton.INTERPRETED:
        return f"Triton is interpreted (TRITON_INTERPRET=1), which a compiled layer cannot do with {', '.join(inside)}"
    return None
