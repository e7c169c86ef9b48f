"""The gradient of a weight W of y = x W^T in bfloat16, added in float32 to what is there by the product that makes it.

    sum [outputs, inputs] += grad [rows, outputs]^T x [rows, inputs]

Products are of bfloat16 numbers and exact in float32, sums are float32's, and nothing is rounded to bfloat16 in
between: a microbatch's gradient otherwise loses 16 of its 24 bits before it is added. A pass over the weights is saved
as well: the product reads and writes the sum, 8 bytes a parameter, where a bfloat16 gradient that is written, read and
added takes 12 (2 + 2 + 8). These are limits; nothing here was measured on a GPU.

On a GPU it is torch.addmm with `out_dtype`, which takes bfloat16 factors and a float32 sum since torch 2.10 (before,
the sum had to be of the factors' dtype); with beta 0 for the first gradient of a step, whose sum is not read. torch has
it on CUDA alone: elsewhere, as the definition, the factors are widened, which costs time and no accuracy.

Autograd is given no gradient of the weight, since it would ask for one of the weight's dtype: what it does with
gradients, hooks for example, does not see this one. Whether a sum was begun is a flag in host memory, so that asking
costs no wait, and that a compiled layer need not be another program for a step's first microbatch. In such a layer the
addition is an operation of its own (`stagemix::add_weight_gradient`), as torch 2.13 has no meta function for addmm with
another dtype and would take it apart into a product and an addition; inductor leaves it in the sum's own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class HasGradient(Protocol):
    """A parameter, or what stands for one."""

    grad: Tensor | None
    dtype: torch.dtype


def add_weight_gradient(total: Tensor, fresh: Tensor, grad: Tensor, x: Tensor) -> None:
    """total [outputs, inputs] += grad^T x in float32, or = where it is fresh, which it is no more then.

    total float32, contiguous; fresh bool, of no dimension, on the CPU; grad [rows, outputs] and x [rows, inputs] of one
    dtype, of any strides. ValueError where they do not fit.
    """
    if torch.compiler.is_compiling():
        _operation(total, fresh, grad, x)
    else:
        _add(total, fresh, grad, x)


def _add(total: Tensor, fresh: Tensor, grad: Tensor, x: Tensor) -> None:
    shape = (grad.shape[-1], x.shape[-1])
    if total.dtype != torch.float32 or grad.dtype != x.dtype or tuple(total.shape) != shape:
        raise ValueError(
            f"a sum {total.dtype} {list(total.shape)} of gradients {grad.dtype} {list(grad.shape)} and inputs "
            f"{x.dtype} {list(x.shape)}: the sum is float32 {list(shape)}, and both are of one dtype"
        )
    beta = 0 if bool(fresh) else 1
    if total.is_cuda and grad.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(grad.t().float(), x.float(), beta=beta)
    fresh.fill_(False)


_operation = torch.library.custom_op(
    "stagemix::add_weight_gradient",
    _add,
    mutates_args=("total", "fresh"),
    schema="(Tensor(a!) total, Tensor(b!) fresh, Tensor grad, Tensor x) -> ()",
)
_operation.register_fake(lambda total, fresh, grad, x: None)


class MainGradient:
    """The float32 gradient of one weight, or of several that lie behind one another in their outputs, as joined
    projections' do. `grad` is the whole, from `prepare` on; each holder's `.grad` its part of the rows, from
    `hand_out` on. Whoever drops gradients sets `grad` and the holders' to None.
    """

    def __init__(self, holders: Sequence[HasGradient], weights: Sequence[Tensor]) -> None:
        """holders: of the sums, by weight [outputs, inputs]."""
        self.grad: Tensor | None = None
        self._fresh = torch.ones((), dtype=torch.bool, device="cpu")
        self._holders, self._outputs = tuple(holders), [weight.shape[0] for weight in weights]
        self._inputs, self._device = weights[0].shape[1], weights[0].device

    def prepare(self) -> None:
        """Gives the sum memory where it has none; before a forward pass whose backward pass adds to it."""
        if self.grad is None:
            self.grad = torch.empty(sum(self._outputs), self._inputs, dtype=torch.float32, device=self._device)
            self._fresh.fill_(True)

    def place(self) -> tuple[Tensor, Tensor]:
        """The sum and whether it is fresh, as `add_weight_gradient` wants them."""
        assert self.grad is not None, "prepare() was not called before the forward pass"
        return self.grad, self._fresh

    def hand_out(self) -> None:
        """Shows the holders their gradients, where one was added."""
        if self.grad is None or bool(self._fresh):
            return
        for holder, part in zip(self._holders, self.grad.split(self._outputs), strict=True):
            holder.grad = part


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor, fresh: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, total, fresh)
        ctx.biased = bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, total, fresh = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        x_grad = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            add_weight_gradient(total, fresh, rows, x.reshape(-1, x.shape[-1]))
        return x_grad, None, rows.sum(0) if ctx.biased else None, None, None


def linear_into(x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor, fresh: Tensor) -> Tensor:
    """x W^T + b, whose backward pass adds the weight's gradient to `total` (`add_weight_gradient`) and gives autograd
    none for it."""
    return _Linear.apply(x, weight, bias, total, fresh)  # type: ignore[no-any-return]
