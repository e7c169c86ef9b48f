"""Masked softmax in Triton: equal to `masked_softmax.py`, each visible score read once and each weight written once.

A row of up to 16,384 keys stays in registers between its maximum, its sum and its weights; longer rows are read twice,
in chunks. What a span leaves out is not read, so under causality the forward pass moves 3 bytes a score in bfloat16
(half are read, all written) and the backward pass, which reads two tensors, 4. For 4 sequences of 4,096 tokens and 32
heads, 2.1e9 scores, those are limits of 1.5 ms and 2.0 ms at 4.3 TB/s. Short rows are taken several to a program. In
place (`softmax_into_triton`, `softmax_gradient_into_triton`) it moves the same and saves a copy's memory. Not measured
on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from megatron.kernels.launch_triton import power_of_two, require_triton
from megatron.kernels.masked_softmax import InPlaceSoftmax, Span, check_span, five

ROW = 16384
"""Keys of the longest row that one program holds in registers."""

_CHUNK = 4096
"""Keys at a time of a longer one."""

_TILE = 2048
"""Scores of a program that takes several short rows."""


@triton.jit
def _shown(row, there, keys, heads, queries, groups, first, end, span_batch):
    """The stretch [low, high) of keys that rows see by their span; row = ((batch * groups + group) * queries + query) *
    heads + head.
    """
    if first is None:
        low = tl.zeros_like(row)
        high = low + keys
    else:
        at = (row // (heads * queries * groups)) * span_batch + (row // heads) % queries
        low = tl.maximum(tl.load(first + at, mask=there, other=0), 0)
        high = tl.minimum(tl.load(end + at, mask=there, other=0), keys)
    return low, high


@triton.jit
def _see(
    row, there, column, keys, low, high, heads, queries, groups, mask, mask_0, mask_1, mask_2, mask_3, mask_4
):  # fmt: skip
    """Which columns rows see, and which are loaded for that: whole runs of 16, or loads would not be 16 bytes wide. All
    but column [1, BLOCK] are [ROWS, 1], or numbers of one row and column [BLOCK].
    """
    inside = there & (column < keys)
    loaded = inside & (column >= low // 16 * 16) & (column < (high + 15) // 16 * 16)
    visible = inside & (column >= low) & (column < high)
    if mask is not None:
        query = ((row // heads) % queries).to(tl.int64)
        group = ((row // (heads * queries)) % groups).to(tl.int64)
        batch = (row // (heads * queries * groups)).to(tl.int64)
        at = batch * mask_0 + group * mask_1 + query * mask_2 + (row % heads).to(tl.int64) * mask_3
        visible = visible & (tl.load(mask + at + column.to(tl.int64) * mask_4, mask=loaded, other=0) != 0)
    return loaded, visible


@triton.jit
def _forward_rows(
    scores, out, rows, keys, heads, queries, groups, first, end, span_batch,
    mask, mask_0, mask_1, mask_2, mask_3, mask_4,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    wide = tl.float64 if scores.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low, high = _shown(row, row < rows, keys, heads, queries, groups, first, end, span_batch)
    row, column = row[:, None], tl.arange(0, BLOCK)[None, :]
    there = row < rows
    loaded, visible = _see(
        row, there, column, keys, low[:, None], high[:, None], heads, queries, groups,
        mask, mask_0, mask_1, mask_2, mask_3, mask_4,
    )  # fmt: skip
    at = row.to(tl.int64) * keys + column
    x = tl.where(visible, tl.load(scores + at, mask=loaded, other=0.0).to(wide) * SCALE, float("-inf"))
    highest = tl.max(x, 1)
    weights = tl.exp(x - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    total = tl.sum(weights, 1)
    weights = weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(out + at, weights.to(out.dtype.element_ty), mask=there & (column < keys))


@triton.jit
def _backward_rows(
    weights, grad, out, rows, keys, heads, queries, groups, first, end, span_batch,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program. A bool mask needs no telling: the weights are 0 where it hides."""
    wide = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low, high = _shown(row, row < rows, keys, heads, queries, groups, first, end, span_batch)
    row, column = row[:, None], tl.arange(0, BLOCK)[None, :]
    there = row < rows
    loaded, visible = _see(
        row, there, column, keys, low[:, None], high[:, None], heads, queries, groups, None, 0, 0, 0, 0, 0
    )  # fmt: skip
    at = row.to(tl.int64) * keys + column
    w = tl.load(weights + at, mask=loaded, other=0.0).to(wide)
    product = tl.where(visible, w * tl.load(grad + at, mask=loaded, other=0.0).to(wide), 0.0)
    slopes = (product - w * tl.sum(product, 1)[:, None]) * SCALE
    tl.store(out + at, slopes.to(out.dtype.element_ty), mask=there & (column < keys))


