"""Grouped-query self-attention with rotary positions, masked by documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron.config.model_shape import ModelShape
from megatron.kernels.attention import Block, attention_sdpa, piece_starts, plan_for_sdpa
from megatron.kernels.attention_blockwise import attention_blockwise, plan_blocks
from megatron.kernels.rope import RopeTable, rope, rope_table
from megatron.models.layers import Linear

AttentionBackend = Literal["sdpa", "blockwise"]


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers share of a microbatch: angles, and the mask in its backend's form."""

    table: RopeTable
    mask: Tensor | None
    blocks: tuple[Block, ...]


def plan_attention(
    shape: ModelShape, document_ids: Tensor, dtype: torch.dtype, backend: AttentionBackend
) -> AttentionPlan:
    """The plan for document_ids [batch, T]. Without model.document_mask a row is one document, whatever they say."""
    first = piece_starts(document_ids if shape.document_mask else torch.zeros_like(document_ids))
    positions = torch.arange(first.shape[1], device=first.device) - first
    table = rope_table(positions, shape.rotary_dim, shape.rope_theta, dtype)
    if backend == "sdpa":
        return AttentionPlan(table, plan_for_sdpa(first), ())
    return AttentionPlan(table, None, plan_blocks(first, dtype))


class Attention(nn.Module):
    """query, key, value and output projections around one of the attention kernels."""

    def __init__(self, shape: ModelShape, backend: AttentionBackend) -> None:
        super().__init__()
        hidden, size, bias = shape.hidden_size, shape.head_dim, shape.attention_bias
        self.query = Linear(hidden, shape.num_attention_heads * size, bias)
        self.key = Linear(hidden, shape.num_key_value_heads * size, bias)
        self.value = Linear(hidden, shape.num_key_value_heads * size, bias)
        self.output = Linear(shape.num_attention_heads * size, hidden, bias, residual=True)
        self.groups, self.head_dim, self.backend = shape.num_key_value_heads, size, backend

    def _split(self, x: Tensor) -> Tensor:
        """[batch, T, heads * d] -> a view [batch, groups, T, heads a group, d]; group g is heads g*n to g*n + n."""
        batch, length, width = x.shape
        return x.view(batch, length, self.groups, width // (self.groups * self.head_dim), self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        query = rope(self._split(self.query(x)), plan.table)
        key = rope(self._split(self.key(x)), plan.table)
        value = self._split(self.value(x))
        if self.backend == "sdpa":
            return self.output(attention_sdpa(query, key, value, plan.mask))
        return self.output(attention_blockwise(query, key, value, plan.blocks))
