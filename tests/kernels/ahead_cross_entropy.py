"""Launches of cross-entropy at the shapes of real models, to be compiled ahead (`compiled_ahead.py`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.kernels.cross_entropy import cross_entropy_in_place, linear_cross_entropy, linear_losses
from megatron.kernels.cross_entropy_triton import cross_entropy_triton
from megatron.kernels.vocabulary_softmax_triton import losses_of_triton, own_statistics_triton, slopes_triton
from megatron.kernels.vocabulary_words import Objective, words_of

BOTH = Objective(1e-4, 0.1)


def _targets(rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.int64, device="meta")


def _logits(rows: int, words: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, words, dtype=dtype, device="meta")


def apart(rows: int, words: int, dtype: torch.dtype, objective: Objective, size: int = 1) -> object:
    """What a rank of `size` launches before and after its collective."""
    logits, targets, part = _logits(rows, words // size, dtype), _targets(rows), words_of(words // size, words - 100)
    found = own_statistics_triton(logits, targets, part, objective)
    slopes_triton(logits, found, targets, part, 0.1, objective)
    return losses_of_triton(found, targets, part, objective)


def in_place(rows: int, words: int, dtype: torch.dtype, **more: float) -> object:
    logits = _logits(rows, words, dtype).requires_grad_()
    total, _ = cross_entropy_in_place(logits, _targets(rows), words - 100, 0.1, kernels="triton", **more)
    total.backward(torch.empty_like(total))
    return total


def linear(rows: int, words: int, width: int, dtype: torch.dtype) -> object:
    hidden, weight = (torch.empty(n, width, dtype=dtype, device="meta").requires_grad_() for n in (rows, words))
    total, _ = linear_cross_entropy(hidden, weight, _targets(rows), words, 0.1, kernels="triton")
    total.backward(torch.empty_like(total))
    with torch.no_grad():
        return linear_losses(hidden, weight, _targets(rows), words, kernels="triton")


def given(rows: int, words: int, dtype: torch.dtype) -> object:
    logits = _logits(rows, words, dtype).requires_grad_()
    losses = cross_entropy_triton(logits, _targets(rows), 1e-4, 0.1)
    losses.backward(torch.empty_like(losses))
    return losses


CASES: dict[str, Callable[[], object]] = {
    "in place, 8192 x 131072, bf16": lambda: in_place(8192, 131072, torch.bfloat16),
    "in place, 8192 x 128256, bf16, z-loss and smoothing": lambda: in_place(
        8192, 128256, torch.bfloat16, z_loss=1e-4, label_smoothing=0.1
    ),
    "in place, 4096 x 128256, fp32": lambda: in_place(4096, 128256, torch.float32),
    "in place, 4096 x 128256, fp64, z-loss and smoothing": lambda: in_place(
        4096, 128256, torch.float64, z_loss=1e-4, label_smoothing=0.1
    ),
    "in place, 4096 x 50257, bf16, rows out of line": lambda: in_place(4096, 50257, torch.bfloat16),
    "in place, 16384 x 32000, bf16": lambda: in_place(16384, 32000, torch.bfloat16),
    "in place, 16384 x 50304, bf16": lambda: in_place(16384, 50304, torch.bfloat16),
    "in place, 64 x 128256, bf16, rows cut": lambda: in_place(64, 128256, torch.bfloat16),
    "apart, 16384 x 128256 / 2, bf16": lambda: apart(16384, 128256, torch.bfloat16, Objective(), 2),
    "apart, 8192 x 131072, bf16, z-loss and smoothing": lambda: apart(8192, 131072, torch.bfloat16, BOTH),
    "apart, 8192 x 128256 / 8, fp32": lambda: apart(8192, 128256, torch.float32, Objective(), 8),
    "linear, 16384 x 1024 x 128256, bf16": lambda: linear(16384, 128256, 1024, torch.bfloat16),
    "linear, 16384 x 4096 x 128256, bf16": lambda: linear(16384, 128256, 4096, torch.bfloat16),
    "linear, 4096 x 2048 x 128256, fp32": lambda: linear(4096, 128256, 2048, torch.float32),
    "given, 8192 x 128256, bf16": lambda: given(8192, 128256, torch.bfloat16),
    "given, 2048 x 128256, fp32": lambda: given(2048, 128256, torch.float32),
}