@triton.jit
def _forward_long(
    scores, out, keys, heads, queries, groups, first, end, span_batch,
    mask, mask_0, mask_1, mask_2, mask_3, mask_4, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867), then the weights."""
    wide = tl.float64 if scores.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0)
    begin = row.to(tl.int64) * keys
    low, high = _shown(row, row >= 0, keys, heads, queries, groups, first, end, span_batch)
    highest = tl.full([], float("-inf"), wide)
    shift = tl.full([], 0.0, wide)
    total = tl.full([], 0.0, wide)
    for start in range(low // BLOCK * BLOCK, high, BLOCK):
        column = start + tl.arange(0, BLOCK)
        loaded, visible = _see(
            row, row >= 0, column, keys, low, high, heads, queries, groups,
            mask, mask_0, mask_1, mask_2, mask_3, mask_4,
        )  # fmt: skip
        x = tl.load(scores + begin + column, mask=loaded, other=0.0).to(wide) * SCALE
        x = tl.where(visible, x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift), 0)
        highest = higher
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    for start in range(0, keys, BLOCK):
        column = start + tl.arange(0, BLOCK)
        loaded, visible = _see(
            row, row >= 0, column, keys, low, high, heads, queries, groups,
            mask, mask_0, mask_1, mask_2, mask_3, mask_4,
        )  # fmt: skip
        x = tl.load(scores + begin + column, mask=loaded, other=0.0).to(wide) * SCALE
        weights = tl.exp(tl.where(visible, x, float("-inf")) - shift) * inverse
        tl.store(out + begin + column, weights.to(out.dtype.element_ty), mask=column < keys)


@triton.jit
def _backward_long(
    weights, grad, out, keys, heads, queries, groups, first, end, span_batch,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: the sum over it, then the gradient."""
    wide = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0)
    begin = row.to(tl.int64) * keys
    low, high = _shown(row, row >= 0, keys, heads, queries, groups, first, end, span_batch)
    total = tl.full([], 0.0, wide)
    for start in range(low // BLOCK * BLOCK, high, BLOCK):
        column = start + tl.arange(0, BLOCK)
        loaded, visible = _see(
            row, row >= 0, column, keys, low, high, heads, queries, groups, None, 0, 0, 0, 0, 0
        )  # fmt: skip
        w = tl.load(weights + begin + column, mask=loaded, other=0.0).to(wide)
        g = tl.load(grad + begin + column, mask=loaded, other=0.0).to(wide)
        total += tl.sum(tl.where(visible, w * g, 0.0), 0)
    for start in range(0, keys, BLOCK):
        column = start + tl.arange(0, BLOCK)
        loaded, visible = _see(
            row, row >= 0, column, keys, low, high, heads, queries, groups, None, 0, 0, 0, 0, 0
        )  # fmt: skip
        w = tl.load(weights + begin + column, mask=loaded, other=0.0).to(wide)
        g = tl.load(grad + begin + column, mask=loaded, other=0.0).to(wide)
        slopes = (tl.where(visible, w * g, 0.0) - w * total) * SCALE
        tl.store(out + begin + column, slopes.to(out.dtype.element_ty), mask=column < keys)


def _span_arguments(span: Span | None, shape: torch.Size) -> tuple[Tensor | None, Tensor | None, int]:
    if span is None:
        return None, None, 0
    check_span(span, shape)
    return span.first.contiguous(), span.end.contiguous(), 0 if span.first.shape[0] == 1 else span.first.shape[1]


def _mask_arguments(mask: Tensor | None, shape: torch.Size) -> tuple[Tensor | int | None, ...]:
    if mask is None:
        return None, 0, 0, 0, 0, 0
    whole = mask.expand(shape)
    whole = whole.unsqueeze(3) if len(shape) == 4 else whole
    return whole.view(torch.uint8), *whole.stride()


def _rows_and_warps(keys: int) -> tuple[int, int, int]:
    """(rows a program, BLOCK, warps) for rows that stay in registers: at most 32 scores a thread."""
    block = power_of_two(keys)
    rows = max(1, _TILE // block)
    return rows, block, min(16, max(4, rows * block // 1024))


def _forward(scores: Tensor, out: Tensor, scale: float, span: Span | None, mask: Tensor | None) -> None:
    require_triton(scores.device)
    _, groups, queries, heads, keys = five(scores.shape)
    if scores.numel() == 0:
        return
    rows = scores.numel() // keys
    told = (keys, heads, queries, groups, *_span_arguments(span, scores.shape), *_mask_arguments(mask, scores.shape))
    if keys > ROW:
        _forward_long[(rows,)](scores, out, *told, SCALE=scale, BLOCK=_CHUNK, num_warps=8)
        return
    each, block, warps = _rows_and_warps(keys)
    _forward_rows[(triton.cdiv(rows, each),)](
        scores, out, rows, *told, SCALE=scale, ROWS=each, BLOCK=block, num_warps=warps
    )


def _backward(weights: Tensor, grad: Tensor, out: Tensor, scale: float, span: Span | None) -> None:
    require_triton(grad.device)
    _, groups, queries, heads, keys = five(grad.shape)
    if grad.numel() == 0:
        return
    rows = grad.numel() // keys
    told = (keys, heads, queries, groups, *_span_arguments(span, grad.shape))
    if keys > ROW:
        _backward_long[(rows,)](weights, grad, out, *told, SCALE=scale, BLOCK=_CHUNK, num_warps=8)
        return
    each, block, warps = _rows_and_warps(keys)
    _backward_rows[(triton.cdiv(rows, each),)](
        weights, grad, out, rows, *told, SCALE=scale, ROWS=each, BLOCK=block, num_warps=warps
    )


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float, span: Span | None, mask: Tensor | None) -> Tensor:
        scores = scores.contiguous()
        out = torch.empty_like(scores)
        _forward(scores, out, scale, span, mask)
        ctx.save_for_backward(out)
        ctx.scale, ctx.span = scale, span
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        grad = grad.contiguous()
        out = torch.empty_like(grad)
        _backward(weights, grad, out, ctx.scale, ctx.span)
        return out, None, None, None


def masked_softmax_triton(
    scores: Tensor, scale: float = 1.0, span: Span | None = None, mask: Tensor | None = None
) -> Tensor:
    """`masked_softmax`: scores [batch, heads, Q, K] or [batch, groups, Q, heads a group, K] -> the same, contiguous.

    Raises ValueError where a span does not fit, UnavailableError where Triton cannot run.
    """
    return _MaskedSoftmax.apply(scores, scale, span, mask)


def softmax_into_triton(scores: Tensor, scale: float, span: Span | None = None, mask: Tensor | None = None) -> None:
    """`softmax_into`: over contiguous scores. Raises ValueError for others."""
    _refuse_strides(scores)
    _forward(scores, scores, scale, span, mask)
    increment_version(scores)  # torch does not see what a kernel writes


def softmax_gradient_into_triton(weights: Tensor, grad: Tensor, scale: float, span: Span | None = None) -> None:
    """`softmax_gradient_into`: over a contiguous gradient. Raises ValueError for others."""
    _refuse_strides(grad)
    _backward(weights.contiguous(), grad, grad, scale, span)
    increment_version(grad)


def _refuse_strides(tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"written in place, a tensor is contiguous: {list(tensor.shape)} has strides {tensor.stride()}"
        )


TRITON = InPlaceSoftmax(softmax_into_triton, softmax_gradient_into_triton)
