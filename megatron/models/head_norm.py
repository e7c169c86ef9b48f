"""Norms of queries and keys, between their projections and their turning: of each head, or of all heads at once.

Of each head (Qwen3, Gemma 3) one weight serves all of them, so that each tensor rank's gradient is a part of a sum. Of
all heads at once (OLMo 2) the mean square is over what several tensor ranks hold: their sums of squares are added up,
those of queries and keys in one message, and each rank scales its own heads by its own part of the weight. What holds
the collective holds no weight, as schedules that run input and weight gradients apart need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.config.model_shape import ModelShape
from megatron.kernels.choice import Kernels, norms
from megatron.models.layers import norm_weight
from megatron.parallel.axis import Axis
from megatron.parallel.model_place import ModelPlace, ParameterCut


class HeadNorm(nn.Module):
    """RMSNorm of one projection's heads, by the shape's `qk_norm`: weight [head_dim] or [all heads' width]."""

    def __init__(self, shape: ModelShape, heads: int, kernels: Kernels, place: ModelPlace) -> None:
        """heads: of the whole projection, which are cut over the tensor ranks, or held by all where they are fewer."""
        super().__init__()
        ranks, size = place.tensor.size, shape.head_dim
        self.each, self.size, self.eps, self.unit_offset = (
            shape.qk_norm == "head",
            size,
            shape.norm_eps,
            shape.norm_unit_offset,
        )
        self.used: slice | None = None  # of a weight that holds more than this rank's heads
        held, cut = size, ParameterCut(None, partial=not place.tensor.alone)
        if not self.each and heads >= ranks:
            held, cut = heads * size // ranks, ParameterCut(0)
        elif not self.each:
            held, head = heads * size, place.tensor.rank * heads // ranks
            self.used = slice(head * size, (head + 1) * size)
        self.weight = nn.Parameter(torch.empty(held))
        self.cuts = {"weight": cut}
        self.rms_norm = norms(kernels.norm).rms_norm

    def scale(self) -> Tensor:
        """What this rank's normed heads are multiplied by."""
        own = self.weight if self.used is None else self.weight[self.used]
        return norm_weight(own, self.unit_offset)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, T, heads here * head_dim], normed by what is here: all of it where no tensor ranks share heads."""
        if not self.each:
            return self.rms_norm(x, self.scale(), self.eps)
        return self.rms_norm(x.unflatten(-1, (-1, self.size)), self.scale(), self.eps).flatten(-2)


def normed_heads(parts: Sequence[Tensor], modules: Sequence[HeadNorm], axis: Axis) -> list[Tensor]:
    """Each of the projections [batch, T, heads here * head_dim] by its norm."""
    if axis.alone or modules[0].each:
        return [module(part) for part, module in zip(parts, modules, strict=True)]
    inverses = _InverseRoots.apply(axis, modules[0].eps, *parts)
    return [
        _Scaled.apply(part, inverse, module.scale())
        for part, inverse, module in zip(parts, inverses.split(1, -1), modules, strict=True)
    ]


class _InverseRoots(torch.autograd.Function):
    """1 / sqrt(mean(x^2) + eps) of each row of each x [batch, T, width here], over all ranks' widths: [batch, T, one
    for each x], float32 at least. Where ranks hold the same heads, the mean counts each head as often as all others.
    """

    @staticmethod
    def forward(ctx: Any, axis: Axis, eps: float, *parts: Tensor) -> Tensor:
        wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        squares = [torch.linalg.vector_norm(x, dim=-1, dtype=wide).square_() / (x.shape[-1] * axis.size) for x in parts]
        means = torch.stack(squares, -1)
        dist.all_reduce(means, group=axis.group)
        inverse = means.add_(eps).rsqrt_()
        ctx.save_for_backward(inverse, *parts)
        ctx.axis = axis
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, *parts = ctx.saved_tensors
        # Every rank scales by the same mean, so that its slope is the sum of all ranks'.
        slopes = grad * inverse.pow(3)
        dist.all_reduce(slopes, group=ctx.axis.group)
        back = [
            (x * (slope / -(x.shape[-1] * ctx.axis.size))).to(x.dtype)
            for x, slope in zip(parts, slopes.split(1, -1), strict=True)
        ]
        return None, None, *back


class _Scaled(torch.autograd.Function):
    """x [batch, T, width] * inverse [batch, T, 1] * weight [width], rounded once to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, inverse, weight)
        return (x.to(inverse.dtype) * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, inverse, weight = ctx.saved_tensors
        upstream = grad.to(inverse.dtype)
        product = upstream * x
        along = (product.reshape(-1, x.shape[-1]) @ weight.to(inverse.dtype)).view_as(inverse)
        weight_grad = (product * inverse).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return (upstream * weight).mul_(inverse).to(grad.dtype), along, weight_grad
