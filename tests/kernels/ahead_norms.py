"""Launches of the norms at the sizes of real models, for `compiled_ahead.py`: each a call of a door on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron.kernels.layer_norm_triton import add_layer_norm_triton, layer_norm_triton
from megatron.kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton

TOKENS = 16384
BF16, FP32 = torch.bfloat16, torch.float32
ALONE = [(128, BF16), (4096, BF16), (2048, FP32)]
AFTER_ADDITION = [
    (1024, BF16), (2048, BF16), (4096, BF16), (8192, BF16), (16384, BF16), (20480, BF16), (1024, FP32), (4096, FP32)
]  # fmt: skip
"""Sizes and dtypes of rows: 128 is a head's, 20480 wider than a program holds."""


def _tensors(
    size: int, dtype: torch.dtype, weight_dtype: torch.dtype, biased: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """x and branch; weight and, in LayerNorm, bias."""
    rows = [torch.empty(TOKENS, size, dtype=dtype, device="meta", requires_grad=True) for _ in range(2)]
    weights = [torch.empty(size, dtype=weight_dtype, device="meta", requires_grad=True) for _ in range(1 + biased)]
    return rows, weights


def alone(size: int, dtype: torch.dtype, weight_dtype: torch.dtype, biased: bool) -> None:
    """A norm of x, forward and backward."""
    (x, _), weights = _tensors(size, dtype, weight_dtype, biased)
    normed = (layer_norm_triton if biased else rms_norm_triton)(x, *weights, 1e-5)
    normed.backward(torch.empty_like(normed))


def after_addition(size: int, dtype: torch.dtype, weight_dtype: torch.dtype, biased: bool) -> None:
    """The residual addition and the norm, forward and backward by both results."""
    rows, weights = _tensors(size, dtype, weight_dtype, biased)
    results = (add_layer_norm_triton if biased else add_rms_norm_triton)(*rows, *weights, 1e-5)
    torch.autograd.backward(results, tuple(torch.empty_like(result) for result in results))


def without_bias(size: int, dtype: torch.dtype) -> None:
    """LayerNorm with a weight alone, forward and backward, after an addition and without."""
    (x, branch), (weight,) = _tensors(size, dtype, dtype, False)
    results = *add_layer_norm_triton(x, branch, weight, None, 1e-5), layer_norm_triton(x, weight, None, 1e-5)
    torch.autograd.backward(results, tuple(torch.empty_like(result) for result in results))


def _cases() -> dict[str, Callable[[], object]]:
    cases: dict[str, Callable[[], object]] = {}
    for norm, biased in (("rms_norm", False), ("layer_norm", True)):
        for size, dtype in ALONE:
            cases[f"{norm}, {TOKENS} x {size}, {_name(dtype)}"] = partial(alone, size, dtype, dtype, biased)
        for size, dtype in AFTER_ADDITION:
            call = partial(after_addition, size, dtype, dtype, biased)
            cases[f"add_{norm}, {TOKENS} x {size}, {_name(dtype)}"] = call
        call = partial(after_addition, 4096, BF16, FP32, biased)
        cases[f"add_{norm}, {TOKENS} x 4096, bf16, weights fp32"] = call
    for size, dtype in ((2048, BF16), (8192, BF16), (20480, BF16), (4096, FP32)):
        cases[f"layer_norm without bias, {TOKENS} x {size}, {_name(dtype)}"] = partial(without_bias, size, dtype)
    return cases


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == BF16 else "fp32"


CASES: dict[str, Callable[[], object]] = _cases()
