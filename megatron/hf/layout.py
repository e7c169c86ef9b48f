"""Between our tensors and theirs, by the layout that the name table gives: whole, or a box of one of ours at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.model_shape import ModelShape
from megatron.hf.name_table import Entry, our_size

ReadInto = Callable[[Tensor, Sequence[int]], None]
"""Fills a tensor with the box of theirs that begins at an offset."""


def pack(entry: Entry, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Their tensor from ours."""
    if entry.layout == "vocabulary":
        return tensors[0][: shape.vocab_size].contiguous()
    if entry.layout == "per-head qkv":
        heads = [tensor.reshape(shape.num_attention_heads, shape.head_dim, *tensor.shape[1:]) for tensor in tensors]
        return torch.stack(heads, dim=1).flatten(0, 2).contiguous()
    if entry.layout == "interleaved heads":
        halves = tensors[0].unflatten(0, (-1, 2, shape.head_dim // 2))
        return halves.transpose(1, 2).reshape(tensors[0].shape).contiguous()
    if entry.layout == "stacked":
        return torch.cat(list(tensors))
    if entry.layout == "transposed":
        return tensors[0].t().contiguous()
    if entry.layout == "transposed stack":
        return torch.cat([tensor.t() for tensor in tensors], dim=1)
    return tensors[0].contiguous()


@dataclass(frozen=True)
class Rows:
    """Rows that follow each other in our tensor and in theirs (columns there, where theirs is transposed). ours,
    theirs: the number of the first in each."""

    ours: int
    theirs: int
    count: int


def rows_of(entry: Entry, number: int, begin: int, end: int, shape: ModelShape) -> Iterator[Rows]:
    """Where rows [begin, end) of `entry.ours[number]` lie in their tensor. Rows not named are padding: zero."""
    if entry.layout == "per-head qkv":
        size = shape.head_dim
        for head in range(begin // size, -(-end // size)):
            first, last = max(begin, head * size), min(end, (head + 1) * size)
            before = (len(entry.ours) * head + number - head) * size  # rows of other parts and heads before ours
            yield Rows(first, first + before, last - first)
        return
    if entry.layout == "interleaved heads":
        half = shape.head_dim // 2
        for row in range(begin, end):
            head, inside = divmod(row, shape.head_dim)
            yield Rows(row, head * shape.head_dim + 2 * (inside % half) + inside // half, 1)
        return
    if entry.layout == "vocabulary":
        end = min(end, shape.vocab_size)
    before = sum(our_size(size, shape)[0] for size in entry.size[:number])
    if begin < end:
        yield Rows(begin, begin + before, end - begin)


def fill_box(
    box: Tensor, entry: Entry, number: int, offset: Sequence[int], shape: ModelShape, read_into: ReadInto
) -> Iterator[Tensor]:
    """Fills the box of `entry.ours[number]` that begins at `offset` from their tensor, of which nothing else is read;
    gives each part when it is filled. Padding is left as it is."""
    for rows in rows_of(entry, number, offset[0], offset[0] + box.shape[0], shape):
        part = box[rows.ours - offset[0] :][: rows.count]
        if entry.transposed:
            lying = part.new_empty(part.shape[::-1])
            read_into(lying, (*offset[1:], rows.theirs))
            part.copy_(lying.t())
        else:
            read_into(part, (rows.theirs, *offset[1:]))
        yield part
