"""Between our tensors and theirs, by the layout that the name table gives: whole, or rows of one of ours at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.model_shape import ModelShape
from megatron.hf.name_table import Entry


def pack(entry: Entry, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Their tensor from ours."""
    if entry.layout == "vocabulary":
        return tensors[0][: shape.vocab_size].contiguous()
    if entry.layout == "per-head qkv":
        heads = [tensor.reshape(shape.num_attention_heads, shape.head_dim, *tensor.shape[1:]) for tensor in tensors]
        return torch.stack(heads, dim=1).flatten(0, 2).contiguous()
    return tensors[0].contiguous()


@dataclass(frozen=True)
class Rows:
    """Rows that follow each other in our tensor and in theirs. ours, theirs: the number of the first in each."""

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
    if entry.layout == "vocabulary":
        end = min(end, shape.vocab_size)
    if begin < end:
        yield Rows(begin, begin, end - begin)
