"""Layer norm (Ba, Kiros and Hinton, arXiv 1607.06450): y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, or
without a bias.

Statistics, products and sums are taken in float32 at least, whatever the dtype of x, by torch's own kernels. Beside
weights of bfloat16 they would keep each row's statistics in bfloat16, and on CPU they sum the gradients of weight and
bias in the dtype of the rows (3 % off for 512 rows of bfloat16): so weights are always widened, and rows wherever that
matters. In bfloat16 (4096 x 256) forward and backward took 1.4 ms of one thread, and `functional.layer_norm` with
weights cast to bfloat16, which errs so as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.rms_norm import require_alike


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm in x's dtype, and of each row the mean and the reciprocal of its deviation, [..., 1] and wide."""
    wide = _wide(x.dtype)
    # on CPU the kernel reads narrow rows beside wide weights, and computes wide; others ask for one dtype
    source = x if x.device.type == "cpu" or x.dtype == wide else x.to(wide)
    shift = None if bias is None else bias.to(wide)
    out, mean, inverse = torch.native_layer_norm(source, weight.shape, weight.to(wide), shift, eps)
    # see rms_norm.py: a cast to the same dtype would give `out` itself, and torch 2.11 lose its gradient
    return out if out.dtype == x.dtype else out.to(x.dtype), mean, inverse


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, inverse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of x, still wide, and of weight and bias in their dtypes, by that of the norm."""
    wide = mean.dtype
    shift = None if bias is None else bias.to(wide)
    x_grad, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), x.to(wide), weight.shape, mean, inverse, weight.to(wide), shift, [True, True, bias is not None]
    )
    return x_grad, weight_grad.to(weight.dtype), None if bias is None else bias_grad.to(bias.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        normed, mean, inverse = _normed(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x_grad, weight_grad, bias_grad = _gradients(*ctx.saved_tensors, grad)
        return x_grad.to(grad.dtype), weight_grad, bias_grad, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        summed = x + branch
        normed, mean, inverse = _normed(summed, weight, bias, eps)
        ctx.save_for_backward(summed, weight, bias, mean, inverse)
        ctx.set_materialize_grads(False)
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, onward: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return onward, onward, None, None, None
        sum_grad, weight_grad, bias_grad = _gradients(*ctx.saved_tensors, grad)
        sum_grad = sum_grad.to(grad.dtype)
        if onward is not None:
            sum_grad.add_(onward)
        return sum_grad, sum_grad, weight_grad, bias_grad, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., size] over its last dimension, times weight [size], plus bias [size] where there is one; the result has
    the dtype of x."""
    return _LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, summed) of x and branch, both [..., size] and of one dtype: summed = x + branch, rounded to their dtype,
    is the residual stream that goes on, and normed = layer_norm(summed). ValueError where shapes or dtypes differ.

    Results and gradients are those of the addition and the norm one after the other, bit for bit.
    """
    require_alike(x, branch)
    return _AddLayerNorm.apply(x, branch, weight, bias, eps)
