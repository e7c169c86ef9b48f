"""Attention over the context axis: ranks that share each sequence, and so see keys that others hold.

Two ways, both with separate communication Functions that hold no weight, so that schedules which run input and weight
gradients apart (zero-bubble) may replay them:

all-to-all (DeepSpeed Ulysses, Jacobs et al., arXiv 2309.14509): one exchange gives each rank all positions of
    1 / cp of the heads, the kernel of one process runs, a second exchange brings each rank its positions back. A
    rank sends (cp - 1) / cp of its queries, keys, values and outputs, however many ranks there are. Key-value heads
    must divide by cp. Positions lie on the ranks as cp chunks in order.
gather: keys and values are gathered, and their gradients reduce-scattered; queries stay. Nothing has to divide but the
    sequence, by 2 cp: rank r holds chunks r and 2 cp - 1 - r of 2 cp ("zigzag", as in Llama 3, arXiv 2407.21783), so
    that every rank has the same number of visible pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.config.errors import ConfigError
from megatron.kernels.attention import AttentionBackend, Block, Piece, attention_sdpa_pieces, plan_pieces
from megatron.kernels.attention_blockwise import attention_blockwise, plan_blocks
from megatron.kernels.attention_flex import FlexPlan, attention_flex, plan_flex
from megatron.kernels.attention_unfused import UnfusedPlan, attention_unfused, plan_unfused
from megatron.kernels.attention_varlen import VarlenPlan, attention_cudnn, attention_varlen, plan_cudnn, plan_varlen
from megatron.kernels.collectives import all_gather
from megatron.kernels.document_lengths import DocumentBounds
from megatron.parallel.axis import Axis

ContextMethod = Literal["all-to-all", "gather"]


@dataclass(frozen=True)
class ContextPlan:
    """The mask of a microbatch for this rank's queries, in its backend's form; shared by all layers."""

    pieces: tuple[Piece, ...] = ()
    blocks: tuple[Block, ...] = ()
    varlen: VarlenPlan | None = None
    flex: FlexPlan | None = None
    unfused: UnfusedPlan | None = None


def choose_method(asked: str, key_value_heads: int, axis: Axis) -> tuple[ContextMethod, str]:
    """(the method that runs, why, in words for the start log).

    asked: parallel.context_method. key_value_heads: those of one tensor rank. Raises ConfigError where all-to-all is
    asked for and heads do not divide.
    """
    each, left = divmod(key_value_heads, axis.size)
    count = f"{key_value_heads} key-value head{'' if key_value_heads == 1 else 's'} on each tensor rank"
    if axis.alone:
        return "all-to-all", "one context rank: attention without exchange"
    if asked == "gather":
        return "gather", "keys and values gathered, because parallel.context_method asks for it"
    if left == 0:
        why = "because parallel.context_method asks for it" if asked == "all-to-all" else "because heads divide"
        return "all-to-all", f"heads exchanged, {why}: {count} / {axis.size} context ranks = {each}"
    arithmetic = (
        f"{count} do not divide by parallel.context {axis.size} ({key_value_heads} = {axis.size} x {each} + {left})"
    )
    if asked == "all-to-all":
        raise ConfigError(
            f"parallel.context_method = all-to-all: {arithmetic}; set context_method to gather, or parallel.context "
            f"to a divisor of {key_value_heads}"
        )
    return "gather", f"keys and values gathered, because {arithmetic}"


def local_positions(length: int, axis: Axis, method: ContextMethod) -> Tensor:
    """The positions of the sequence that this rank holds, int64 [length / cp], ascending, on the CPU.

    They slice tokens, targets and document ids, and are what rope and dropout are told. Raises ConfigError where
    `length` does not divide by cp (all-to-all) or by 2 cp (gather).
    """
    if axis.alone:
        return torch.arange(length)
    parts = axis.size if method == "all-to-all" else 2 * axis.size
    each, left = divmod(length, parts)
    if left:
        words = f"parallel.context {axis.size}" if parts == axis.size else f"2 x parallel.context {axis.size}"
        raise ConfigError(
            f"sequence length {length} is not a multiple of {words} = {parts} ({length} = {parts} x {each} + {left}; "
            f"parallel.context_method = {method}): set seq_length to {max(parts, each * parts)} or {(each + 1) * parts}"
        )
    chunks = torch.arange(length).view(parts, each)
    if method == "all-to-all":
        return chunks[axis.rank].clone()
    return torch.cat((chunks[axis.rank], chunks[parts - 1 - axis.rank]))


def plan_context(
    first: Tensor,
    dtype: torch.dtype,
    axis: Axis,
    method: ContextMethod,
    backend: AttentionBackend,
    bounds: DocumentBounds | None = None,
) -> ContextPlan:
    """The plan for a microbatch whose positions see keys from first [batch, T] on (`piece_starts` of whole rows).

    bounds: `document_bounds` of the same rows, counted on the CPU before they were copied; without them "sdpa",
    "varlen" and "cudnn" make the host wait for a GPU. Raises UnavailableError for "cudnn" with keys gathered.
    """
    positions = None
    if not axis.alone and method == "gather":
        positions = local_positions(first.shape[1], axis, method)
    divided = None if bounds is None else bounds.documents > first.shape[0]
    match backend:
        case "sdpa":
            return ContextPlan(pieces=plan_pieces(first, positions, divided))
        case "blockwise":
            return ContextPlan(blocks=plan_blocks(first, dtype, positions=positions))
        case "varlen":
            return ContextPlan(varlen=plan_varlen(first, bounds, positions))
        case "cudnn":
            return ContextPlan(varlen=plan_cudnn(first, bounds, positions))
        case "flex":
            return ContextPlan(flex=plan_flex(first, divided, positions))
        case "unfused":
            return ContextPlan(unfused=plan_unfused(first, positions))


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: ContextPlan,
    axis: Axis,
    method: ContextMethod,
    backend: AttentionBackend,
) -> Tensor:
    """query [batch, groups, T_local, heads a group, d], key and value [batch, groups, T_local, 1, d], at the positions
    of `local_positions` -> [batch, T_local, groups * heads a group * d]. With one context rank it is the kernel itself.
    """
    if axis.alone:
        return _kernel(query, key, value, plan, backend)
    if method == "all-to-all":
        packed = _heads_to_positions(torch.cat((query, key, value), 3), axis)
        own = packed.split((query.shape[3], 1, 1), 3)
        return _positions_to_heads(_kernel(*own, plan, backend), axis)
    gathered = _gather_zigzag(torch.cat((key, value), 3), axis)
    return _kernel(query, *gathered.split((1, 1), 3), plan, backend)


def _kernel(query: Tensor, key: Tensor, value: Tensor, plan: ContextPlan, backend: AttentionBackend) -> Tensor:
    if plan.varlen is not None:
        return (attention_cudnn if backend == "cudnn" else attention_varlen)(query, key, value, plan.varlen)
    if plan.flex is not None:
        return attention_flex(query, key, value, plan.flex)
    if plan.unfused is not None:
        return attention_unfused(query, key, value, plan.unfused)
    if backend == "sdpa":
        return attention_sdpa_pieces(query, key, value, plan.pieces)
    return attention_blockwise(query, key, value, plan.blocks)


def _heads_to_positions(x: Tensor, axis: Axis) -> Tensor:
    """[batch, groups, T_local, n, d] of all groups -> [batch, groups / cp, T, n, d]."""
    batch, groups, length, heads, size = x.shape
    parts = x.view(batch, axis.size, groups // axis.size, length, heads, size).transpose(0, 1)
    received = _Exchange.apply(parts, axis)
    whole = received.permute(1, 2, 0, 3, 4, 5)
    return whole.reshape(batch, groups // axis.size, axis.size * length, heads, size)


def _positions_to_heads(x: Tensor, axis: Axis) -> Tensor:
    """[batch, T, width / cp] -> [batch, T_local, width]; rank r's part of the width is the r-th."""
    batch, length, width = x.shape
    parts = x.view(batch, axis.size, length // axis.size, width).transpose(0, 1)
    received = _Exchange.apply(parts, axis)
    return received.permute(1, 2, 0, 3).reshape(batch, length // axis.size, axis.size * width)


def _gather_zigzag(x: Tensor, axis: Axis) -> Tensor:
    """[batch, groups, T_local, n, d] -> [batch, groups, T, n, d] in the order of the sequence."""
    batch, groups, length, heads, size = x.shape
    gathered = _Gather.apply(x, axis)
    # From each rank two chunks: all first ones, in order, then all second ones, from the last rank's to the first's.
    halves = gathered.view(axis.size, batch, groups, 2, length // 2, heads, size)
    ordered = torch.cat((halves[:, :, :, 0], halves[:, :, :, 1].flip(0)))
    return ordered.permute(1, 2, 0, 3, 4, 5).reshape(batch, groups, axis.size * length, heads, size)


class _Exchange(torch.autograd.Function):
    """Part i of x [cp, ...] goes to rank i; part j of what is returned came from rank j. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_to_all(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.axis), None


class _Gather(torch.autograd.Function):
    """x of every rank, [cp, *x.shape]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
        all_gather(out, x.contiguous(), group=axis.group)
        return out.view(axis.size, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter as an exchange and a sum here: the same bytes on the wire, summed in rank order in wide
        # numbers and rounded once, where a ring would round bfloat16 at each hop.
        parts = _all_to_all(grad, ctx.axis)
        return parts.sum(0, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32).to(grad.dtype), None


def _all_to_all(x: Tensor, axis: Axis) -> Tensor:
    sent = x.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return received
