"""Document-masked attention by kernels of variable length: positions that may not see each other are never multiplied.

Queries, keys and values are packed, [batch * T, heads, d], and the kernel is told where documents start among those
positions (`document_lengths.py`), on the device; a new number of documents changes the length of one small tensor.
Where no row is divided and all positions are at hand, causality says it all, and the plan is empty: torch's SDPA runs,
which has quicker kernels for that.

varlen: aten::_flash_attention_forward, which is what torch.nn.attention.varlen calls. Its door is not used: importing
    it loads torch's compiler, and torch 2.11's cannot be told of grouped heads, which the operation itself takes: keys
    and values are not repeated. Its causal mask ends at a document's last query, so queries may be its last ones.
cudnn: aten::_cudnn_attention_forward. Not before torch 2.15 (`attention_choice.py` says why). Its causal mask starts
    at a document's first query, so all of them must be there; keys and values of grouped heads are repeated, because
    torch refuses them there.

Gradients: flash's backward adds up those of queries in an order that varies, unless
torch.use_deterministic_algorithms(True) is set; cuDNN's are not deterministic.

Neither operation exists on CPUs. Read in torch's sources (aten/src/ATen/native/transformers/cuda and native/cudnn), and
tested here with stand-ins for both; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.config.errors import UnavailableError
from megatron.kernels.attention import attention_sdpa, runs_of
from megatron.kernels.document_lengths import TILE, DocumentBounds, asked_bounds, document_starts, roomy


@dataclass(frozen=True)
class PackedPiece:
    """Queries [q0, q1) of every row, packed: document i's are [query_starts[i], query_starts[i + 1]) of them, and the
    last ones to see keys [key_starts[i], key_starts[i + 1]) of all batch * T. Starts are int32 [documents + 1] on the
    device; longest_query and longest_key are bounds.
    """

    q0: int
    q1: int
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class VarlenPlan:
    """A microbatch's documents for `attention_varlen` or `attention_cudnn`; no pieces: causality says it all."""

    pieces: tuple[PackedPiece, ...]


Packed = Callable[[Tensor, Tensor, Tensor, PackedPiece], Tensor]
"""query [queries, heads, d], key and value [batch * T, groups, d] -> [queries, heads, d]."""


def plan_varlen(first: Tensor, bounds: DocumentBounds | None = None, positions: Tensor | None = None) -> VarlenPlan:
    """The plan for a microbatch whose positions see keys from first [batch, T] on.

    bounds: of its documents; None: the host waits for the device to count them. positions: those of the queries at
    hand, ascending int64 [T_local] of the CPU, where they are not all.
    """
    batch, length = first.shape
    bounds = bounds or asked_bounds(first)
    documents = roomy(bounds.documents)
    if positions is None:
        if bounds.documents <= batch:
            return VarlenPlan(())
        starts, longest = document_starts(first, documents), _whole_tiles(bounds.longest)
        return VarlenPlan((PackedPiece(0, length, starts, starts, longest, longest),))
    pieces = []
    for q0, q1, begin in runs_of(positions):
        # Keys behind the run make up documents without queries, so that the others end where the run does.
        keys = document_starts(first, documents, cut=begin + q1 - q0)
        row = torch.div(keys, length, rounding_mode="floor")
        queries = row * (q1 - q0) + (keys - row * length - begin).clamp(0, q1 - q0)
        longest_query = _whole_tiles(min(bounds.longest, q1 - q0))
        pieces.append(PackedPiece(q0, q1, queries, keys, longest_query, _whole_tiles(bounds.longest)))
    return VarlenPlan(tuple(pieces))


