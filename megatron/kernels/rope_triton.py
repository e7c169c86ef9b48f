"""Rotary positions in Triton: equal to `rope.py`, in one launch that reads any strides and writes each byte once.

Each element is read and written once: 4 bytes in bfloat16. For 32 query and 8 key heads of 128 and 16,384 tokens that
is 336 MB, a limit of 78 us at 4.3 TB/s; `rope_qk_triton` does both in one launch. The in-place form moves the same
bytes and saves the copies' memory. The eager definition rounds once more in half precision (x * cos, before it adds);
here all is computed in float32 (float64 for float64) and rounded once.

A program holds the cosines and sines of a tile of tokens in registers and goes through a few heads with them, so that
the table is read once for those heads. Of the table it reads half: see `RopeTable`. Neighbouring programs have the same
tokens and the next heads, which lie side by side in a projection. The gradient is written in the memory order of the
input, so that the view that cut heads from a projection goes back without a copy. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from megatron.kernels.launch_triton import power_of_two, processors, require_triton
from megatron.kernels.rope import RopeTable, check_table, fused_heads

_TILE = 1024
"""Elements of half a turned head over a tile's tokens: with 4 warps 8 a thread, 16 bytes of bfloat16 a load."""

_WARPS = 4

_NO_KEY = (None,) * 12


