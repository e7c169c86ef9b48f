"""`vocabulary_softmax` in Triton: losses of rows of logits, and the logits replaced by their slopes.

What is done, and the bytes an element of bfloat16 (float32) it moves:

- `own_statistics_triton`: 2 (4) read. What ranks exchange, 12 bytes a row of float32, is written.
- `slopes_triton`: 2 (4) read, 2 (4) written.
- `losses_and_slopes_triton`: where this rank has all words, both in one program for each row. So few rows are under way
  at once that the second reading, from the row's end backwards, should come from the L2 cache: 4 (8). Where words are
  cut over ranks the collective lies between the two: 6 (12).

8192 rows of 131072 words in bfloat16 are 2.1 GB: at 4.3 TB/s limits of 0.5 ms for statistics, 1.0 ms for losses and
slopes at once, 1.5 ms for both apart. Nothing of this was measured on a GPU. Where there are fewer rows than the GPU
has processors, rows are cut over several programs, and `merge_kernel` puts their numbers together as it does those of
ranks. Results do not depend on the order in which programs run.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megatron.kernels.launch_triton import power_of_two, processors, require_triton
from megatron.kernels.softmax_rows_triton import both_kernel, merge_kernel, slopes_kernel, statistics_kernel
from megatron.kernels.vocabulary_words import PLAIN, Objective, Words, gathered, wide

_CACHED = 32 << 20
"""Bytes of rows that may be under way at once for their second reading to come from the cache: of an H200's 50 MiB."""


@dataclass(frozen=True)
class _Tile:
    """How a program walks over a row: LANES x VECTOR elements at a time, two vectors of 16 bytes a thread."""

    lanes: int
    vector: int
    warps: int

    @property
    def block(self) -> int:
        return self.lanes * self.vector


