"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's convention.

Dimension i of the first half of the turned part pairs with dimension i of its second half; the angle of pair i at
position p is p * theta^(-2i / rotary_dim). Dimensions behind rotary_dim pass unchanged (GPT-NeoX).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of every position's angles, [batch, 1, T, 1, rotary_dim]; sin carries the sign of its half."""

    cos: Tensor
    sin: Tensor


def rope_table(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> RopeTable:
    """Angles for positions [batch, T] (int64). Computed in float32, or float64 for float64; then cast to dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, rotary_dim, 2, dtype=wide, device=positions.device) / rotary_dim
    angles = positions[:, None, :, None, None].to(wide) * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return RopeTable(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A contiguous copy of x with its leading dimensions turned."""
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    x = x.contiguous()
    turned = x[..., :rotary]
    swapped = torch.cat((turned[..., half:], turned[..., :half]), -1)
    turned = (turned * cos).addcmul_(swapped, sin)
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), -1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None  # a rotation's transpose is the rotation back


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Turns x [batch, groups, T, heads, head_dim] (any strides) and returns it contiguous."""
    return _Rope.apply(x, table.cos, table.sin)
