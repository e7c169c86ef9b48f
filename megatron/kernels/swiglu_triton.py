"""Activations of the MLP in Triton, plain and gated: equal to `swiglu.py`, one kernel forward and one backward.

Every byte is read once and written once, and nothing but the inputs is kept. In bfloat16 an element of the gated form
takes 6 bytes forward (gate, up, out) and 10 backward (gate, up, gradient, both gradients), of the plain form 4 and 6.
For 16,384 tokens and an inner size of 14,336 the gated form's are 1.4 GB and 2.3 GB, limits of 328 us and 546 us at
4.3 TB/s. The eager definition rounds the activation before it multiplies; here all is computed in float32 (float64 for
float64) and rounded once.

A program takes BLOCK neighbouring elements of one row, 8 a thread; tensors without gaps between rows are taken as one
row, so that no program is ragged but the last. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.launch_triton import power_of_two, require_triton, warps_for
from megatron.kernels.swiglu import halves

_NAMES = ("silu", "gelu", "gelu_tanh")

_BLOCK = 1024
"""Elements of a program: with 4 warps 8 a thread, 16 bytes of bfloat16 a load."""


@triton.jit
def _activation(x, NAME: tl.constexpr):
    """Its value and its derivative at x, float32 or float64. No exponential's overflow makes either of them a NaN."""
    if NAME == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        value = x * s
        slope = s + value * (1.0 - s)
    elif NAME == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * s
        slope = s + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)); past 1000 it is 0 or 1 in any dtype, and a power of x could overflow
        near = tl.minimum(tl.maximum(x, -1000.0), 1000.0)
        square = near * near
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * near * (1.0 + 0.044715 * square)))
        value = x * s
        slope = s + value * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    return value, slope


@triton.jit
def _forward_kernel(
    gate, up, out, columns, blocks, gate_row, up_row, NAME: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = activation(gate) * up, or activation(gate) where up is None; rows of out have no gaps between them."""
    wide = tl.float64 if gate.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    y, _ = _activation(tl.load(gate + row * gate_row + at, mask=there, other=0.0).to(wide), NAME)
    if up is not None:
        y *= tl.load(up + row * up_row + at, mask=there, other=0.0).to(wide)
    tl.store(out + row * columns + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _backward_kernel(
    gate, up, grad, gate_grad, up_grad, columns, blocks, gate_row, up_row, grad_row, gate_grad_row, up_grad_row,
    NAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Recomputes the activation, and writes the gradient of gate, and of up where there is one."""
    wide = tl.float64 if gate.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    value, slope = _activation(tl.load(gate + row * gate_row + at, mask=there, other=0.0).to(wide), NAME)
    upstream = tl.load(grad + row * grad_row + at, mask=there, other=0.0).to(wide)
    if up is not None:
        tl.store(up_grad + row * up_grad_row + at, (upstream * value).to(up_grad.dtype.element_ty), mask=there)
        upstream *= tl.load(up + row * up_row + at, mask=there, other=0.0).to(wide)
    tl.store(gate_grad + row * gate_grad_row + at, (upstream * slope).to(gate_grad.dtype.element_ty), mask=there)


def _rows(tensor: Tensor) -> Tensor:
    """tensor [..., size] as rows [n, size] whose elements are neighbours; copied only where no view has them so."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _strides(rows: tuple[Tensor | None, ...]) -> tuple[int, int, list[int]]:
    """How many rows to take, of how many elements, and each tensor's step from row to row.

    One long row where no tensor has gaps: its step is not used, and 0 divides by the 16 that wide loads ask for.
    """
    given = [x for x in rows if x is not None]
    if all(x.is_contiguous() for x in given):
        return 1, given[0].numel(), [0] * len(rows)
    return *given[0].shape, [0 if x is None else x.stride(0) for x in rows]


def _block(columns: int) -> int:
    return min(_BLOCK, max(128, power_of_two(columns)))


def _run_forward(gate: Tensor, up: Tensor | None, name: str) -> Tensor:
    out = gate.new_empty(gate.shape)
    if not out.numel():
        return out
    gate_rows, up_rows = _rows(gate), None if up is None else _rows(up)
    rows, columns, (gate_row, up_row) = _strides((gate_rows, up_rows))
    block = _block(columns)
    blocks = triton.cdiv(columns, block)
    _forward_kernel[(rows * blocks,)](
        gate_rows, up_rows, out, columns, blocks, gate_row, up_row,
        NAME=name, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out


def _run_backward(
    gate: Tensor, up: Tensor | None, grad: Tensor, gate_grad: Tensor, up_grad: Tensor | None, name: str
) -> None:
    """Fills gate_grad and up_grad, of which rows may have gaps between them but views must have them as rows."""
    if not gate.numel():
        return
    gate_rows, up_rows, grad_rows = _rows(gate), None if up is None else _rows(up), _rows(grad)
    size = gate.shape[-1]
    outs = gate_grad.view(-1, size), None if up_grad is None else up_grad.view(-1, size)
    rows, columns, steps = _strides((gate_rows, up_rows, grad_rows, *outs))
    block = _block(columns)
    blocks = triton.cdiv(columns, block)
    _backward_kernel[(rows * blocks,)](
        gate_rows, up_rows, grad_rows, *outs, columns, blocks, *steps,
        NAME=name, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip


def _are_halves(gate: Tensor, up: Tensor) -> bool:
    """Whether they are the two halves, in this order, of the last dimension of one tensor."""
    inner, strides = gate.shape[-1], gate.stride()
    return (
        strides == up.stride()
        and strides[-1] == 1
        and (gate.dim() == 1 or strides[-2] == 2 * inner)
        and gate.storage_offset() + inner == up.storage_offset()
        and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    )


class _Gated(torch.autograd.Function):
    """Gated, or plain where up is None."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name, ctx.halves = name, up is not None and _are_halves(gate, up)
        return _run_forward(gate, up, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        if ctx.halves:
            gate_grad, up_grad = halves(gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1])))
        else:
            gate_grad, up_grad = gate.new_empty(gate.shape), None if up is None else up.new_empty(up.shape)
        _run_backward(gate, up, grad, gate_grad, up_grad, ctx.name)
        return gate_grad, up_grad, None


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.name = name
        return _run_forward(*halves(gate_up), name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        made = gate_up.new_empty(gate_up.shape)
        _run_backward(*halves(gate_up), grad, *halves(made), ctx.name)
        return made, None


def _check(x: Tensor, name: str) -> None:
    require_triton(x.device)
    if name not in _NAMES:
        raise KeyError(name)  # as the eager definition


def activate_triton(x: Tensor, name: str) -> Tensor:
    """`activate`: silu, gelu or gelu_tanh of x [..., f] of any strides; the result is contiguous."""
    _check(x, name)
    return _Gated.apply(x, None, name)


def gated_triton(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """`gated`: activation(gate) * up, both [..., f] of any strides; the result is contiguous.

    Where they are the two halves of one tensor [..., 2f], so are their gradients. Raises ValueError where their shapes
    or dtypes differ.
    """
    _check(gate, name)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up have one shape and dtype, not {list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        )
    return _Gated.apply(gate, up, name)


def gated_halves_triton(gate_up: Tensor, name: str) -> Tensor:
    """`gated_halves`: gate_up [..., 2f] of any strides, gate first, to [..., f], contiguous.

    Its gradient is one contiguous [..., 2f], as the fused projection's backward takes it. Raises ValueError where the
    last dimension is odd.
    """
    _check(gate_up, name)
    return _GatedHalves.apply(gate_up, name)
