"""Kernels over rows of logits that are tens of thousands of words wide; `vocabulary_softmax_triton` launches them.

A program walks over a row in tiles of LANES x VECTOR. A vector is 16 bytes; a thread has two of them in a tile. Each
lane keeps the highest logit and the sum of exp(logit - highest) that it has seen, so that there is one exponential an
element and one a vector, a reduction within a thread at each tile, and one over the program at the row's end. Partial
sums are rescaled as in Milakov and Gimelshein, arXiv 1805.02867, algorithm 3.

All numbers of a row are float32, or float64 where the tensors they are written to are. Offsets of rows are 64-bit,
those of words 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron.kernels.vocabulary_words import IGNORED

_IGNORED = tl.constexpr(IGNORED)

_LOG2E = tl.constexpr(1.4426950408889634)

_LOWEST = tl.constexpr(-2.0e38)
"""Below any logit, and finite in float32 also after a subtraction and times log2(e)."""


@triton.jit
def _offsets(LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _known(start, valid, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Which of a tile's columns come before valid; few registers: a number of each lane, not of each element."""
    left = valid - start - tl.arange(0, LANES) * VECTOR
    return tl.arange(0, VECTOR)[None, :] < left[:, None]


@triton.jit
def _exp(x):
    """exp2, which takes 0 for numbers below the smallest normal one: exp spends three more instructions on those."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def _scan(
    row, begin, end, valid,
    WIDE: tl.constexpr, SMOOTHED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """(highest, sum of exp(x - highest), sum of x where SMOOTHED) of columns begin to end of a row, without those from
    valid on, which are padding; LOWEST, 0, 0 of none. KEPT: how long the cache should hold what is read.
    """
    BLOCK: tl.constexpr = LANES * VECTOR
    offsets = _offsets(LANES, VECTOR)
    highest = tl.full([LANES], _LOWEST, WIDE)
    total = tl.zeros([LANES], WIDE)
    summed = tl.zeros([LANES], WIDE)
    whole = begin + tl.maximum(tl.minimum(end, valid) - begin, 0) // BLOCK * BLOCK
    # The last, partial tiles come first: the last loop's results then have one use each, as a compiler's pass asserts.
    # Padding is read and put out afterwards: a mask at valid would break the vectors of 16 bytes.
    for start in range(whole, tl.minimum(end, valid), BLOCK):
        columns = start + offsets
        x = tl.load(row + columns, mask=columns < end, other=0.0, eviction_policy=KEPT).to(WIDE)
        known = _known(start, valid, LANES, VECTOR)
        spread = tl.where(known, x, -float("inf"))
        before = highest
        highest = tl.maximum(before, tl.max(spread, 1))
        total = total * _exp(before - highest) + tl.sum(_exp(spread - highest[:, None]), 1)
        if SMOOTHED:
            summed += tl.sum(tl.where(known, x, 0.0), 1)
    # A tile is asked for while the one before it is worked on.
    coming = tl.load(row + begin + offsets, mask=begin < whole, other=0.0, eviction_policy=KEPT)
    for start in range(begin, whole, BLOCK):
        x = coming.to(WIDE)
        after = start + BLOCK
        coming = tl.load(row + after + offsets, mask=after < whole, other=0.0, eviction_policy=KEPT)
        before = highest
        highest = tl.maximum(before, tl.max(x, 1))
        total = total * _exp(before - highest) + tl.sum(_exp(x - highest[:, None]), 1)
        if SMOOTHED:
            summed += tl.sum(x, 1)
    top = tl.max(highest, 0)
    return top, tl.sum(total * _exp(highest - top), 0), tl.sum(summed, 0)


@triton.jit
def _write_slopes(
    row, out, begin, end, valid, column, chosen, highest, weight, hot, floor,
    WIDE: tl.constexpr, SMOOTHED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """out = exp(x - highest) * weight - floor, less hot in the target's column, where `chosen` was, and 0 in padding.

    From the last tile that `_scan` read back to its first.
    """
    BLOCK: tl.constexpr = LANES * VECTOR
    NARROW: tl.constexpr = out.dtype.element_ty
    offsets = _offsets(LANES, VECTOR)
    blocks = tl.maximum(tl.minimum(end, valid) - begin, 0) // BLOCK
    for number in range(blocks):
        columns = begin + (blocks - 1 - number) * BLOCK + offsets
        x = tl.load(row + columns, eviction_policy="evict_first").to(WIDE)
        slope = _exp(x - highest) * weight
        if SMOOTHED:
            slope -= floor
        tl.store(out + columns, slope.to(NARROW), eviction_policy="evict_first")
    for start in range(begin + blocks * BLOCK, end, BLOCK):
        columns = start + offsets
        x = tl.load(row + columns, mask=columns < end, other=0.0).to(WIDE)
        slope = _exp(x - highest) * weight
        if SMOOTHED:
            slope -= floor
        slope = tl.where(_known(start, valid, LANES, VECTOR), slope, 0.0)
        tl.store(out + columns, slope.to(NARROW), mask=columns < end)
    # Once a row rather than compared at every word; after all threads have written theirs.
    tl.debug_barrier()
    mine = (column >= begin) & (column < tl.minimum(end, valid))
    slope = _exp(chosen - highest) * weight - hot
    if SMOOTHED:
        slope -= floor
    tl.store(out + column, slope.to(NARROW), mask=mine)


@triton.jit
def _write_zeros(out, begin, end, LANES: tl.constexpr, VECTOR: tl.constexpr):
    BLOCK: tl.constexpr = LANES * VECTOR
    zeros = tl.zeros([LANES, VECTOR], out.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        columns = start + _offsets(LANES, VECTOR)
        tl.store(out + columns, zeros, mask=columns < end)


@triton.jit
def statistics_kernel(
    logits, targets, parts, stride, rows, first, held, valid, span, splits,
    SMOOTHED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """parts [splits, rows, 3 or 4]: a program's numbers of `span` words of one row."""
    WIDE: tl.constexpr = parts.dtype.element_ty
    NUMBERS: tl.constexpr = 4 if SMOOTHED else 3
    program = tl.program_id(0)
    split = program % splits
    number = (program // splits).to(tl.int64)
    row = logits + number * stride
    begin = split * span
    end = tl.minimum(begin + span, held)
    column = tl.load(targets + number) - first
    mine = (column >= begin) & (column < tl.minimum(end, valid))
    chosen = tl.load(row + column, mask=mine, other=0.0).to(WIDE)
    highest, total, summed = _scan(row, begin, end, valid, WIDE, SMOOTHED, LANES, VECTOR, "evict_first")
    place = parts + (split.to(tl.int64) * rows + number) * NUMBERS
    tl.store(place, tl.where(begin < valid, highest, -float("inf")))
    tl.store(place + 1, total)
    tl.store(place + 2, chosen)
    if SMOOTHED:
        tl.store(place + 3, summed)


@triton.jit
def _row_losses(
    highest, total, chosen, summed, vocabulary,
    Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """(cross-entropy, objective) of a row or of several."""
    rest = tl.log(total)
    loss = highest - chosen + rest
    objective = loss
    if Z_LOSS > 0:
        objective += Z_LOSS * (highest + rest) * (highest + rest)
    if SMOOTHING > 0:
        objective += SMOOTHING * (chosen - summed / vocabulary)
    return loss, objective


@triton.jit
def merge_kernel(
    parts, merged, targets, losses, objectives, count, rows, vocabulary,
    Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """merged [rows, 3 or 4] of parts [count, rows, 3 or 4]; with losses also [rows] cross-entropies, objectives."""
    WIDE: tl.constexpr = parts.dtype.element_ty
    NUMBERS: tl.constexpr = 4 if SMOOTHING > 0 else 3
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    place = parts + row * NUMBERS
    highest = tl.full([ROWS], -float("inf"), WIDE)
    for _part in range(count):
        highest = tl.maximum(highest, tl.load(place, mask=known, other=0.0))
        place += rows * NUMBERS
    top = tl.maximum(highest, _LOWEST)  # where no part has words, highest is minus infinity
    total = tl.zeros([ROWS], WIDE)
    chosen = tl.zeros([ROWS], WIDE)
    summed = tl.zeros([ROWS], WIDE)
    place = parts + row * NUMBERS
    for _part in range(count):
        total += tl.load(place + 1, mask=known, other=0.0) * _exp(tl.load(place, mask=known, other=0.0) - top)
        chosen += tl.load(place + 2, mask=known, other=0.0)
        if SMOOTHING > 0:
            summed += tl.load(place + 3, mask=known, other=0.0)
        place += rows * NUMBERS
    if merged is not None:
        place = merged + row * NUMBERS
        tl.store(place, highest, mask=known)
        tl.store(place + 1, total, mask=known)
        tl.store(place + 2, chosen, mask=known)
        if SMOOTHING > 0:
            tl.store(place + 3, summed, mask=known)
    if losses is not None:
        total = tl.where(known, total, 1.0)
        counts = tl.load(targets + row, mask=known, other=_IGNORED) != _IGNORED
        loss, objective = _row_losses(highest, total, chosen, summed, vocabulary, Z_LOSS, SMOOTHING)
        tl.store(losses + row, tl.where(counts, loss, 0.0), mask=known)
        if objectives is not None:
            tl.store(objectives + row, tl.where(counts, objective, 0.0), mask=known)


@triton.jit
def slopes_kernel(
    logits, out, found, targets, upstream, stride, out_stride, first, held, valid, vocabulary, span, splits,
    scale, scale_rest, Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """out = (scale + scale_rest) * d(objective)/d(logits) of `span` words of a row, times upstream [rows] if given."""
    WIDE: tl.constexpr = found.dtype.element_ty
    NUMBERS: tl.constexpr = 4 if SMOOTHING > 0 else 3
    program = tl.program_id(0)
    number = (program // splits).to(tl.int64)
    begin = program % splits * span
    end = tl.minimum(begin + span, held)
    target = tl.load(targets + number)
    if target == _IGNORED:
        _write_zeros(out + number * out_stride, begin, end, LANES, VECTOR)
    else:
        highest = tl.load(found + number * NUMBERS)
        total = tl.load(found + number * NUMBERS + 1)
        chosen = tl.load(found + number * NUMBERS + 2)
        factor = tl.cast(scale, WIDE) + tl.cast(scale_rest, WIDE)
        if upstream is not None:
            factor *= tl.load(upstream + number).to(WIDE)
        weight = factor / total
        if Z_LOSS > 0:
            weight *= 1 + 2 * Z_LOSS * (highest + tl.log(total))
        _write_slopes(
            logits + number * stride, out + number * out_stride, begin, end, valid, target - first,
            chosen, highest, weight, factor * (1 - SMOOTHING), factor * SMOOTHING / vocabulary,
            WIDE, SMOOTHING > 0, LANES, VECTOR,
        )  # fmt: skip


@triton.jit
def both_kernel(
    logits, targets, losses, objectives, stride, rows, held, valid, vocabulary, scale, scale_rest,
    Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program's rows, each scanned and then overwritten by its slopes; their losses, and objectives if given."""
    WIDE: tl.constexpr = losses.dtype.element_ty
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    factor = tl.cast(scale, WIDE) + tl.cast(scale_rest, WIDE)
    for turn in range(tl.cdiv(rows - program, programs)):
        number = program.to(tl.int64) + turn * programs
        row = logits + number * stride
        target = tl.load(targets + number)
        loss = tl.zeros((), WIDE)
        objective = tl.zeros((), WIDE)
        if target == _IGNORED:
            _write_zeros(row, 0, held, LANES, VECTOR)
        else:
            # Before the scan, whose reductions wait for all threads: then nobody has overwritten it.
            chosen = tl.load(row + target, mask=target < valid, other=0.0).to(WIDE)
            highest, total, summed = _scan(row, 0, held, valid, WIDE, SMOOTHING > 0, LANES, VECTOR, "evict_last")
            loss, objective = _row_losses(highest, total, chosen, summed, vocabulary, Z_LOSS, SMOOTHING)
            weight = factor / total
            if Z_LOSS > 0:
                weight *= 1 + 2 * Z_LOSS * (highest + tl.log(total))
            _write_slopes(
                row, row, 0, held, valid, target, chosen, highest, weight, factor * (1 - SMOOTHING),
                factor * SMOOTHING / vocabulary, WIDE, SMOOTHING > 0, LANES, VECTOR,
            )  # fmt: skip
        tl.store(losses + number, loss)
        if objectives is not None:
            tl.store(objectives + number, objective)
