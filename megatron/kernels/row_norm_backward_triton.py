"""The backward Triton kernels that both norms launch: the gradients of rows, weight and bias, in one pass over rows.

A few programs a processor, all of them resident at once, go through the rows in equal strides. Each keeps its sums over
rows of the weight's and the bias's gradient in registers and writes them at its end; a second kernel adds these parts,
in an order that depends on shapes and the number of processors alone: no atomics, the same bits each time. While a
program works on one tile, its loads of the next two are under way: `num_stages` of `tl.range` makes them asynchronous
copies into shared memory. As in the forward kernels, what is None is absent: `mean` in RMSNorm, the bias's sums where
there is none, `onward` where nothing but the norm used the sum.

A row of more than 8192 elements, its weight and the sums over rows are more than the registers hold. RMSNorm's rows in
half precision are then read twice, the second time out of the first-level cache. Those of float32, LayerNorm's with a
bias, which have two sums, and all beyond HELD are walked twice: by rows for what the gradient needs of the whole row,
then by columns (`rows_launch` says from which size on).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.launch_triton import power_of_two, processors, rows_of, warps_for
from megatron.kernels.row_norm_triton import HELD, PIECE

_KEPT = 8192
"""Elements of the widest row that stays in registers with its weight and the sums over rows."""

_TILE = 2048
"""Elements of a program's rows where one row has fewer."""

_REGISTERS = 65536
"""Of a processor, in every GPU that Triton compiles for."""

_COPIES = 98304
"""Bytes of shared memory that a program's copies under way may take: 99 KiB is what the smallest GPUs allow."""


@triton.jit
def _tile_of(tile, column, rows, size, ROWS: tl.constexpr):
    """The rows of a tile [ROWS], the places of its elements [ROWS, columns], and which of these there are."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return row, row.to(tl.int64)[:, None] * size + column, (row < rows)[:, None] & (column < size)


@triton.jit
def _store_gradient(target, value, onward, at, mask):
    """The gradient of x, with what reaches it past the norm."""
    if onward is not None:
        value += tl.load(onward + at, mask, 0.0).to(value.dtype)
    tl.store(target, value.to(target.dtype.element_ty), mask)


@triton.jit
def _store_part(parts, total, column, size):
    """This program's sums over rows."""
    at = tl.program_id(0).to(tl.int64) * size + column
    tl.store(parts + at, tl.sum(total, 0)[None, :], column < size)


