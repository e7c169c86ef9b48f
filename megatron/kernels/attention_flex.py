"""Document-masked attention by torch's FlexAttention (Dong et al., arXiv 2412.05496): a Triton kernel that torch
compiles around a mask's formula.

It is told which blocks of 128 queries by 128 keys hold anything visible, and which are visible throughout and need no
mask. What a query sees is a stretch of keys, [first, position], and first never falls within a row: so both sets are
ranges that follow from first at a block's ends, in tensors of (T / 128)^2 numbers. torch's create_block_mask finds the
same from all T^2 pairs.

Shapes do not depend on the documents, so nothing is compiled again when their number changes; a new (batch, T) makes
the program one for any. Gradients are deterministic (its backward has no atomic sums). On CPUs it runs uncompiled, as
plain products over the whole square: for tests. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron.kernels.attention import attention_sdpa, runs_of

BLOCK = 128


@dataclass(frozen=True)
class FlexPlan:
    """(q0, q1, mask) for each run of queries; none: causality says it all."""

    pieces: tuple[tuple[int, int, BlockMask], ...]


def plan_flex(first: Tensor, divided: bool | None = None, positions: Tensor | None = None) -> FlexPlan:
    """The plan for a microbatch whose positions see keys from first [batch, T] on.

    divided: whether a document begins within some row; with False, and queries at all positions, SDPA runs. positions:
    those of the queries at hand, ascending int64 [T_local] of the CPU, where they are not all.
    """
    if positions is None:
        if divided is False:
            return FlexPlan(())
        return FlexPlan(((0, first.shape[1], block_mask(first, 0, first.shape[1])),))
    runs = [(q0, q1, block_mask(first, begin, begin + q1 - q0)) for q0, q1, begin in runs_of(positions)]
    return FlexPlan(tuple(runs))


def block_mask(first: Tensor, begin: int, end: int) -> BlockMask:
    """For queries at positions [begin, end) of every row, numbered from 0, and all keys: first [batch, T]."""
    batch, length = first.shape
    rows, columns = -(-(end - begin) // BLOCK), -(-length // BLOCK)
    lowest = begin + torch.arange(rows, device=first.device) * BLOCK
    highest = (lowest + BLOCK - 1).clamp(max=end - 1)
    from_block = first[:, lowest] // BLOCK
    to_block = (highest // BLOCK + 1).expand(batch, rows)
    # Visible throughout: from where the last query's document has begun to where the first query has passed the end.
    whole_to = torch.maximum(((lowest + 1) // BLOCK).expand(batch, rows), from_block)
    whole_from = torch.minimum(torch.maximum(-(-first[:, highest] // BLOCK), from_block), whole_to)
    number = torch.arange(columns, device=first.device)
    before = (whole_from - from_block)[..., None]
    partial = torch.where(number < before, from_block[..., None] + number, whole_to[..., None] + number - before)
    counts = (before[..., 0] + to_block - whole_to, whole_to - whole_from)
    indices = (partial, whole_from[..., None] + number)
    counted = [count[:, None].int().contiguous() for count in counts]
    placed = [index.clamp(max=columns - 1)[:, None].int().contiguous() for index in indices]
    return BlockMask.from_kv_blocks(
        counted[0], placed[0], counted[1], placed[1], BLOCK, _visible(first.int(), begin), (end - begin, length)
    )


def _visible(first: Tensor, begin: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + begin) & (key >= first[batch, query + begin])

    return visible


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def attention_flex(query: Tensor, key: Tensor, value: Tensor, plan: FlexPlan) -> Tensor:
    """As `attention_sdpa`: query [batch, groups, T, heads a group, d], key and value [batch, groups, T, 1, d] ->
    [batch, T, groups * heads a group * d]; queries may be fewer than keys, as the plan's positions say.
    """
    if not plan.pieces:
        return attention_sdpa(query, key, value, None)
    batch, groups, _, heads, size = query.shape
    # inside a layer that is compiled as a whole it is compiled with it
    plainly = query.device.type == "cpu" or torch.compiler.is_compiling()
    kernel = flex_attention if plainly else _compiled()
    outputs = []
    for q0, q1, mask in plan.pieces:
        queries = query[:, :, q0:q1].transpose(2, 3).reshape(batch, groups * heads, q1 - q0, size)
        out = kernel(queries, key.squeeze(3), value.squeeze(3), block_mask=mask, enable_gqa=heads > 1)
        outputs.append(out.transpose(1, 2).reshape(batch, q1 - q0, groups * heads * size))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
