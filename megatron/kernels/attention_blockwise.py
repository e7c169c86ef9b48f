"""Causal, document-masked attention for CPU: few large batched GEMMs over blocks of queries.

Each block of queries meets only keys that some row may see, all rows and heads at once; query heads that share a key
head are stacked into the GEMM's rows, so grouped-query attention copies nothing. The softmax is exact for each block
(its whole row of scores is there), with float32 statistics inside torch's kernel; scores themselves have the dtype of
the inputs, which in bfloat16 doubles the rms error of torch's SDPA (7.7e-4 against 4.1e-4 for unit inputs).

Processor milliseconds of one AVX512-BF16 core for one layer, forward and backward: batch 8, T 512, 8 heads of 32 on 4
key heads, three documents a row, torch 2.13 (`python benchmarks/step_cpu.py --attention --threads 1` measures again):

                                     float32   bfloat16
    SDPA, causal only                     99        107
    SDPA, bool mask                      106        112
    SDPA, additive mask                  105        109
    this, blocks of 64                    76         38
    this, blocks of 128                   80         37
    this, blocks of 256                   92         40
    this, one block of 512               119         47

SDPA in a loop over documents took three quarters of SDPA's time in float32 and all of it in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.attention import Block, runs_of, visibility

BLOCK = 128
"""Queries in a block: 62 % of the full square at T 512, with GEMMs still large."""

KEPT_BYTES = 64 << 20
"""Probabilities of a layer are kept for the backward pass up to this size and made again, bit for bit, above it."""


def plan_blocks(
    first: Tensor, dtype: torch.dtype, block: int = BLOCK, positions: Tensor | None = None
) -> tuple[Block, ...]:
    """The blocks for a microbatch whose positions see keys from first [batch, T] on.

    positions: those of the queries at hand, int64 [T_local], where they are not all. A block's queries are numbered
    as they lie, its keys by their positions.
    """
    runs = ((0, first.shape[1], 0),) if positions is None else runs_of(positions)
    blocks = []
    triangles: dict[int, Tensor] = {}
    for run_start, run_end, begin in runs:
        for q0 in range(run_start, run_end, block):
            q1 = min(q0 + block, run_end)
            p0 = begin + q0 - run_start
            p1 = p0 + q1 - q0
            k0, latest = int(first[:, p0].min()), int(first[:, p1 - 1].max())
            if latest <= k0:
                if q1 - q0 not in triangles:
                    triangles[q1 - q0] = _additive(visibility(torch.zeros_like(first[:1]), p0, p1, p0, p1), dtype)
                blocks.append(Block(q0, q1, k0, p1, p0, triangles[q1 - q0]))
            else:
                blocks.append(Block(q0, q1, k0, p1, k0, _additive(visibility(first, p0, p1, k0, p1), dtype)))
    return tuple(blocks)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return mask[:, None, :, None, :]


def _probabilities(query: Tensor, key: Tensor, block: Block, heads: int, batch: int) -> Tensor:
    """Softmax of the block's masked scores, [batch * groups, (q1 - q0) * heads, k1 - k0]; query is already scaled."""
    rows = query[:, block.q0 * heads : block.q1 * heads]
    scores = torch.bmm(rows, key[:, block.k0 : block.k1].transpose(1, 2))
    square = scores.view(batch, -1, block.q1 - block.q0, heads, block.k1 - block.k0)
    square[..., block.m0 - block.k0 :].add_(block.mask)
    return torch.softmax(scores, -1)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        batch, groups, length, heads, size = query.shape
        scaled = (query * size**-0.5).reshape(batch * groups, length * heads, size)
        keys = key.reshape(batch * groups, key.shape[2], size)
        values = value.reshape(batch * groups, key.shape[2], size)
        out = torch.empty_like(scaled)
        kept: list[Tensor] = []
        elements = sum((b.q1 - b.q0) * (b.k1 - b.k0) for b in blocks) * batch * groups * heads
        keep = elements * query.element_size() <= KEPT_BYTES and any(ctx.needs_input_grad)
        for block in blocks:
            weights = _probabilities(scaled, keys, block, heads, batch)
            out[:, block.q0 * heads : block.q1 * heads] = torch.bmm(weights, values[:, block.k0 : block.k1])
            if keep:
                kept.append(weights)
        ctx.save_for_backward(scaled, keys, values, *kept)
        ctx.blocks, ctx.shape = blocks, query.shape
        joined = out.view(batch, groups, length, heads * size).transpose(1, 2)
        return joined.reshape(batch, length, groups * heads * size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        scaled, keys, values, *kept = ctx.saved_tensors
        batch, groups, length, heads, size = ctx.shape
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        upstream = grad.view(batch, length, groups, heads * size).transpose(1, 2)
        upstream = upstream.reshape(batch * groups, length * heads, size)
        query_grad = torch.empty_like(scaled)
        # Transposed, because a GEMM with the probabilities on the right is the quicker one here.
        key_grad = torch.zeros(batch * groups, size, keys.shape[1], dtype=wide, device=grad.device)
        value_grad = torch.zeros_like(key_grad)
        for number, block in enumerate(ctx.blocks):
            rows, columns = slice(block.q0 * heads, block.q1 * heads), slice(block.k0, block.k1)
            weights = kept[number] if kept else _probabilities(scaled, keys, block, heads, batch)
            piece = upstream[:, rows]
            value_grad[:, :, columns] += torch.bmm(piece.transpose(1, 2).contiguous(), weights)
            slopes = torch.bmm(piece, values[:, columns].transpose(1, 2))
            slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
            query_grad[:, rows] = torch.bmm(slopes, keys[:, columns])
            key_grad[:, :, columns] += torch.bmm(scaled[:, rows].transpose(1, 2).contiguous(), slopes)
        query_grad = query_grad.mul_(size**-0.5).view(ctx.shape)
        narrow = (batch, groups, keys.shape[1], 1, size)
        return query_grad, *(g.transpose(1, 2).to(grad.dtype).reshape(narrow) for g in (key_grad, value_grad)), None


def attention_blockwise(query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """As `attention_sdpa`: query [batch, groups, T, heads a group, d], key and value [batch, groups, T, 1, d] ->
    [batch, T, groups * heads a group * d]; queries may be fewer than keys, as the plan's `positions` say.
    Deterministic for a given number of threads.
    """
    return _Blockwise.apply(query, key, value, blocks)