@triton.jit
def _backward_kernel(
    grad, onward, x, weight, mean, inverse, x_grad, weight_parts, bias_parts, rows, size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows, one in every num_programs: the gradient of x, and this program's part of weight and bias.

    With unit = (x - mean) * inverse and slope = grad * weight, the gradient of x is
    (slope - mean(slope) - unit * mean(slope * unit)) * inverse + onward; RMSNorm has no first mean.
    """
    WIDE: tl.constexpr = inverse.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    if KEPT:
        scale = tl.load(weight + column, column < size, 0.0).to(WIDE)
    weight_sum = tl.zeros((ROWS, BLOCK), WIDE)
    bias_sum = tl.zeros((ROWS, BLOCK), WIDE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, at, mask = _tile_of(tile, column, rows, size, ROWS)
        factor = tl.load(inverse + row, row < rows, 0.0)[:, None]
        unit = tl.load(x + at, mask, 0.0, eviction_policy="" if KEPT else "evict_last").to(WIDE)
        upstream = tl.load(grad + at, mask, 0.0, eviction_policy="" if KEPT else "evict_last").to(WIDE)
        if not KEPT:
            scale = tl.load(weight + column, column < size, 0.0, eviction_policy="evict_last").to(WIDE)
        if mean is not None:
            middle = tl.load(mean + row, row < rows, 0.0)[:, None]
            unit -= middle
        slope = upstream * scale
        along = tl.sum(slope * unit, 1)[:, None] * factor / size
        if mean is not None:
            level = tl.sum(slope, 1)[:, None] / size
        if not KEPT:
            # another policy makes it another load, so that nothing but the sum lives from there to here
            unit = tl.load(x + at, mask, 0.0, eviction_policy="evict_first").to(WIDE)
            upstream = tl.load(grad + at, mask, 0.0, eviction_policy="evict_first").to(WIDE)
            slope = upstream * tl.load(weight + column, column < size, 0.0).to(WIDE)
            if mean is not None:
                unit -= middle
        unit *= factor
        weight_sum += upstream * unit
        result = slope - unit * along
        if bias_parts is not None:
            bias_sum += upstream
        if mean is not None:
            result -= level
        _store_gradient(x_grad + at, result * factor, onward, at, mask)
    _store_part(weight_parts, weight_sum, column, size)
    if bias_parts is not None:
        _store_part(bias_parts, bias_sum, column, size)


@triton.jit
def _row_means_kernel(
    grad, x, weight, mean, inverse, along, level, size, BLOCK: tl.constexpr
):  # fmt: skip
    """Of one row, BLOCK elements at a time: along = mean(slope * unit) and, in LayerNorm, level = mean(slope)."""
    WIDE: tl.constexpr = inverse.dtype.element_ty
    row = tl.program_id(0)
    start = row.to(tl.int64) * size
    products = tl.zeros((BLOCK,), WIDE)
    slopes = tl.zeros((BLOCK,), WIDE)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        unit = tl.load(x + start + column, column < size, 0.0).to(WIDE)
        slope = tl.load(grad + start + column, column < size, 0.0).to(WIDE)
        slope *= tl.load(weight + column, column < size, 0.0).to(WIDE)
        if mean is not None:
            unit -= tl.load(mean + row)
            slopes += slope
        products += slope * unit
    tl.store(along + row, tl.sum(products, 0) * tl.load(inverse + row) / size)
    if mean is not None:
        tl.store(level + row, tl.sum(slopes, 0) / size)


@triton.jit
def _columns_kernel(
    grad, onward, x, weight, mean, inverse, along, level, x_grad, weight_parts, bias_parts, rows, size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_backward_kernel` for BLOCK columns, by what `_row_means_kernel` found."""
    WIDE: tl.constexpr = inverse.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, column < size, 0.0).to(WIDE)
    weight_sum = tl.zeros((ROWS, BLOCK), WIDE)
    bias_sum = tl.zeros((ROWS, BLOCK), WIDE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=3):
        row, at, mask = _tile_of(tile, column, rows, size, ROWS)
        factor = tl.load(inverse + row, row < rows, 0.0)[:, None]
        unit = tl.load(x + at, mask, 0.0).to(WIDE)
        upstream = tl.load(grad + at, mask, 0.0).to(WIDE)
        if mean is not None:
            unit -= tl.load(mean + row, row < rows, 0.0)[:, None]
        unit *= factor
        weight_sum += upstream * unit
        result = upstream * scale - unit * tl.load(along + row, row < rows, 0.0)[:, None]
        if bias_parts is not None:
            bias_sum += upstream
        if mean is not None:
            result -= tl.load(level + row, row < rows, 0.0)[:, None]
        _store_gradient(x_grad + at, result * factor, onward, at, mask)
    _store_part(weight_parts, weight_sum, column, size)
    if bias_parts is not None:
        _store_part(bias_parts, bias_sum, column, size)


