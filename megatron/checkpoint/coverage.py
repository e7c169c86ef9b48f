"""Whether boxes cover a tensor exactly once: what fills a tensor from shards notices neither gap nor overlap."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins, and its shape."""


def fault_in_cover(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What keeps the boxes from covering a tensor of `shape` exactly once, in words with box numbers; None: nothing."""
    for number, (offset, size) in enumerate(boxes):
        if not len(offset) == len(size) == len(shape):
            return f"shard {number} has {len(size)} dimensions at an offset of {len(offset)}, the tensor {len(shape)}"
        if any(begin < 0 or n < 0 or begin + n > whole for begin, n, whole in zip(offset, size, shape, strict=True)):
            return f"shard {number} of shape {list(size)} at {list(offset)} reaches beyond the tensor's {list(shape)}"
    if pair := _overlapping(boxes):
        return f"shards {pair[0]} and {pair[1]} overlap"
    found, wanted = sum(prod(size) for _, size in boxes), prod(shape)
    if found != wanted:
        gap = _first_gap(shape, boxes)
        return f"shards hold {found} of {wanted} elements: none holds the one at {list(gap or ())}"
    return None


def overlap_of(one: Box, other: Box) -> Box | None:
    """The box that two boxes have in common; None where they share no element."""
    begin = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    ends = tuple(min(a + n, b + m) for a, n, b, m in zip(one[0], one[1], other[0], other[1], strict=True))
    size = tuple(end - start for start, end in zip(begin, ends, strict=True))
    return (begin, size) if all(n > 0 for n in size) else None


def _overlapping(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """A sweep along the dimension with the most cuts, so that thousands of shards need few comparisons."""
    solid = [number for number, (_, size) in enumerate(boxes) if prod(size)]
    if not solid:
        return None
    dimensions = len(boxes[solid[0]][0])
    if dimensions == 0:
        return (solid[0], solid[1]) if len(solid) > 1 else None
    along = max(range(dimensions), key=lambda dim: len({boxes[number][0][dim] for number in solid}))
    reaching: list[int] = []
    for number in sorted(solid, key=lambda number: boxes[number][0][along]):
        begin = boxes[number][0][along]
        reaching = [other for other in reaching if boxes[other][0][along] + boxes[other][1][along] > begin]
        for other in reaching:
            if overlap_of(boxes[other], boxes[number]):
                return min(other, number), max(other, number)
        reaching.append(number)
    return None


def _first_gap(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[int, ...] | None:
    """The first element, in row-major order, that no box holds."""
    if not shape:
        return None if boxes else ()
    cuts = {0, *(offset[0] for offset, _ in boxes), *(offset[0] + size[0] for offset, size in boxes)}
    for begin in sorted(cut for cut in cuts if cut < shape[0]):
        inside = [(offset[1:], size[1:]) for offset, size in boxes if offset[0] <= begin < offset[0] + size[0]]
        rest = _first_gap(shape[1:], inside)
        if rest is not None:
            return (begin, *rest)
    return None
