"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's convention.

Dimension i of the first half of the turned part pairs with dimension i of its second half; the angle of pair i at
position p is p * theta^(-2i / rotary_dim), its frequency perhaps scaled for longer contexts (config/rope_scaling.py).
Dimensions behind rotary_dim pass unchanged (GPT-NeoX).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.config.rope_scaling import RopeScaling


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of every position's angles, [batch, 1, T, 1, rotary_dim]; sin carries the sign of its half.

    So cos repeats its first half, and the first half of sin is its second half negated: a turn is a rotation, and its
    gradient is turned back by -sin. batch may be 1 for positions that all rows share.
    """

    cos: Tensor
    sin: Tensor


def rope_table(
    positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> RopeTable:
    """Angles for positions [batch, T] (int64). Computed in float32, or float64 for float64; then cast to dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = rope_frequencies(rotary_dim, theta, wide, positions.device, scaling)
    angles = positions[:, None, :, None, None].to(wide) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.attention_scale != 1:
        # Both turned sides carry it; a gradient is turned back by -sin and scaled alike, which is the transpose.
        cos, sin = cos * scaling.attention_scale, sin * scaling.attention_scale
    return RopeTable(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def rope_frequencies(
    rotary_dim: int, theta: float, dtype: torch.dtype, device: torch.device, scaling: RopeScaling | None = None
) -> Tensor:
    """The angle that each pair turns by from one position to the next, [rotary_dim / 2]; a scaled one is computed once
    for each device and must not be changed."""
    if scaling is not None:
        with torch.inference_mode(False):  # what is kept must serve later passes with gradients, too
            return _scaled_frequencies(rotary_dim, theta, dtype, device, scaling)
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    return theta**-exponents


@cache
def _scaled_frequencies(
    rotary_dim: int, theta: float, dtype: torch.dtype, device: torch.device, scaling: RopeScaling
) -> Tensor:
    plain = rope_frequencies(rotary_dim, theta, dtype, device)
    match scaling.rope_type:
        case "linear":
            return plain / scaling.factor
        case "llama3":
            return _llama3(plain, scaling)
        case "yarn":
            return _yarn(plain, theta, scaling)
    raise ValueError(f"rope_type {scaling.rope_type!r} is unknown")


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths divided, short ones kept, between them a passage that is linear in turns within the original
    length (the Llama 3.1 release's formula)."""
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert length is not None and low is not None and high is not None, "checked by the config"
    turns = length * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def _yarn(plain: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Divided where a pair turns at most beta_slow times within the original length, kept from beta_fast turns on,
    between them a passage that is linear in the pair's number (arXiv 2309.00071, section 3.2; bounds rounded outwards,
    as `transformers` does)."""
    length, slow, fast = scaling.original_max_position_embeddings, scaling.beta_slow, scaling.beta_fast
    assert length is not None and slow is not None and fast is not None, "checked by the config"
    pairs = plain.shape[0]

    def pair_of(turns: float) -> float:
        return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    first, last = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), 2 * pairs - 1)
    numbers = torch.arange(pairs, dtype=plain.dtype, device=plain.device)
    divided = ((numbers - first) / ((last - first) or 0.001)).clamp(0, 1)
    return plain * (1 - divided + divided / scaling.factor)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A contiguous copy of x with its leading dimensions turned, in the dtype of x whatever the table's is."""
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    x = x.contiguous()
    turned = x[..., :rotary]
    swapped = torch.cat((turned[..., half:], turned[..., :half]), -1)
    # Neither in place nor cast to its own dtype: in a compiled program torch 2.11 loses, without a word, the gradient
    # of what a Function returns through an operation that gives its own argument.
    turned = torch.addcmul(turned * cos, swapped, sin)
    turned = turned if turned.dtype == x.dtype else turned.to(x.dtype)
    return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), -1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None  # a rotation's transpose is the rotation back


def rope(x: Tensor, table: RopeTable) -> Tensor:
    """Turns x [batch, groups, T, heads, head_dim] (any strides) and returns it contiguous."""
    return _Rope.apply(x, table.cos, table.sin)


def rope_qk(query: Tensor, key: Tensor, table: RopeTable) -> tuple[Tensor, Tensor]:
    """Both as `rope` turns them: query [batch, groups, T, heads a group, head_dim], key likewise with its own heads."""
    return rope(query, table), rope(key, table)


def fused_heads(qkv: Tensor, table: RopeTable, query_heads: int, key_heads: int, head_dim: int) -> int:
    """How many heads of a fused projection are turned: query_heads + key_heads. Raises ValueError where qkv is not a
    contiguous [batch, T, (query_heads + 2 * key_heads) * head_dim] or the table is not for its batch and T.
    """
    width = (query_heads + 2 * key_heads) * head_dim
    if qkv.dim() != 3 or qkv.shape[-1] != width or not qkv.is_contiguous():
        raise ValueError(
            f"a fused projection of {query_heads} query and {key_heads} key heads of {head_dim} is a contiguous "
            f"[batch, T, {width}], not {list(qkv.shape)} with strides {list(qkv.stride())}"
        )
    check_table(qkv.shape[0], qkv.shape[1], head_dim, table)
    return query_heads + key_heads


def check_table(batch: int, length: int, head_dim: int, table: RopeTable) -> None:
    """Raises ValueError where a table is not for [batch, ..., length, ..., head_dim]."""
    shape = table.cos.shape
    rotary = shape[-1] if shape else 0
    fits = shape in ((batch, 1, length, 1, rotary), (1, 1, length, 1, rotary)) and table.sin.shape == shape
    if not fits or rotary % 2 or rotary > head_dim:
        raise ValueError(
            f"angles for a batch of {batch}, {length} positions and heads of {head_dim} are [batch or 1, 1, {length}, "
            f"1, an even number of at most {head_dim}], not {list(shape)} and {list(table.sin.shape)}"
        )


def _turn_heads_(fused: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> None:
    """Turns the first heads of fused [batch, T, all heads * head_dim], contiguous, in place."""
    batch, length, _ = fused.shape
    turned = fused.view(batch, 1, length, -1, head_dim)[..., :heads, : cos.shape[-1]]
    turned.copy_(_turn(turned, cos, sin))


class _RopeFused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, keep_gradient: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.head_dim, ctx.keep_gradient = heads, head_dim, keep_gradient
        ctx.mark_dirty(qkv)
        _turn_heads_(qkv, cos, sin, heads, head_dim)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if ctx.keep_gradient or not grad.is_contiguous():
            grad = grad.clone(memory_format=torch.contiguous_format)
        _turn_heads_(grad, cos, -sin, ctx.heads, ctx.head_dim)
        return grad, None, None, None, None, None


def rope_fused_(
    qkv: Tensor, table: RopeTable, query_heads: int, key_heads: int, head_dim: int, keep_gradient: bool = True
) -> Tensor:
    """Turns queries and keys of a fused projection in place, leaves its values, and returns qkv.

    qkv: contiguous [batch, T, (query_heads + 2 * key_heads) * head_dim]: all query heads, all key heads, all values.
    It is overwritten, so it must be no leaf that requires a gradient (torch raises RuntimeError), nor be needed by the
    backward of what made it: the result of a linear layer is not. Where it is a view, torch copies the gradient.

    keep_gradient: whether the gradient that comes in survives the backward pass. Where it need not, a contiguous one is
    turned in place and handed on; any other (expanded, strided) is copied all the same. False is right only where
    nobody else will read that gradient: an addition hands one tensor to both its sides, a hook or a caller of
    `backward(gradient)` may hold it, and a zero-bubble schedule that replays this node would turn it twice.
    Raises ValueError where shapes do not fit.
    """
    heads = fused_heads(qkv, table, query_heads, key_heads, head_dim)
    return _RopeFused.apply(qkv, table.cos, table.sin, heads, head_dim, keep_gradient)
