"""AdamW in Triton: two launches for a whole model, one that counts steps and one over the blocks of all its tensors.

Which block is whose, and where that tensor and its moments lie, is read from tables on the device
(`megatron.kernels.tensor_table`), so that the number of tensors costs no launches. Tensors that differ in dtypes, in
having a copy or in alignment need another program, hence a launch for each such kind; a model usually has one.

Bytes an element, and what they take at least on an H200 that moves 4.3e12 bytes a second, for 1e9 parameters:

    float32 master and gradient: read 16, write 12             28 bytes    6.5 ms
    the same with a bfloat16 copy, which is not read again     30 bytes    7.0 ms
    float32 master, bfloat16 gradient and copy                 28 bytes    6.5 ms
    two halves and a bfloat16 gradient: read 14, write 12      26 bytes    6.0 ms

These are limits; nothing here was measured on a GPU. A block is 2048 elements in 8 warps: 8 elements a thread, two
loads of 16 bytes from each float32 tensor, so that every program of an SM has up to 32 KB on the way. The last block of
each tensor is masked; all others are not, since a mask whose end is known only on the device would break up wide loads.
Quotient and root are the correctly rounded ones: there is time for them, and a step is then the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.adamw import AdamWTensors, wide_dtype
from megatron.kernels.launch_triton import require_triton
from megatron.kernels.tensor_table import VECTOR_BYTES, addresses, block_map, uploaded

_BLOCK = 2048
_WARPS = 8
_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_LOG_OF_ZERO = -1e4
"""Stands for it: its exponential is 0 after any number of steps."""


@triton.jit
def _count_kernel(
    steps, lr, decays, found_inf, numbers, count, LR_STRIDE: tl.constexpr, LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts steps up, and writes what each tensor's elements need, float64 [n, 3]: what decay leaves of a parameter,
    lr / (1 - beta1^t), and 1 / sqrt(1 - beta2^t)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    before = tl.load(steps + index, mask=inside, other=0.0)
    rate = tl.load(lr + index * LR_STRIDE, mask=inside, other=0.0).to(tl.float64)
    decay = tl.load(decays + index, mask=inside, other=0.0)
    step = before.to(tl.float64) + 1.0
    tl.store(numbers + index * 3, 1.0 - rate * decay, mask=inside)
    tl.store(numbers + index * 3 + 1, rate / (1.0 - tl.exp(step * LOG_BETA1)), mask=inside)
    tl.store(numbers + index * 3 + 2, 1.0 / tl.sqrt(1.0 - tl.exp(step * LOG_BETA2)), mask=inside)
    after = before + 1.0
    if found_inf is not None:
        after = tl.where(tl.load(found_inf) == 0, after, before)
    tl.store(steps + index, after, mask=inside)


@triton.jit
def _joined(high, low):
    """The float32 master of two halves, both as int16."""
    return ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split(master):
    """Both halves as int16; `megatron.kernels.adamw` has the formula."""
    bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16), (bits - (high << 16)).to(tl.int16)


@triton.jit
def _moved(
    parameter, gradient, mean, square, keep, size, root, BETA1: tl.constexpr, REST1: tl.constexpr,
    BETA2: tl.constexpr, REST2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Parameter and moments after the step, all of one dtype, float32 or float64."""
    mean = mean * BETA1 + gradient * REST1
    square = square * BETA2 + gradient * gradient * REST2
    if parameter.dtype == tl.float64:
        moved = size * mean / (tl.sqrt(square) * root + EPS)
    else:
        moved = tl.div_rn(size * mean, tl.sqrt_rn(square) * root + EPS)
    return parameter * keep - moved, mean, square


