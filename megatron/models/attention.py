"""Grouped-query self-attention, masked by documents, of this rank's heads and positions.

Queries and keys are normed where the shape has norms for them, and turned by their positions where those are rotary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.config.kernel_checks import attention_limit
from megatron.config.model_shape import ModelShape
from megatron.kernels.attention import AttentionBackend, piece_starts
from megatron.kernels.choice import Kernels, ropes
from megatron.kernels.document_lengths import DocumentBounds
from megatron.kernels.rope import RopeTable, rope_table
from megatron.models.head_norm import HeadNorm, normed_heads
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
    """What all layers share of a microbatch: angles (None: nothing is turned), and the mask in its backend's form.

    local: the same of layers with a sliding window, where others have none.
    """

    table: RopeTable | None
    mask: ContextPlan
    local: AttentionPlan | None = None

    def of(self, slides: bool) -> AttentionPlan:
        """That of a layer."""
        return self.local if slides and self.local is not None else self


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
        bounds = DocumentBounds(*document_ids.shape)
    first = _starts(shape, document_ids)
    places, (method, _) = _places(first, positions), context_method(shape, place)

    def masked(seen: Tensor, counted: DocumentBounds | None) -> ContextPlan:
        return plan_context(seen, dtype, place.context, method, backend, counted)

    bites = shape.window_bites(first.shape[1])
    if bites and (why := attention_limit(backend, None, shape.head_dim, False, windowed=True)):
        raise ConfigError(f"kernels.attention = {backend} is not possible: {why}; set kernels.attention to auto")
    if not shape.sliding_pattern:
        return AttentionPlan(
            turning(shape, places, dtype), masked(*(_windowed(shape, first) if bites else (first, bounds)))
        )
    plan = AttentionPlan(turning(shape, places, dtype), masked(first, bounds))
    mask = masked(*_windowed(shape, first)) if bites else plan.mask
    return replace(plan, local=AttentionPlan(turning(shape, places, dtype, slides=True), mask))


def _windowed(shape: ModelShape, first: Tensor) -> tuple[Tensor, DocumentBounds]:
    """Where the keys of each position begin under the sliding window, and bounds as of documents that each begin
    another: plans of kernels that take whole documents cannot be made of them."""
    batch, length = first.shape
    earliest = torch.arange(length, device=first.device) - (shape.sliding_window - 1)
    return torch.maximum(first, earliest), DocumentBounds(batch * length, shape.sliding_window)


def document_places(shape: ModelShape, document_ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Each token's number within its document, int64 [batch, T_local]; arguments as of `plan_attention`."""
    return _places(_starts(shape, document_ids), positions)


def turning(shape: ModelShape, places: Tensor, dtype: torch.dtype, slides: bool = False) -> RopeTable | None:
    """The angles of tokens at these places [batch, T] of their documents; None where positions are not rotary. slides:
    of layers with a sliding window."""
    if shape.position_embedding != "rope":
        return None
    if slides and shape.rope_local_theta:
        return rope_table(places, shape.rotary_dim, shape.rope_local_theta, dtype)
    return rope_table(places, shape.rotary_dim, shape.rope_theta, dtype, shape.rope_scaling)


def _starts(shape: ModelShape, document_ids: Tensor) -> Tensor:
    return piece_starts(document_ids if shape.document_mask else torch.zeros_like(document_ids))


def _places(first: Tensor, positions: Tensor | None) -> Tensor:
    places = torch.arange(first.shape[1], device=first.device) - first
    return places if positions is None else places[:, positions]


class Attention(JoinedProjections):
    """query, key, value and output projections around one of the attention kernels."""

    core = staticmethod(context_attention)
    """What lies between the projections; `recompute` may wrap an instance's."""

    def __init__(self, shape: ModelShape, kernels: Kernels, place: ModelPlace = ONE_PROCESS) -> None:
        super().__init__()
        hidden, size, heads = shape.hidden_size, shape.head_dim, shape.num_attention_heads
        self.query = column_linear(hidden, heads * size, shape.projection_bias, kernels, place)
        self.key, self.value = (_key_or_value(shape, kernels, place) for _ in range(2))
        self.query_norm: HeadNorm | None = None
        self.key_norm: HeadNorm | None = None
        if shape.qk_norm != "none":
            self.query_norm = HeadNorm(shape, heads, kernels, place)
            self.key_norm = HeadNorm(shape, shape.num_key_value_heads, kernels, place)
        self.output = RowLinear(heads * size, hidden, shape.attention_bias, kernels, place)
        # What kernels multiply scores by is taken back.
        self.query_scale = shape.attention_multiplier * size**0.5 or None
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

    def _turned(self, x: Tensor, table: RopeTable | None) -> tuple[Tensor, ...]:
        """Query, key and value of x, the first two normed, and turned by their positions."""
        if self.joined is None:
            return self._prepared(*project(x, self.together(), self.place), table)
        widths = [linear.weight.shape[0] for linear in self.together()]
        whole = self.project_joined(x)
        between = table is None or self.query_norm is not None or self.query_scale is not None
        # Not in a compiled program: where one begins with the joint projection, torch 2.13 loses the turning of its
        # gradient without a word. Nor where a library gives a view, which may not be changed.
        if self.rope.fused is None or between or torch.compiler.is_compiling() or whole._is_view():
            return self._prepared(*whole.split(widths, -1), table)
        heads = widths[0] // self.head_dim
        # What splits the turned projection assembles its gradient, which nobody else has.
        turned = self.rope.fused(whole, table, heads, self.groups, self.head_dim, keep_gradient=False)
        return tuple(self._split(y) for y in turned.split(widths, -1))

    def _prepared(self, query: Tensor, key: Tensor, value: Tensor, table: RopeTable | None) -> tuple[Tensor, ...]:
        if self.query_norm is not None and self.key_norm is not None:
            query, key = normed_heads((query, key), (self.query_norm, self.key_norm), self.place.tensor)
        if self.query_scale is not None:
            query = query * self.query_scale
        query, key, value = (self._split(y) for y in (query, key, value))
        if table is not None:
            query, key = self.rope.qk(query, key, table)
        return query, key, value

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        query, key, value = self._turned(x, plan.table)
        attended = self.core(query, key, value, plan.mask, self.place.context, self.method, self.backend)
        return self.output(attended)


def _key_or_value(shape: ModelShape, kernels: Kernels, place: ModelPlace) -> Linear:
    """Cut by heads; with fewer heads than ranks, whole on every rank, which uses the one head of its queries."""
    heads, axis = shape.num_key_value_heads, place.tensor
    if heads >= axis.size:
        return column_linear(shape.hidden_size, heads * shape.head_dim, shape.projection_bias, kernels, place)
    whole = ParameterCut(None, partial=True)
    linear = Linear(shape.hidden_size, heads * shape.head_dim, shape.projection_bias, kernels, cut=whole)
    head = axis.rank * heads // axis.size
    linear.used = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
    return linear