@triton.jit
def _column_sums_kernel(
    weight_parts, bias_parts, weight_grad, bias_grad, parts, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of BLOCK columns: the sums over all parts, of the weight where program_id(1) is 0, else of the bias."""
    if tl.program_id(1) == 0:
        _column_sums(weight_parts, weight_grad, parts, size, ROWS, BLOCK)
    elif bias_parts is not None:
        _column_sums(bias_parts, bias_grad, parts, size, ROWS, BLOCK)


@triton.jit
def _column_sums(source, target, parts, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), source.dtype.element_ty)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(source + row.to(tl.int64) * size + column, (row < parts) & (column < size), 0.0)
    tl.store(target + column, tl.sum(total, 0)[None, :].to(target.dtype.element_ty), column < size)


def row_norm_gradients(
    grad: Tensor,
    onward: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of summed, weight and bias, each in its tensor's dtype, by those of normed and (onward) of summed;
    the rest as `row_norm` was given it or gave it.
    """
    x, upstream, passing = rows_of(summed), rows_of(grad), None if onward is None else rows_of(onward)
    rows, size = x.shape
    x_grad = torch.empty_like(x)
    made = torch.empty_like if rows else torch.zeros_like
    weight_grad = made(weight, memory_format=torch.contiguous_format)
    bias_grad = None if bias is None else made(bias, memory_format=torch.contiguous_format)
    if rows:
        how = rows_launch(size, x.element_size(), 2 if onward is None else 3, 1 if bias is None else 2)
        tensors = upstream, passing, x, weight.contiguous(), mean, inverse, x_grad
        biased = bias is not None
        parts = _launch_by_columns(*tensors, biased) if how is None else _launch_by_rows(how, *tensors, biased)
        _column_sums_kernel[(triton.cdiv(size, 32), 1 if bias is None else 2)](
            *parts, weight_grad, bias_grad, parts[0].shape[0], size, ROWS=256, BLOCK=32, num_warps=16
        )
    return x_grad.view(summed.shape), weight_grad, bias_grad


@dataclass(frozen=True)
class RowsLaunch:
    """How whole rows are walked: programs a processor, rows and columns of a tile, warps, registers of a thread,
    stages of copies under way, and whether a row stays in registers.
    """

    programs: int
    tile: int
    block: int
    warps: int
    registers: int
    stages: int
    kept: bool


def rows_launch(size: int, element_size: int, streams: int, sums: int) -> RowsLaunch | None:
    """For rows of `size` elements of so many bytes, which `streams` tensors are read of and of which `sums` are kept: 1
    without a bias, 2 with one. None where registers do not hold the sums of so wide a row.
    """
    weight = sums * max(1, element_size // 2)
    if size * weight > HELD:
        return None
    block = power_of_two(size)
    tile, warps, kept = max(1, _TILE // block), min(16, max(8, block // 256)), block <= _KEPT
    resident = 32 if weight == 1 and block < _KEPT else 16
    stages = 1 + min(2, _COPIES // (tile * block * element_size * streams)) if kept else 1
    # at most so many registers that all programs are resident at once: those that began late would run alone
    return RowsLaunch(resident // warps, tile, block, warps, _REGISTERS // (resident * 32), stages, kept)


def _launch_by_rows(
    how: RowsLaunch,
    grad: Tensor,
    onward: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    x_grad: Tensor,
    biased: bool,
) -> tuple[Tensor, Tensor | None]:
    """Fills x_grad, and gives the parts [programs, size] of the weight's gradient and of the bias's."""
    rows, size = x.shape
    programs = min(triton.cdiv(rows, how.tile), processors(x.device) * how.programs)
    weight_parts = inverse.new_empty(programs, size)
    bias_parts = torch.empty_like(weight_parts) if biased else None
    _backward_kernel[(programs,)](
        grad, onward, x, weight, mean, inverse, x_grad, weight_parts, bias_parts, rows, size,
        ROWS=how.tile, BLOCK=how.block, STAGES=how.stages, KEPT=how.kept, num_warps=how.warps, maxnreg=how.registers,
    )  # fmt: skip
    return weight_parts, bias_parts


def _launch_by_columns(
    grad: Tensor,
    onward: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    x_grad: Tensor,
    biased: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `_launch_by_rows`, for rows of any width."""
    rows, size = x.shape
    along = torch.empty_like(inverse)
    level = None if mean is None else torch.empty_like(inverse)
    _row_means_kernel[(rows,)](
        grad, x, weight, mean, inverse, along, level, size, BLOCK=PIECE, num_warps=warps_for(PIECE)
    )
    tile, block, warps = 2, 1024, 4
    columns = triton.cdiv(size, block)
    programs = min(triton.cdiv(rows, tile), triton.cdiv(4 * processors(x.device), columns))
    weight_parts = inverse.new_empty(programs, size)
    bias_parts = torch.empty_like(weight_parts) if biased else None
    _columns_kernel[(programs, columns)](
        grad, onward, x, weight, mean, inverse, along, level, x_grad, weight_parts, bias_parts, rows, size,
        ROWS=tile, BLOCK=block, num_warps=warps, maxnreg=_REGISTERS // (4 * warps * 32),
    )  # fmt: skip
    return weight_parts, bias_parts