def _tile(logits: Tensor, columns: int, most_warps: int) -> _Tile:
    """As many warps, from 4 to most_warps, as leave a row of so many columns at least 8 tiles."""
    vector = 16 // logits.element_size()
    warps = min(most_warps, max(4, power_of_two(columns) // (8 * 64 * vector)))
    return _Tile(64 * warps, vector, warps)


def _cut(logits: Tensor, columns: int, tile: _Tile) -> tuple[int, int]:
    """(columns a program takes, programs a row): 1 program, unless rows are too few to fill the GPU."""
    rows, wanted = logits.shape[0], 4 * processors(logits.device)
    splits = 1 if 2 * rows >= wanted else min(triton.cdiv(columns, tile.block), triton.cdiv(wanted, rows))
    span = triton.cdiv(triton.cdiv(columns, max(splits, 1)), tile.block) * tile.block
    return max(span, tile.block), max(1, triton.cdiv(columns, max(span, tile.block)))


def _two_floats(number: float) -> tuple[float, float]:
    """(float32, rest) whose sum is the number to 48 bits: a kernel is handed floats as float32."""
    nearest = ctypes.c_float(number).value
    return nearest, number - nearest


def _scanned(logits: Tensor, targets: Tensor, words: Words, objective: Objective) -> Tensor:
    """This rank's numbers in parts, [splits, n, 3 or 4]."""
    tile = _tile(logits, words.held, 8)
    span, splits = _cut(logits, words.held, tile)
    parts = logits.new_empty(splits, logits.shape[0], objective.numbers, dtype=wide(logits.dtype))
    statistics_kernel[(logits.shape[0] * splits,)](
        logits, targets, parts, logits.stride(0), logits.shape[0], words.first, words.held, words.valid, span,
        splits,
        SMOOTHED=objective.label_smoothing > 0, LANES=tile.lanes, VECTOR=tile.vector, num_warps=tile.warps,
    )  # fmt: skip
    return parts


def _merge(
    parts: Tensor,
    targets: Tensor,
    words: Words,
    objective: Objective,
    losses: Tensor | None = None,
    objectives: Tensor | None = None,
    merged: Tensor | None = None,
) -> None:
    """Puts parts [count, n, 3 or 4] together: fills those that are given of losses, objectives [n], merged [n, 3 or 4].

    objectives only together with losses.
    """
    count, rows, _ = parts.shape
    merge_kernel[(triton.cdiv(rows, 128),)](
        parts, merged, targets, losses, objectives, count, rows, words.vocabulary,
        Z_LOSS=objective.z_loss, SMOOTHING=objective.label_smoothing, ROWS=128, num_warps=4,
    )  # fmt: skip


def own_statistics_triton(logits: Tensor, targets: Tensor, words: Words, objective: Objective = PLAIN) -> Tensor:
    """As `own_statistics`."""
    require_triton(logits.device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if not logits.shape[0]:
        return logits.new_empty(0, objective.numbers, dtype=wide(logits.dtype))
    parts = _scanned(logits, targets.contiguous(), words, objective)
    if parts.shape[0] == 1:
        return parts[0]
    own = parts.new_empty(parts.shape[1:])
    _merge(parts, targets, words, objective, merged=own)
    return own


def statistics_triton(logits: Tensor, targets: Tensor, words: Words, objective: Objective = PLAIN) -> Tensor:
    """As `statistics`."""
    own = own_statistics_triton(logits, targets, words, objective)
    if words.alone or not own.shape[0]:
        return own
    merged = torch.empty_like(own)
    _merge(gathered(own, words), targets, words, objective, merged=merged)
    return merged


def slopes_triton(
    logits: Tensor,
    found: Tensor,
    targets: Tensor,
    words: Words,
    scale: float,
    objective: Objective = PLAIN,
    upstream: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """As `slopes`. With upstream [n], each row's is multiplied by it; with out [n, held], logits are left alone."""
    require_triton(logits.device)
    out = logits if out is None else out
    _words_side_by_side(logits)
    _words_side_by_side(out)
    if not logits.shape[0]:
        return
    tile = _tile(logits, words.held, 8)
    span, splits = _cut(logits, words.held, tile)
    slopes_kernel[(logits.shape[0] * splits,)](
        logits, out, found, targets.contiguous(), upstream, logits.stride(0), out.stride(0), words.first, words.held,
        words.valid, words.vocabulary, span, splits, *_two_floats(scale), Z_LOSS=objective.z_loss,
        SMOOTHING=objective.label_smoothing, LANES=tile.lanes, VECTOR=tile.vector, num_warps=tile.warps,
    )  # fmt: skip


def losses_and_slopes_triton(
    logits: Tensor,
    targets: Tensor,
    words: Words,
    scale: float,
    objective: Objective,
    losses: Tensor,
    objectives: Tensor,
) -> None:
    """As `losses_and_slopes`; losses and objectives are contiguous."""
    require_triton(logits.device)
    _words_side_by_side(logits)
    targets, rows = targets.contiguous(), logits.shape[0]
    if not rows:
        return
    second = None if objective.plain else objectives
    if words.alone and rows >= processors(logits.device):
        tile = _tile(logits, words.held, 32 if logits.element_size() < 8 else 16)  # of float64, 64 registers are few
        both_kernel[(_programs(logits, words, tile),)](
            logits, targets, losses, second, logits.stride(0), rows, words.held, words.valid, words.vocabulary,
            *_two_floats(scale), Z_LOSS=objective.z_loss, SMOOTHING=objective.label_smoothing, LANES=tile.lanes,
            VECTOR=tile.vector, num_warps=tile.warps,
        )  # fmt: skip
        return
    if words.alone:
        parts = _scanned(logits, targets, words, objective)
    else:
        parts = gathered(own_statistics_triton(logits, targets, words, objective), words)
    merged = parts.new_empty(parts.shape[1:])
    _merge(parts, targets, words, objective, losses, second, merged)
    slopes_triton(logits, merged, targets, words, scale, objective)


def _programs(logits: Tensor, words: Words, tile: _Tile) -> int:
    """Of `both_kernel`: as many a processor as have warps there, and whose rows stay in the cache; at least 1."""
    each = processors(logits.device)
    cached = _CACHED // (each * words.held * logits.element_size())
    return min(logits.shape[0], each * max(1, min(48 // tile.warps, cached)))


def losses_of_triton(
    found: Tensor, targets: Tensor, words: Words, objective: Objective = PLAIN
) -> tuple[Tensor, Tensor]:
    """As `losses_of`."""
    require_triton(found.device)
    losses = found.new_empty(found.shape[0])
    objectives = losses if objective.plain else torch.empty_like(losses)
    if found.shape[0]:
        second = None if objective.plain else objectives
        _merge(found[None], targets.contiguous(), words, objective, losses, second)
    return losses, objectives


def row_losses_triton(logits: Tensor, targets: Tensor, words: Words) -> Tensor:
    """As `row_losses`."""
    return losses_of_triton(statistics_triton(logits, targets, words), targets, words)[0]


def _words_side_by_side(logits: Tensor) -> None:
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits that are overwritten need words side by side, not a stride of {logits.stride(1)}")
