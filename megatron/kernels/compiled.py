"""Plain formulas of the elementwise operations and norms, fused by torch.compile: the backend "compile".

The eager definitions next door are autograd Functions that keep little; the compiler finds what to keep by itself, and
inside a layer that is compiled as a whole these are fused with their neighbours. Statistics are wide, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron.kernels import swiglu
from megatron.kernels.rope import RopeTable

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(formula: F) -> F:
    """Compiled at its first call. A second length of sequences makes the program one for any length, so that a run
    whose lengths change compiles twice and no more."""
    return torch.compile(formula, dynamic=None)  # type: ignore[no-any-return, call-overload]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(_wide(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * inverse * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


@_compiled
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm.rms_norm`."""
    return _rms(x, weight, eps)


@_compiled
def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm.add_rms_norm`."""
    summed = x + branch
    return _rms(summed, weight, eps), summed


@_compiled
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `layer_norm.layer_norm`."""
    return _layer(x, weight, bias, eps)


@_compiled
def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """As `layer_norm.add_layer_norm`."""
    summed = x + branch
    return _layer(summed, weight, bias, eps), summed


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    part = x[..., :rotary]
    turned = part * cos + torch.cat((part[..., half:], part[..., :half]), -1) * sin
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), -1)


@_compiled
def _rope_qk(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turn(query, cos, sin).contiguous(), _turn(key, cos, sin).contiguous()


def rope_qk(query: Tensor, key: Tensor, table: RopeTable) -> tuple[Tensor, Tensor]:
    """As `rope.rope_qk`."""
    return _rope_qk(query, key, table.cos, table.sin)


@_compiled
def activate(x: Tensor, name: str) -> Tensor:
    """As `swiglu.activate`."""
    return swiglu.activate(x, name)


@_compiled
def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """As `swiglu.gated`."""
    return swiglu.activate(gate, name) * up


@_compiled
def gated_halves(gate_up: Tensor, name: str) -> Tensor:
    """As `swiglu.gated_halves`."""
    gate, up = gate_up.chunk(2, -1)
    return swiglu.activate(gate, name) * up
