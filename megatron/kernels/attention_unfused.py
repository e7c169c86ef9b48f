"""Attention as two batched products around a masked softmax: for models that need the scores, and to compare with.

Query heads that share a key head are stacked into a product's rows, [batch * groups, T * heads a group, d], so keys and
values are not repeated. Scores have the dtype of the inputs and are turned into weights in place, by
`masked_softmax.py` or on GPUs `masked_softmax_triton.py`; weights are T^2 numbers a head, kept for the backward pass up
to KEPT_BYTES and made again, bit for bit, above. The whole square is computed, twice what causality needs.
Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.masked_softmax import EAGER, InPlaceSoftmax, Span, document_span, masked_softmax

KEPT_BYTES = 256 << 20
"""Weights of a layer that are kept."""


@dataclass(frozen=True)
class UnfusedPlan:
    """What each query sees, and the softmax that runs."""

    span: Span
    softmax: InPlaceSoftmax


def plan_unfused(first: Tensor, positions: Tensor | None = None) -> UnfusedPlan:
    """The plan for a microbatch whose positions see keys from first [batch, T] on; positions: those of the queries at
    hand, int64 [T_local], where they are not all.
    """
    return UnfusedPlan(document_span(first, positions), _softmax_on(first.device))


def _softmax_on(device: torch.device) -> InPlaceSoftmax:
    if device.type != "cuda":
        return EAGER
    from megatron.kernels.masked_softmax_triton import TRITON

    return TRITON


def attention_unfused(query: Tensor, key: Tensor, value: Tensor, plan: UnfusedPlan) -> Tensor:
    """As `attention_sdpa`: query [batch, groups, T, heads a group, d], key and value [batch, groups, T, 1, d] ->
    [batch, T, groups * heads a group * d]; queries may be fewer than keys, as the plan's positions say.
    """
    return _Unfused.apply(query, key, value, plan)


def attention_weights(query: Tensor, key: Tensor, plan: UnfusedPlan) -> Tensor:
    """The weights alone, [batch, groups, T, heads a group, K], by torch's operations."""
    scores = torch.matmul(query.flatten(2, 3), key.squeeze(3).transpose(2, 3))
    return masked_softmax(scores.unflatten(2, query.shape[2:4]), query.shape[4] ** -0.5, plan.span)


def _weights(query: Tensor, key: Tensor, shape: torch.Size, plan: UnfusedPlan) -> Tensor:
    """[batch * groups, T * heads, K] of query [batch * groups, T * heads, d], key [batch * groups, K, d]."""
    batch, groups, length, heads, size = shape
    scores = torch.bmm(query, key.transpose(1, 2))
    plan.softmax.forward(scores.view(batch, groups, length, heads, key.shape[1]), size**-0.5, plan.span, None)
    return scores


class _Unfused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: UnfusedPlan) -> Tensor:
        batch, groups, length, heads, size = query.shape
        rows = query.reshape(batch * groups, length * heads, size)
        keys, values = (x.reshape(batch * groups, key.shape[2], size) for x in (key, value))
        weights = _weights(rows, keys, query.shape, plan)
        out = torch.bmm(weights, values)
        keep = weights.numel() * weights.element_size() <= KEPT_BYTES
        ctx.save_for_backward(rows, keys, values, weights if keep else None)
        ctx.plan, ctx.shape = plan, query.shape
        joined = out.view(batch, groups, length, heads * size).transpose(1, 2)
        return joined.reshape(batch, length, groups * heads * size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, weights = ctx.saved_tensors
        batch, groups, length, heads, size = ctx.shape
        if weights is None:
            weights = _weights(rows, keys, ctx.shape, ctx.plan)
        upstream = grad.reshape(batch, length, groups, heads * size).transpose(1, 2)
        upstream = upstream.reshape(batch * groups, length * heads, size)
        value_grad = torch.bmm(weights.transpose(1, 2), upstream)
        slopes = torch.bmm(upstream, values.transpose(1, 2))
        five = (batch, groups, length, heads, keys.shape[1])
        ctx.plan.softmax.backward(weights.view(five), slopes.view(five), size**-0.5, ctx.plan.span)
        query_grad = torch.bmm(slopes, keys).view(ctx.shape)
        key_grad = torch.bmm(slopes.transpose(1, 2), rows)
        narrow = (batch, groups, keys.shape[1], 1, size)
        return query_grad, key_grad.view(narrow), value_grad.view(narrow), None
