"""RMSNorm in Triton, alone and after a residual addition: equal to `rms_norm.py`.

Every byte of rows is read once and written once. In bfloat16 an element takes 4 bytes forward and 6 backward (gradient,
x, its gradient), and after an addition 8 and 8 (x, branch, sum, norm; both gradients, sum, its gradient), where the
addition, the norm and the addition of gradients in kernels of their own would move 10 and 12. For 16,384 tokens and a
hidden size of 4096 that is 268 and 403 MB, limits of 62 and 94 us at 4.3 TB/s, and after an addition 537 MB each way,
limits of 125 us. Besides, 4 bytes a row are kept for the backward pass, and each of its programs (264 on an H200 at
this size) writes a row of float32 that is read again: 9 MB in all. Rows of more than 16,384 elements (8192 in float32)
are read twice, backward, and those of more than 16,384 also forward.

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


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, _, _, inverse = row_norm(x, None, weight, None, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        x_grad, weight_grad, _ = row_norm_gradients(grad, None, x, weight, None, None, inverse)
        return x_grad, weight_grad, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, summed, _, inverse = row_norm(x, branch, weight, None, eps)
        ctx.save_for_backward(summed, weight, inverse)
        ctx.set_materialize_grads(False)
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, onward: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return onward, onward, None, None
        summed, weight, inverse = ctx.saved_tensors
        sum_grad, weight_grad, _ = row_norm_gradients(grad, onward, summed, weight, None, None, inverse)
        return sum_grad, sum_grad, weight_grad, None


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm`: x [..., size] over its last dimension, times weight [size]; the result has the dtype of x."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm_triton(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`: (normed, summed) of x and branch, alike; summed = x + branch, normed = rms_norm(summed)."""
    require_alike(x, branch)
    return _AddRMSNorm.apply(x, branch, weight, eps)
