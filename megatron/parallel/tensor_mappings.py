"""Collectives of the tensor axis as autograd Functions, over tensors [batch, T, ...] cut along T or summed.

Megatron-LM's f and g (Shoeybi et al., arXiv 1909.08053, section 3) and, under sequence parallel, Korthikanti et al.'s
g and g-bar (arXiv 2205.05198, section 4.2.2). Everything is a no-op where the axis is alone. No Function changes what
it is given: results are fresh tensors, or the argument itself where nothing is to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron.kernels.collectives import all_gather, reduce_scatter
from megatron.kernels.matrix_product import Product, add_product, torch_product
from megatron.parallel.axis import Axis


class _Gather:
    """An all-gather along T that has been started; `whole` waits for it."""

    def __init__(self, part: Tensor, axis: Axis) -> None:
        self._shape, self._size = part.shape, axis.size
        self._buffer = part.new_empty(axis.size * part.shape[0], *part.shape[1:])
        self._part = part.contiguous()  # alive until the collective has read it
        self._work = all_gather(self._buffer, self._part, group=axis.group, async_op=True)

    def whole(self) -> Tensor:
        """[batch, T, ...], ranks' parts one after the other along T."""
        self._work.wait()
        batch, length, *rest = self._shape
        parts = self._buffer.view(self._size, batch, length, *rest)
        return parts.transpose(0, 1).reshape(batch, self._size * length, *rest)  # a view where batch is 1


class _Reduce:
    """A sum over the axis that has been started: of the whole, or of this rank's part of T; `result` waits for it."""

    def __init__(self, whole: Tensor, axis: Axis, sequence: bool) -> None:
        """whole must belong to the caller alone: it is summed in place where not sequence."""
        if not sequence:
            self._result = self._held = whole.contiguous()
            self._work = dist.all_reduce(self._result, group=axis.group, async_op=True)
            return
        batch, length = whole.shape[:2]
        part = _part_length(length, axis)
        ordered = whole.view(batch, axis.size, part, *whole.shape[2:]).transpose(0, 1).contiguous()
        self._held = ordered.view(axis.size * batch, part, *whole.shape[2:])
        self._result = whole.new_empty(batch, part, *whole.shape[2:])
        self._work = reduce_scatter(self._result, self._held, group=axis.group, async_op=True)

    def result(self) -> Tensor:
        self._work.wait()
        return self._result


def _part_length(length: int, axis: Axis) -> int:
    if length % axis.size:
        raise ValueError(f"a sequence of {length} positions cannot be cut over {axis.size} tensor ranks")
    return length // axis.size


def _own_part(whole: Tensor, axis: Axis) -> Tensor:
    part = _part_length(whole.shape[1], axis)
    return whole.narrow(1, axis.rank * part, part).contiguous()


def _sum(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    owned = x.contiguous() if sequence else x.clone(memory_format=torch.contiguous_format)
    return _Reduce(owned, axis, sequence).result()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.axis, ctx.sequence = axis, sequence
        return _Gather(x, axis).whole() if sequence else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum(grad, ctx.axis, ctx.sequence), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.axis, ctx.sequence = axis, sequence
        return _sum(x, axis, sequence)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather(grad, ctx.axis).whole() if ctx.sequence else grad, None, None


class _ScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _own_part(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather(grad, ctx.axis).whole(), None


class _GatherFromSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _Gather(x, axis).whole()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _own_part(grad, ctx.axis), None


def enter(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """x before weights that are cut by their outputs, whole on every rank; its gradient is the sum over ranks.

    Under sequence x [batch, T / size, ...] is gathered to [batch, T, ...] and the summed gradient cut again.
    """
    return x if axis.alone else _Enter.apply(x, axis, sequence)


def leave(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """The sum over ranks of x [batch, T, ...], behind weights that are cut by their inputs: the reverse of `enter`.

    Under sequence each rank keeps its part [batch, T / size, ...]. ValueError where T does not divide.
    """
    return x if axis.alone else _Leave.apply(x, axis, sequence)


def scatter_to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part [batch, T / size, ...] of x [batch, T, ...] that is the same on every rank.

    ValueError where T does not divide.
    """
    return x if axis.alone else _ScatterToSequence.apply(x, axis)


def gather_from_sequence(x: Tensor, axis: Axis) -> Tensor:
    """[batch, T, ...] of the ranks' parts, to be used alike on every rank: its gradient is the same on all of them."""
    return x if axis.alone else _GatherFromSequence.apply(x, axis)


class _GatheredLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Axis, sequence: bool, product: Product, count: int, *parameters: Tensor | None
    ) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x, *weights)
        ctx.axis, ctx.sequence, ctx.product = axis, sequence, product
        ctx.biased = [bias is not None for bias in biases]
        whole = _Gather(x, axis).whole() if sequence else x
        flat = whole.reshape(-1, whole.shape[-1])
        made = [product(flat, w.t()).view(*whole.shape[:-1], w.shape[0]) for w in weights if w is not None]
        return tuple(y if b is None else y.add_(b) for y, b in zip(made, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gather = _Gather(x, ctx.axis) if ctx.sequence else None
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        # The gather runs beside these products, the sum of their result beside those of the weights' gradients.
        x_grad = ctx.product(rows[0], weights[0])
        for grad, weight in zip(rows[1:], weights[1:], strict=True):
            x_grad = add_product(x_grad, grad, weight, ctx.product)
        summed = _Reduce(x_grad.view(*grads[0].shape[:-1], x.shape[-1]), ctx.axis, ctx.sequence)
        inputs = (x if gather is None else gather.whole()).reshape(-1, x.shape[-1])
        weight_grads = [ctx.product(grad.t(), inputs) for grad in rows]
        bias_grads = [grad.sum(0) if biased else None for grad, biased in zip(rows, ctx.biased, strict=True)]
        return summed.result(), None, None, None, None, *weight_grads, *bias_grads


def gathered_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    axis: Axis,
    sequence: bool,
    product: Product = torch_product,
) -> tuple[Tensor, ...]:
    """x W^T + b for each weight [outputs, inputs], cut by outputs, with x entering once: [batch, T, outputs] each.

    The same as `enter` and plain linear maps, but under sequence only this rank's part of x is kept for the backward
    pass, which gathers it again while it computes the gradient of x, and sums that gradient over the ranks while it
    computes those of the weights. It holds weights and collectives in one Function: not for split backward passes.
    """
    if axis.alone:
        return tuple(functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    return _GatheredLinears.apply(x, axis, sequence, product, len(weights), *weights, *biases)  # type: ignore[no-any-return]
