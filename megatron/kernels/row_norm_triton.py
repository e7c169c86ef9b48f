"""The forward Triton kernels that both norms launch: a row's mean (LayerNorm) and root mean square, and the norm.

An argument that is None is absent from the compiled kernel: without `mean` a norm is RMSNorm, and without `branch`
nothing is added first. Rows of up to HELD elements stay in registers between the load and the store, so that each byte
crosses the memory bus once: a program holds one row, or several short ones, and 16 elements a thread are two loads of
16 bytes in bfloat16. Wider rows are read in pieces, two or three times, of which all but the first should come out of
the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.launch_triton import power_of_two, require_triton, rows_of, warps_for

HELD = 16384
"""Elements of the widest row that a program holds in registers."""

PIECE = 4096
"""Elements of a piece of a wider row."""

_TILE = 2048
"""Elements of a program's rows where one row has fewer: with 4 warps 16 a thread."""


@triton.jit
def _forward_kernel(
    x, branch, weight, bias, normed, summed, mean, inverse, rows, size,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: summed = x + branch in the dtype of x, its norm, and what the backward pass needs."""
    WIDE: tl.constexpr = inverse.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < size)
    # 64 bits only to the program's first row, 32 within its tile
    start = tl.program_id(0).to(tl.int64) * ROWS * size
    at = tl.arange(0, ROWS)[:, None] * size + column
    # rows pass through and the weight is every program's: the hints keep the weight in the first-level cache
    value = tl.load(x + start + at, mask, 0.0, eviction_policy="evict_first").to(WIDE)
    if branch is not None:
        value += tl.load(branch + start + at, mask, 0.0, eviction_policy="evict_first").to(WIDE)
        rounded = value.to(x.dtype.element_ty)
        tl.store(summed + start + at, rounded, mask)
        value = rounded.to(WIDE)
    if mean is not None:
        middle = tl.sum(value, 1) / size
        tl.store(mean + row, middle, row < rows)
        value = tl.where(mask, value - middle[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 1) / size + EPS)
    tl.store(inverse + row, factor, row < rows)
    value *= factor[:, None]
    value *= tl.load(weight + column, column < size, 0.0, eviction_policy="evict_last").to(WIDE)
    if bias is not None:
        value += tl.load(bias + column, column < size, 0.0, eviction_policy="evict_last").to(WIDE)
    tl.store(normed + start + at, value.to(x.dtype.element_ty), mask)


@triton.jit
def _forward_pieces_kernel(
    x, branch, weight, bias, normed, summed, mean, inverse, size, EPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """As `_forward_kernel` for one row wider than a program holds, BLOCK elements at a time."""
    WIDE: tl.constexpr = inverse.dtype.element_ty
    row = tl.program_id(0)
    start = row.to(tl.int64) * size
    middle = tl.zeros((1,), WIDE)
    if mean is not None:
        total = tl.zeros((BLOCK,), WIDE)
        for first in range(0, size, BLOCK):
            total += _piece(x, branch, start, first, size, WIDE, BLOCK)
        middle += tl.sum(total, 0) / size
        tl.store(mean + row + tl.arange(0, 1), middle)
    squares = tl.zeros((BLOCK,), WIDE)
    for first in range(0, size, BLOCK):
        value = _piece(x, branch, start, first, size, WIDE, BLOCK)
        value = tl.where(first + tl.arange(0, BLOCK) < size, value - middle, 0.0)
        squares += value * value
    factor = tl.rsqrt(tl.sum(squares, 0) / size + EPS)
    tl.store(inverse + row, factor)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = _piece(x, branch, start, first, size, WIDE, BLOCK)
        if branch is not None:
            tl.store(summed + start + column, value.to(x.dtype.element_ty), column < size)
        value = (value - middle) * factor * tl.load(weight + column, column < size, 0.0).to(WIDE)
        if bias is not None:
            value += tl.load(bias + column, column < size, 0.0).to(WIDE)
        tl.store(normed + start + column, value.to(x.dtype.element_ty), column < size)


@triton.jit
def _piece(x, branch, start, first, size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a row of x (+ branch, rounded to x's dtype), from `first` on; zeros behind its end."""
    column = first + tl.arange(0, BLOCK)
    value = tl.load(x + start + column, column < size, 0.0).to(WIDE)
    if branch is not None:
        value += tl.load(branch + start + column, column < size, 0.0).to(WIDE)
        value = value.to(x.dtype.element_ty).to(WIDE)
    return value


class Normed(NamedTuple):
    """What the forward pass of a norm gives. normed and summed: as x; summed is x itself where there is no branch.
    mean (None in RMSNorm) and inverse (of the deviation): [rows], float32 or float64, for the backward pass.
    """

    normed: Tensor
    summed: Tensor
    mean: Tensor | None
    inverse: Tensor


def row_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centres: bool = False
) -> Normed:
    """Norms x (+ branch) [..., size] over its last dimension: LayerNorm where it centres rows, else RMSNorm.

    weight and bias: [size] of any floating dtype. UnavailableError where Triton cannot run; ValueError where sizes do
    not fit together.
    """
    require_triton(x.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"a {name} of shape {list(tensor.shape)} does not fit rows of {x.shape[-1]}")
    source, added = rows_of(x), None if branch is None else rows_of(branch)
    rows, size = source.shape
    normed = torch.empty_like(source)
    summed = source if added is None else torch.empty_like(source)
    inverse = source.new_empty(rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    mean = torch.empty_like(inverse) if centres else None
    bias = None if bias is None else bias.contiguous()
    tensors = source, added, weight.contiguous(), bias, normed, summed, mean, inverse
    if rows and size <= HELD:
        block = power_of_two(size)
        tile = max(1, _TILE // block)
        _forward_kernel[(triton.cdiv(rows, tile),)](
            *tensors, rows, size, EPS=eps, ROWS=tile, BLOCK=block, **_warps_and_registers(block, x.element_size())
        )
    elif rows:
        _forward_pieces_kernel[(rows,)](*tensors, size, EPS=eps, BLOCK=PIECE, num_warps=warps_for(PIECE))
    return Normed(normed.view(x.shape), x if added is None else summed.view(x.shape), mean, inverse)


def _warps_and_registers(block: int, element_size: int) -> dict[str, int]:
    """Launch options for rows of a block of elements of so many bytes."""
    if block < HELD:
        return {"num_warps": warps_for(block)}
    # 32 elements a thread: two programs a processor, one of which computes while the other one's loads are under way
    return {"num_warps": 16, "maxnreg": 64} if element_size <= 2 else {"num_warps": 32}
