"""LayerNorm in Triton, alone and after a residual addition: equal to `layer_norm.py`.

It moves the bytes of RMSNorm (`rms_norm_triton.py` counts them and gives the limits), keeps 8 bytes a row for the
backward pass instead of 4, and writes partial sums for the bias's gradient beside those for the weight's. A row's
variance is taken around its mean, from the row held in registers, so that nothing cancels. For rows of more than 8192
elements (4096 in float32) the backward pass reads gradient and x twice: 12 bytes an element of bfloat16 after an
addition, not 8.

The eager definition rounds the gradient of the sum twice in half precision, where both results are used; here it is
rounded once. The kernels are in `row_norm_triton.py` and `row_norm_backward_triton.py`. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.rms_norm import require_alike
from megatron.kernels.row_norm_backward_triton import row_norm_gradients
from megatron.kernels.row_norm_triton import row_norm


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        normed, _, mean, inverse = row_norm(x, None, weight, bias, eps, centres=True)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        return *row_norm_gradients(grad, None, *ctx.saved_tensors), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, summed, mean, inverse = row_norm(x, branch, weight, bias, eps, centres=True)
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
        sum_grad, weight_grad, bias_grad = row_norm_gradients(grad, onward, *ctx.saved_tensors)
        return sum_grad, sum_grad, weight_grad, bias_grad, None


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `layer_norm`: x [..., size] over its last dimension, times weight, plus bias [size] where there is one; the
    result has the dtype of x.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


def add_layer_norm_triton(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As `add_layer_norm`: (normed, summed) of x and branch, alike; summed = x + branch, normed the norm of it."""
    require_alike(x, branch)
    return _AddLayerNorm.apply(x, branch, weight, bias, eps)