@triton.jit
def _step_block(
    parameters, gradients, means, squares, extras, offsets, mask, keep, size, root, factor, SPLIT: tl.constexpr,
    HAS_COPY: tl.constexpr, BETA1: tl.constexpr, REST1: tl.constexpr, BETA2: tl.constexpr, REST2: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Loads one block, steps and stores; extras: where low halves lie, or copies: as int16 bfloat16 ones, which are the
    masters' high halves."""
    mean = tl.load(means + offsets, mask=mask)
    square = tl.load(squares + offsets, mask=mask)
    gradient = tl.load(gradients + offsets, mask=mask).to(mean.dtype) * factor
    parameter = tl.load(parameters + offsets, mask=mask)
    if SPLIT:
        parameter = _joined(parameter, tl.load(extras + offsets, mask=mask))
    parameter, mean, square = _moved(
        parameter, gradient, mean, square, keep, size, root, BETA1, REST1, BETA2, REST2, EPS
    )
    tl.store(means + offsets, mean, mask=mask)
    tl.store(squares + offsets, square, mask=mask)
    if SPLIT:
        high, low = _split(parameter)
        tl.store(parameters + offsets, high, mask=mask)
        tl.store(extras + offsets, low, mask=mask)
    else:
        tl.store(parameters + offsets, parameter, mask=mask)
        if HAS_COPY:
            if extras.dtype.element_ty == tl.int16:
                high, _ = _split(parameter)
                tl.store(extras + offsets, high, mask=mask)
            else:
                tl.store(extras + offsets, parameter.to(extras.dtype.element_ty), mask=mask)


@triton.jit
def _located(table, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from its entry of the table.

    Known to the compiler are boundaries of four elements, not more: it then gives every thread the same four of each
    tensor. Told of 16 bytes it gives it eight of a bfloat16 tensor, and moves them through shared memory to its fours.
    """
    pointer = tl.load(table).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 8 if TYPE.primitive_bitwidth == 16 else 16)
    return pointer


@triton.jit
def _step_kernel(
    where_parameters, where_gradients, where_means, where_squares, where_extras, sizes, owners, blocks, numbers,
    scale, found_inf, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, WIDE: tl.constexpr, EXTRA: tl.constexpr,
    SPLIT: tl.constexpr, BETA1: tl.constexpr, REST1: tl.constexpr, BETA2: tl.constexpr, REST2: tl.constexpr,
    EPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one tensor. where_..., sizes: int64 [n]; numbers: float64 [n, 3]; owners, blocks: by program."""
    owner = tl.load(owners + tl.program_id(0))
    start = tl.load(blocks + tl.program_id(0)).to(tl.int64) * BLOCK
    left = tl.load(sizes + owner) - start
    parameters = _located(where_parameters + owner, PARAMETER, ALIGNED) + start
    gradients = _located(where_gradients + owner, GRADIENT, ALIGNED) + start
    means = _located(where_means + owner, WIDE, ALIGNED) + start
    squares = _located(where_squares + owner, WIDE, ALIGNED) + start
    extras = parameters
    HAS_EXTRA: tl.constexpr = EXTRA is not None
    if HAS_EXTRA:
        extras = _located(where_extras + owner, EXTRA, ALIGNED) + start
    keep = tl.load(numbers + owner * 3).to(WIDE)
    size = tl.load(numbers + owner * 3 + 1).to(WIDE)
    root = tl.load(numbers + owner * 3 + 2).to(WIDE)
    factor = tl.full((), 1.0, WIDE)
    if scale is not None:
        factor = tl.load(scale).to(WIDE)
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) == 0, left, 0)
    offsets = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _step_block(
            parameters, gradients, means, squares, extras, offsets, None, keep, size, root, factor, SPLIT, HAS_EXTRA,
            BETA1, REST1, BETA2, REST2, EPS,
        )  # fmt: skip
    elif left > 0:
        _step_block(
            parameters, gradients, means, squares, extras, offsets, offsets < left, keep, size, root, factor, SPLIT,
            HAS_EXTRA, BETA1, REST1, BETA2, REST2, EPS,
        )  # fmt: skip


@torch.no_grad()
def adamw_step_triton(
    tensors: AdamWTensors,
    steps: Tensor,
    lr: Tensor,
    weight_decays: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`megatron.kernels.adamw.adamw_step`. Waits for nothing; RuntimeError where a CUDA graph is captured over tensors
    that no step has seen before."""
    require_triton(steps.device)
    tensors.check(steps, lr, weight_decays)
    count, device = len(tensors.parameters), steps.device
    if not count:
        return
    sizes = tuple(parameter.numel() for parameter in tensors.parameters)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    extras = [low if copy is None else copy for copy, low in tensors.extras()]
    for index in range(count):
        if sizes[index]:
            kinds.setdefault(_kind(tensors, index, extras[index]), []).append(index)
    numbers = torch.empty(count, 3, dtype=torch.float64, device=device)
    decays = uploaded(tuple(weight_decays), torch.float64, device)
    _count_kernel[(triton.cdiv(count, 256),)](
        steps,
        lr.contiguous(),
        decays,
        found_inf,
        numbers,
        count,
        int(lr.numel() > 1),
        *map(_log, betas),
        256,
        num_warps=4,
    )
    columns = (tensors.parameters, tensors.gradients, tensors.means, tensors.squares)
    tables = [uploaded(addresses(column), torch.int64, device) for column in columns]
    where = tuple(0 if extra is None else extra.data_ptr() for extra in extras)
    tables += [uploaded(where, torch.int64, device), uploaded(sizes, torch.int64, device)]
    rates = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps)
    for (*types, aligned), chosen in kinds.items():
        owners, blocks = block_map(sizes, tuple(chosen), _BLOCK, device)
        _step_kernel[(len(owners),)](
            *tables, owners, blocks, numbers, scale, found_inf, *types, *rates, aligned, _BLOCK, num_warps=_WARPS
        )


def _kind(tensors: AdamWTensors, index: int, extra: Tensor | None) -> tuple[Any, ...]:
    """The constants of a tensor's program: types of parameter, gradient, moments and extra, split, aligned."""
    parameter, gradient, mean = tensors.parameters[index], tensors.gradients[index], tensors.means[index]
    split = parameter.dtype == torch.bfloat16
    held = [parameter, gradient, mean, tensors.squares[index]]
    kinds = [tl.int16 if split else _TYPES[parameter.dtype], _TYPES[gradient.dtype], _TYPES[wide_dtype(parameter)]]
    if extra is None:
        kinds.append(None)
    else:
        held.append(extra)
        as_halves = split or (parameter.dtype, extra.dtype) == (torch.float32, torch.bfloat16)
        kinds.append(tl.int16 if as_halves else _TYPES[extra.dtype])
    return (*kinds, split, all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in held))


def _log(beta: float) -> float:
    return log(beta) if beta > 0 else _LOG_OF_ZERO
