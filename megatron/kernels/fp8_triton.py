"""Casts to 8-bit floats in Triton: one launch for the maximum, one that writes the cast and its transpose.

The first reads x, the second reads it again and writes both results: 6 bytes an element of bfloat16, at least 94 us for
16384 x 4096 on an H200 that moves 4.3e12 bytes a second; less where x is still in its 50 MB of L2. These are limits;
nothing here was measured on a GPU. The maximum is kept by 256 programs at most, whatever the GPU, as the bits of |x|:
integers order floats of one sign, infinity above all numbers and what is no number above that, so it cannot get lost as
it would in a maximum of floats. Each program of the second launch folds those 256 by itself, which saves a launch.
A block of the first is 32 KB in 16 warps, so that the two programs that most SMs have keep 64 KB on the way.

A tile of the second is 64 rows of 128 columns in 4 warps: rows of 128 bytes of the cast and of 64 of its transpose, all
whole sectors. Triton's interpreter loses carries when it rounds to float8, so there, and only there, numbers are
rounded by arithmetic before they are cast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.fp8 import E4M3, E5M2, LARGEST, LARGEST_SCALE, Fp8Tensor, Fp8Weight, empty_cast, linear_with
from megatron.kernels.launch_triton import INTERPRETED, power_of_two, require_triton

_PARTS = 256
_BLOCK_BYTES = 32768
_ROWS, _COLUMNS = 64, 128
_GRIDS = {E4M3: (3, 2.0**-6), E5M2: (2, 2.0**-14)}
"""Bits after the leading one, and the smallest normal number."""


@triton.jit
def _maximum_kernel(x, partial, count, turns, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest |x| of every PARTS-th block, as the bits of a float32; 0 where there is none."""
    most = tl.zeros((BLOCK,), tl.int32)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(turns):
        block = tl.load(x + offsets, mask=offsets < count, other=0.0)
        most = tl.maximum(most, tl.abs(block.to(tl.float32)).to(tl.int32, bitcast=True))
        offsets += PARTS * BLOCK
    tl.store(partial + tl.program_id(0), tl.max(most, 0))


@triton.jit
def _rounded(x, BITS: tl.constexpr, LEAST: tl.constexpr):
    """float32 x to the nearest number of so many bits after the leading one, ties to even; below LEAST, the smallest
    normal number, with LEAST's step: a number 1.5 * 2^(23 - BITS) times x's power of two pushes the rest out."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    push = tl.where(power > LEAST, power, LEAST) * (1.5 * 2.0 ** (23 - BITS))
    return (x + push) - push


@triton.jit
def _cast_kernel(
    x, values, transposed, inverse, partial, rows, columns, padded, LARGEST: tl.constexpr, LIMIT: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUND: tl.constexpr, BITS: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """One tile of x [rows, columns] into values and transposed [columns, padded]."""
    most = tl.max(tl.load(partial + tl.arange(0, PARTS)), 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full((), LARGEST, tl.float32), most)
    scale = tl.where(scale > LIMIT, LIMIT, scale)
    across = tl.cdiv(columns, COLUMNS)
    if tl.program_id(0) == 0:
        tl.store(inverse, tl.div_rn(tl.full((), 1.0, tl.float32), scale))
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    here = column[None, :] < columns
    offsets = row[:, None].to(tl.int64) * columns + column[None, :]
    tile = tl.load(x + offsets, mask=(row[:, None] < rows) & here, other=0.0).to(tl.float32) * scale
    tile = tl.where(tile > LARGEST, LARGEST, tile)
    tile = tl.where(tile < -LARGEST, -LARGEST, tile)
    if ROUND:
        tile = _rounded(tile, BITS, LEAST)
    narrow = tile.to(values.dtype.element_ty)
    tl.store(values + offsets, narrow, mask=(row[:, None] < rows) & here)
    there = column[:, None].to(tl.int64) * padded + row[None, :]
    inside = (column[:, None] < columns) & (row[None, :] < padded)
    tl.store(transposed + there, tl.trans(narrow), mask=inside)


def fp8_cast_triton(x: Tensor, dtype: torch.dtype, into: Fp8Tensor | None = None) -> Fp8Tensor:
    """`megatron.kernels.fp8.fp8_cast`."""
    require_triton(x.device)
    x = x.detach().contiguous()
    cast = into or empty_cast(x, dtype)
    (rows, columns), padded = x.shape, cast.transposed.shape[1]
    block = _BLOCK_BYTES // x.element_size()
    parts = min(_PARTS, power_of_two(triton.cdiv(x.numel(), block)))
    partial = torch.empty(parts, dtype=torch.int32, device=x.device)
    turns = triton.cdiv(x.numel(), parts * block)
    _maximum_kernel[(parts,)](x, partial, x.numel(), turns, parts, block, num_warps=16)
    tiles = triton.cdiv(padded, _ROWS) * triton.cdiv(columns, _COLUMNS)
    _cast_kernel[(tiles,)](
        x, *cast, partial, rows, columns, padded, LARGEST[dtype], LARGEST_SCALE, parts, _ROWS, _COLUMNS, INTERPRETED,
        *_GRIDS[dtype], num_warps=4,
    )  # fmt: skip
    return cast


def fp8_linear_triton(x: Tensor, weight: Tensor, held: Fp8Weight | None = None) -> Tensor:
    """`megatron.kernels.fp8.fp8_linear`; `held` is made with `fp8_cast_triton`, or with the definition."""
    require_triton(x.device)
    return linear_with(fp8_cast_triton, x, weight, held)
