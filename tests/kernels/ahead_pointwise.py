"""Launches of rotary positions and gated activations at models' shapes, to be compiled for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.kernels.rope import RopeTable
from megatron.kernels.rope_triton import rope_fused_triton_, rope_qk_triton, rope_triton
from megatron.kernels.swiglu_triton import activate_triton, gated_halves_triton, gated_triton

TOKENS = 8192
BATCH = 2


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


def _table(rotary: int, dtype: torch.dtype, batch: int = BATCH) -> RopeTable:
    half = torch.empty(batch, 1, TOKENS, 1, rotary, dtype=dtype, device="meta")
    return RopeTable(half, torch.empty_like(half))


def _both_ways(*outs: Tensor) -> None:
    torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])


def _split(groups: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """A projection cut into heads, as the model's attention does: [batch, groups, T, heads, size]."""
    return (
        _empty(BATCH, TOKENS, groups * heads * size, dtype=dtype)
        .view(BATCH, TOKENS, groups, heads, size)
        .transpose(1, 2)
    )


def _rope(groups: int, heads: int, size: int, rotary: int, dtype: torch.dtype) -> None:
    _both_ways(rope_triton(_split(groups, heads, size, dtype), _table(rotary, dtype)))


def _rope_qk(groups: int, heads: int, size: int, rotary: int, dtype: torch.dtype, table: torch.dtype) -> None:
    query, key = (_split(groups, n, size, dtype) for n in (heads, 1))
    _both_ways(*rope_qk_triton(query, key, _table(rotary, table, batch=1)))


def _rope_fused(query: int, key: int, size: int, rotary: int, dtype: torch.dtype, keep: bool) -> None:
    qkv = _empty(BATCH, TOKENS, (query + 2 * key) * size, dtype=dtype).clone()
    _both_ways(rope_fused_triton_(qkv, _table(rotary, dtype), query, key, size, keep_gradient=keep))


def _gated(inner: int, name: str, dtype: torch.dtype) -> None:
    _both_ways(gated_triton(*(_empty(BATCH, TOKENS, inner, dtype=dtype) for _ in range(2)), name))


def _gated_halves(inner: int, name: str, dtype: torch.dtype) -> None:
    _both_ways(gated_halves_triton(_empty(BATCH, TOKENS, 2 * inner, dtype=dtype), name))


def _activate(inner: int, name: str, dtype: torch.dtype) -> None:
    _both_ways(activate_triton(_empty(BATCH, TOKENS, inner, dtype=dtype), name))


BF16, FP32 = torch.bfloat16, torch.float32

CASES: dict[str, Callable[[], object]] = {
    "rope, hidden 1024, 16 heads of 64, bf16": lambda: _rope(16, 1, 64, 64, BF16),
    "rope, hidden 4096, 32 heads of 128, bf16": lambda: _rope(8, 4, 128, 128, BF16),
    "rope, hidden 4096, 32 heads of 128, fp32": lambda: _rope(8, 4, 128, 128, FP32),
    "rope, hidden 2048, 16 heads of 128, 32 turned, bf16": lambda: _rope(16, 1, 128, 32, BF16),
    "rope of query and key, 16 and 4 heads of 64, bf16": lambda: _rope_qk(4, 4, 64, 64, BF16, BF16),
    "rope of query and key, 32 and 8 heads of 128, bf16": lambda: _rope_qk(8, 4, 128, 128, BF16, BF16),
    "rope of query and key, 32 and 8 heads of 128, bf16, fp32 angles": lambda: _rope_qk(8, 4, 128, 128, BF16, FP32),
    "rope of query and key, 16 and 8 heads of 256, fp32": lambda: _rope_qk(8, 2, 256, 256, FP32, FP32),
    "rope of query and key, 32 and 8 heads of 96, 24 turned, bf16": lambda: _rope_qk(8, 4, 96, 24, BF16, BF16),
    "rope in place, 32 and 8 heads of 128, bf16": lambda: _rope_fused(32, 8, 128, 128, BF16, False),
    "rope in place, 32 and 8 heads of 128, gradient kept, bf16": lambda: _rope_fused(32, 8, 128, 128, BF16, True),
    "rope in place, 16 heads of 64, 16 turned, fp32": lambda: _rope_fused(16, 16, 64, 16, FP32, True),
    "gated silu, inner 2816, bf16": lambda: _gated(2816, "silu", BF16),
    "gated silu, inner 14336, bf16": lambda: _gated(14336, "silu", BF16),
    "gated silu, inner 14336, fp32": lambda: _gated(14336, "silu", FP32),
    "gated gelu, inner 5632, bf16": lambda: _gated(5632, "gelu", BF16),
    "gated gelu_tanh, inner 11008, bf16": lambda: _gated(11008, "gelu_tanh", BF16),
    "gated halves silu, inner 2816, bf16": lambda: _gated_halves(2816, "silu", BF16),
    "gated halves silu, inner 14336, bf16": lambda: _gated_halves(14336, "silu", BF16),
    "gated halves silu, inner 14336, fp32": lambda: _gated_halves(14336, "silu", FP32),
    "gated halves gelu, inner 5632, bf16": lambda: _gated_halves(5632, "gelu", BF16),
    "gated halves gelu_tanh, inner 11008, fp32": lambda: _gated_halves(11008, "gelu_tanh", FP32),
    "plain silu, inner 4096, bf16": lambda: _activate(4096, "silu", BF16),
    "plain gelu, inner 16384, bf16": lambda: _activate(16384, "gelu", BF16),
    "plain gelu_tanh, inner 16384, fp32": lambda: _activate(16384, "gelu_tanh", FP32),
}