@triton.jit
def _turn_heads(
    x, out, chunk, each, heads, in_group, batch, token, there, cos, sin,
    x_batch, x_group, x_token, x_head, out_batch, out_group, out_token, out_head,
    SIZE: tl.constexpr, ROTARY: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns the heads of one chunk over a tile of tokens; cos and sin are [tokens, HALF_BLOCK]."""
    half = tl.arange(0, HALF_BLOCK)[None, :]
    turned = there[:, None] & (half < ROTARY // 2)
    source = x + batch * x_batch + (token * x_token)[:, None]
    target = out + batch * out_batch + (token * out_token)[:, None]
    first = chunk * each
    for number in range(tl.minimum(each, heads - first)):
        group = ((first + number) // in_group).to(tl.int64)
        head = ((first + number) % in_group).to(tl.int64)
        x_at = source + (group * x_group + head * x_head)
        out_at = target + (group * out_group + head * out_head)
        a = tl.load(x_at + half, mask=turned, other=0.0).to(cos.dtype)
        b = tl.load(x_at + ROTARY // 2 + half, mask=turned, other=0.0).to(cos.dtype)
        tl.store(out_at + half, (a * cos - b * sin).to(out.dtype.element_ty), mask=turned)
        tl.store(out_at + ROTARY // 2 + half, (b * cos + a * sin).to(out.dtype.element_ty), mask=turned)
        if REST_BLOCK > 0:
            rest = ROTARY + tl.arange(0, REST_BLOCK)[None, :]
            kept = there[:, None] & (rest < SIZE)
            tl.store(out_at + rest, tl.load(x_at + rest, mask=kept), mask=kept)


@triton.jit
def _rope_kernel(
    cos, sin, table_batch, length, tiles, each, chunks, query_chunks,
    query, query_out, query_heads, query_in_group,
    query_batch, query_group, query_token, query_head,
    query_out_batch, query_out_group, query_out_token, query_out_head,
    key, key_out, key_heads, key_in_group,
    key_batch, key_group, key_token, key_head,
    key_out_batch, key_out_group, key_out_token, key_out_head,
    BACK: tl.constexpr, SIZE: tl.constexpr, ROTARY: tl.constexpr,
    TOKENS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program turns `each` heads of TOKENS tokens of one row of the batch; key may be None. BACK turns by -sin."""
    wide = tl.float64 if query.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    chunk = program % chunks
    token = ((program // chunks) % tiles) * TOKENS + tl.arange(0, TOKENS)
    there = token < length
    token = token.to(tl.int64)
    batch = (program // chunks // tiles).to(tl.int64)
    half = tl.arange(0, HALF_BLOCK)[None, :]
    at = batch * table_batch + (token * ROTARY)[:, None] + half
    mask = there[:, None] & (half < ROTARY // 2)
    c = tl.load(cos + at, mask=mask, other=0.0).to(wide)
    s = tl.load(sin + at, mask=mask, other=0.0).to(wide)  # the first half: -sin
    s = s if BACK else -s
    if key is None or chunk < query_chunks:
        _turn_heads(
            query, query_out, chunk, each, query_heads, query_in_group, batch, token, there, c, s,
            query_batch, query_group, query_token, query_head,
            query_out_batch, query_out_group, query_out_token, query_out_head, SIZE, ROTARY, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        _turn_heads(
            key, key_out, chunk - query_chunks, each, key_heads, key_in_group, batch, token, there, c, s,
            key_batch, key_group, key_token, key_head,
            key_out_batch, key_out_group, key_out_token, key_out_head, SIZE, ROTARY, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip


def _launch(pairs: list[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor, back: bool) -> None:
    """Turns one or two tensors [batch, groups, T, heads, head_dim] into their outputs, which may be the inputs."""
    pairs = [(x if x.stride(-1) == 1 else x.contiguous(), out) for x, out in pairs if x.numel()]
    if not pairs:
        return
    batch, _, length, _, size = pairs[0][0].shape
    cos, sin, rotary = cos.contiguous(), sin.contiguous(), cos.shape[-1]
    in_place = all(x is out for x, out in pairs)
    half = power_of_two(rotary // 2)
    rest = 0 if in_place or rotary == size else power_of_two(size - rotary)
    # in place half a head's tile has no fewer elements than there are threads, so that no two of them share an element
    tokens = max(1, _TILE // max(half, rest))
    tiles = triton.cdiv(length, tokens)
    counts = [x.shape[1] * x.shape[3] for x, _ in pairs]
    # 8 heads share what is read of the table, fewer where the GPU would not be full: 32 programs a processor
    each = max(1, min(8, sum(counts) * tiles * batch // (32 * processors(cos.device))))
    chunks = [triton.cdiv(count, each) for count in counts]
    told = [
        (x, out, count, x.shape[3], *x.stride()[:4], *out.stride()[:4])
        for (x, out), count in zip(pairs, counts, strict=True)
    ]
    _rope_kernel[(sum(chunks) * tiles * batch,)](
        cos, sin, 0 if cos.shape[0] == 1 else length * rotary, length, tiles, each, sum(chunks), chunks[0],
        *told[0], *(told[1] if len(told) == 2 else _NO_KEY),
        BACK=back, SIZE=size, ROTARY=rotary, TOKENS=tokens, HALF_BLOCK=half, REST_BLOCK=rest, num_warps=_WARPS,
    )  # fmt: skip


def _memory_order(x: Tensor) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions lie in memory in the order of x, the last one innermost."""
    strides = torch.empty_like(x, device="meta").stride()
    return strides if strides[-1] == 1 else torch.empty(x.shape, device="meta").stride()


class _Rope(torch.autograd.Function):
    """Of one tensor, or of two; the second may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        given = [x] if key is None else [x, key]
        pairs = [(tensor, tensor.new_empty(tensor.shape)) for tensor in given]
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.shapes = [(tensor.shape, _memory_order(tensor)) for tensor in given]
        _launch(pairs, cos, sin, back=False)
        return pairs[0][1], pairs[1][1] if key is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        made = [
            None if grad is None else grad.new_empty_strided(*shape)
            for grad, shape in zip(grads, ctx.shapes, strict=False)
        ]
        pairs = [(grad, out) for grad, out in zip(grads, made, strict=False) if grad is not None and out is not None]
        _launch(pairs, *ctx.saved_tensors, back=True)
        return made[0], made[1] if len(made) == 2 else None, None, None


def rope_triton(x: Tensor, table: RopeTable) -> Tensor:
    """`rope`: turns x [batch, groups, T, heads, head_dim] (any strides) and returns it contiguous.

    Raises ValueError where the table does not fit, UnavailableError where Triton cannot run.
    """
    require_triton(x.device)
    check_table(x.shape[0], x.shape[2], x.shape[4], table)
    return _Rope.apply(x, None, table.cos, table.sin)[0]


def rope_qk_triton(query: Tensor, key: Tensor, table: RopeTable) -> tuple[Tensor, Tensor]:
    """`rope_qk` in one launch, forward and backward: query and key [batch, groups, T, heads a group, head_dim], whose
    groups and heads may differ. Raises ValueError where they or the table do not fit.
    """
    require_triton(query.device)
    check_table(query.shape[0], query.shape[2], query.shape[4], table)
    if (key.shape[0], key.shape[2], key.shape[4], key.dtype) != (*query.shape[0:5:2], query.dtype):
        raise ValueError(
            f"query and key have one batch, T, head_dim and dtype, not {list(query.shape)} {query.dtype} and "
            f"{list(key.shape)} {key.dtype}"
        )
    return _Rope.apply(query, key, table.cos, table.sin)


class _RopeFused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, keep_gradient: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.head_dim, ctx.keep_gradient = heads, head_dim, keep_gradient
        ctx.mark_dirty(qkv)
        turned = _heads(qkv, heads, head_dim)
        _launch([(turned, turned)], cos, sin, back=False)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.keep_gradient or not grad.is_contiguous()
        out = torch.empty_like(grad, memory_format=torch.contiguous_format) if kept else grad
        turned = _heads(out, ctx.heads, ctx.head_dim)
        if kept:
            values = ctx.heads * ctx.head_dim
            out[..., values:].copy_(grad[..., values:])
            _launch([(_heads(grad, ctx.heads, ctx.head_dim), turned)], *ctx.saved_tensors, back=True)
        else:
            _launch([(turned, turned)], *ctx.saved_tensors, back=True)
            increment_version(out)  # torch does not see what a kernel writes
        return out, None, None, None, None, None


def _heads(fused: Tensor, heads: int, head_dim: int) -> Tensor:
    """The first heads of fused [batch, T, all heads * head_dim] as a view [batch, 1, T, heads, head_dim]."""
    return fused.unflatten(-1, (-1, head_dim))[:, None, :, :heads]


def rope_fused_triton_(
    qkv: Tensor, table: RopeTable, query_heads: int, key_heads: int, head_dim: int, keep_gradient: bool = True
) -> Tensor:
    """`rope_fused_`: turns queries and keys of a fused projection in place, in one launch, and returns qkv.

    qkv [batch, T, (query_heads + 2 * key_heads) * head_dim], contiguous, no leaf that requires a gradient. With
    keep_gradient=False the backward is one launch in place on the gradient that comes in, where that is contiguous;
    nobody else may then need it: read `rope_fused_`. Otherwise it is one launch into a new tensor and a copy of the
    values' gradient. Raises ValueError where shapes do not fit.
    """
    require_triton(qkv.device)
    heads = fused_heads(qkv, table, query_heads, key_heads, head_dim)
    return _RopeFused.apply(qkv, table.cos, table.sin, heads, head_dim, keep_gradient)