def plan_cudnn(first: Tensor, bounds: DocumentBounds | None = None, positions: Tensor | None = None) -> VarlenPlan:
    """As `plan_varlen`, with every size a power of two: cuDNN plans anew for each one. Its longest documents are above
    128 positions, because it has no kernel for shorter ones. Raises UnavailableError for positions.
    """
    if positions is not None:
        raise UnavailableError(
            "kernels.attention = cudnn needs all of a document's queries on one rank: set parallel.context_method to "
            "all-to-all, or kernels.attention to varlen"
        )
    batch, length = first.shape
    bounds = bounds or asked_bounds(first)
    if bounds.documents <= batch:
        return VarlenPlan(())
    starts, longest = document_starts(first, _power_of_two(bounds.documents)), _power_of_two(max(256, bounds.longest))
    return VarlenPlan((PackedPiece(0, length, starts, starts, longest, longest),))


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _whole_tiles(longest: int) -> int:
    # Never 1: with single queries flash folds grouped heads into a shape that empty documents do not have.
    return max(1, -(-longest // TILE)) * TILE


def attention_varlen(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan) -> Tensor:
    """As `attention_sdpa`: query [batch, groups, T, heads a group, d], key and value [batch, groups, T, 1, d] ->
    [batch, T, groups * heads a group * d]; queries may be fewer than keys, as the plan's positions say.

    float16 or bfloat16, d a multiple of 8 up to 256. Inputs that lie as [batch, T, groups, heads, d] are not copied.
    """
    if not plan.pieces:
        return attention_sdpa(query, key, value, None)
    return _by_pieces(query, key, value, plan, _flash)


def attention_cudnn(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan) -> Tensor:
    """As `attention_varlen`, for plans of `plan_cudnn`; d up to 128. Without documents it is cuDNN's dense kernel."""
    if not plan.pieces:
        # which has no kernel for a single key
        return _dense_cudnn(query, key, value) if key.shape[2] > 1 else attention_sdpa(query, key, value, None)
    return _by_pieces(query, key, value, plan, _cudnn)


def _by_pieces(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, kernel: Packed) -> Tensor:
    keys, values = _packed(key), _packed(value)
    outputs = []
    for piece in plan.pieces:
        out = kernel(_packed(query[:, :, piece.q0 : piece.q1]), keys, values, piece)
        outputs.append(out.reshape(query.shape[0], piece.q1 - piece.q0, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _packed(x: Tensor) -> Tensor:
    """[batch, groups, T, n, d] -> [batch * T, groups * n, d]; a view where x lies as [batch, T, groups, n, d]."""
    batch, groups, length, heads, size = x.shape
    return x.transpose(1, 2).reshape(batch * length, groups * heads, size)


def _flash(query: Tensor, key: Tensor, value: Tensor, piece: PackedPiece) -> Tensor:
    # torch's own derivative: it hands the saved log-sum-exp to aten::_flash_attention_backward
    out: Tensor = torch.ops.aten._flash_attention_forward.default(
        query, key, value, piece.query_starts, piece.key_starts, piece.longest_query, piece.longest_key,
        0.0, True, False,
    )[0]  # fmt: skip
    return out


def _cudnn(query: Tensor, key: Tensor, value: Tensor, piece: PackedPiece) -> Tensor:
    heads = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2) for x in (key, value))
    out: Tensor = _CudnnPacked.apply(query, key, value, piece.key_starts, piece.longest_key)
    return out


class _CudnnPacked(torch.autograd.Function):
    """Of contiguous tensors, since cuDNN is given offsets of heads * d elements a position."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        results = torch.ops.aten._cudnn_attention_forward.default(
            query, key, value, None, starts, starts, longest, longest, True, 0.0, True, False
        )
        out, logsumexp, seed, offset = results[0], results[1], results[6], results[7]
        ctx.save_for_backward(query, key, value, out, logsumexp, starts, seed, offset)
        ctx.longest = longest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, starts, seed, offset = ctx.saved_tensors
        grads = torch.ops.aten._cudnn_attention_backward.default(
            grad.contiguous(), query, key, value, out, logsumexp, seed, offset, None, starts, starts,
            ctx.longest, ctx.longest, 0.0, True,
        )  # fmt: skip
        return *grads, None, None


def _dense_cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, groups, length, heads, size = query.shape
    queries = query.transpose(2, 3).reshape(batch, groups * heads, length, size)
    out = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        queries, key.squeeze(3), value.squeeze(3), None, True, 0.0, True, False
    )[0]
    return out.transpose(1, 2).reshape(batch, length, groups * heads * size)
