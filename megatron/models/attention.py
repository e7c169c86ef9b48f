"""Grouped-query self-attention with rotary positions, masked by documents, of this rank's heads and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.model_shape import ModelShape
from megatron.kernels.attention import AttentionBackend, piece_starts
from megatron.kernels.choice import Kernels, ropes
from megatron.kernels.document_lengths import DocumentBounds
from megatron.kernels.rope import RopeTable, rope_table
from megatron.models.joined import JoinedProjections
from megatron.models.layers import Linear, RowLinear, column_linear, project
from megatron.parallel.context_attention import (
    ContextMethod,
    ContextPlan,
    choose_method,
    context_attention,
    plan_context,
)
from megatron.parallel.model_place import ONE_PROCESS, ModelPlace, ParameterCut


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers share of a microbatch: angles, and the mask in its backend's form."""

    table: RopeTable
    mask: ContextPlan


def context_method(shape: ModelShape, place: ModelPlace) -> tuple[ContextMethod, str]:
    """How context ranks attend to each other's positions, and why, in words. Raises ConfigError."""
    return choose_method(place.context_method, _key_value_heads(shape, place), place.context)


def _key_value_heads(shape: ModelShape, place: ModelPlace) -> int:
    """Those that a tensor rank computes: where there are fewer than ranks, several ranks compute the same one."""
    return max(1, shape.num_key_value_heads // place.tensor.size)


def plan_attention(
    shape: ModelShape,
    document_ids: Tensor,
    dtype: torch.dtype,
    backend: AttentionBackend,
    place: ModelPlace = ONE_PROCESS,
    positions: Tensor | None = None,
    bounds: DocumentBounds | None = None,
) -> AttentionPlan:
    """The plan for document_ids [batch, T] of whole rows. Without model.document_mask a row is one document.

    positions: those that this rank holds, [T_local]; None for all. bounds: of the same rows, where the host has counted
    them; without them some backends wait for the device.
    """
    if not shape.document_mask:
        document_ids, bounds = torch.zeros_like(document_ids), DocumentBounds(*document_ids.shape)
    first = piece_starts(document_ids)
    angles = torch.arange(first.shape[1], device=first.device) - first
    if positions is not None:
        angles = angles[:, positions]
    table = rope_table(angles, shape.rotary_dim, shape.rope_theta, dtype)
    method, _ = context_method(shape, place)
    return AttentionPlan(table, plan_context(first, dtype, place.context, method, backend, bounds))


class Attention(JoinedProjections):
    """query, key, value and output projections around one of the attention kernels."""

    core = staticmethod(context_attention)
    """What lies between the projections; `recompute` may wrap an instance's."""

    def __init__(self, shape: ModelShape, kernels: Kernels, place: ModelPlace = ONE_PROCESS) -> None:
        super().__init__()
        hidden, size, bias = shape.hidden_size, shape.head_dim, shape.attention_bias
        self.query = column_linear(hidden, shape.num_attention_heads * size, bias, kernels, place)
        self.key, self.value = (_key_or_value(shape, kernels, place) for _ in range(2))
        self.output = RowLinear(shape.num_attention_heads * size, hidden, bias, kernels, place)
        self.groups, self.head_dim, self.place = _key_value_heads(shape, place), size, place
        self.backend, self.rope = kernels.attention, ropes(kernels.rope)
        self.method, _ = context_method(shape, place)

    def _split(self, x: Tensor) -> Tensor:
        """[batch, T, heads * d] -> a view [batch, groups, T, heads a group, d]; group g is heads g*n to g*n + n."""
        batch, length, width = x.shape
        return x.view(batch, length, self.groups, width // (self.groups * self.head_dim), self.head_dim).transpose(1, 2)

    def together(self) -> tuple[Linear, ...]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def _turned(self, x: Tensor, table: RopeTable) -> tuple[Tensor, ...]:
        """Query, key and value of x, the first two turned by their positions."""
        if self.joined is None:
            query, key, value = (self._split(y) for y in project(x, self.together(), self.place))
            return *self.rope.qk(query, key, table), value
        widths = [linear.weight.shape[0] for linear in self.together()]
        whole = self.project_joined(x)
        # Not in a compiled program: where one begins with the joint projection, torch 2.13 loses the turning of its
        # gradient without a word. Nor where a library gives a view, which may not be changed.
        if self.rope.fused is None or torch.compiler.is_compiling() or whole._is_view():
            query, key, value = (self._split(y) for y in whole.split(widths, -1))
            return *self.rope.qk(query, key, table), value
        heads = widths[0] // self.head_dim
        # What splits the turned projection assembles its gradient, which nobody else has.
        turned = self.rope.fused(whole, table, heads, self.groups, self.head_dim, keep_gradient=False)
        return tuple(self._split(y) for y in turned.split(widths, -1))

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        query, key, value = self._turned(x, plan.table)
        attended = self.core(query, key, value, plan.mask, self.place.context, self.method, self.backend)
        return self.output(attended)


def _key_or_value(shape: ModelShape, kernels: Kernels, place: ModelPlace) -> Linear:
    """Cut by heads; with fewer heads than ranks, whole on every rank, which uses the one head of its queries."""
    heads, axis = shape.num_key_value_heads, place.tensor
    if heads >= axis.size:
        return column_linear(shape.hidden_size, heads * shape.head_dim, shape.attention_bias, kernels, place)
    whole = ParameterCut(None, partial=True)
    linear = Linear(shape.hidden_size, heads * shape.head_dim, shape.attention_bias, kernels, cut=whole)
    head = axis.rank * heads // axis.size
    linear.used = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
    return linear
