"""The masked softmax's launches at sizes of real models, for `compiled_ahead.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megatron.kernels.masked_softmax import Span
from megatron.kernels.masked_softmax_triton import (
    masked_softmax_triton,
    softmax_gradient_into_triton,
    softmax_into_triton,
)

Shape = tuple[int, ...]


def _span(batch: int, queries: int) -> Span:
    return Span(*(torch.empty(batch, queries, dtype=torch.int32, device="meta") for _ in range(2)))


def _both_passes(shape: Shape, dtype: torch.dtype, masked: bool = False) -> None:
    scores = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.empty(shape[0], 1, shape[2], 1, shape[-1], dtype=torch.bool, device="meta") if masked else None
    out = masked_softmax_triton(scores, 128**-0.5, None if masked else _span(shape[0], shape[2]), mask)
    out.backward(torch.empty_like(out))


def _in_place(shape: Shape, dtype: torch.dtype) -> None:
    scores, grad = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
    softmax_into_triton(scores, 128**-0.5, _span(shape[0], shape[2]))
    softmax_gradient_into_triton(scores, grad, 128**-0.5, _span(shape[0], shape[2]))


CASES: dict[str, Callable[[], object]] = {
    f"masked softmax {words}": call
    for words, call in {
        "512 keys bf16": partial(_both_passes, (32, 8, 512, 2, 512), torch.bfloat16),
        "4096 keys bf16 in place": partial(_in_place, (4, 8, 4096, 4, 4096), torch.bfloat16),
        "4096 keys fp32": partial(_both_passes, (4, 8, 4096, 4, 4096), torch.float32),
        "4096 keys bf16 bool mask": partial(_both_passes, (4, 8, 4096, 4, 4096), torch.bfloat16, True),
        "8192 keys bf16": partial(_both_passes, (2, 8, 8192, 4, 8192), torch.bfloat16),
        "16384 keys bf16": partial(_both_passes, (1, 8, 16384, 4, 16384), torch.bfloat16),
        "16384 keys fp32": partial(_both_passes, (1, 8, 16384, 4, 16384), torch.float32),
        "32768 keys bf16": partial(_both_passes, (1, 4, 32768, 4, 32768), torch.bfloat16),
        "32768 keys bf16 bool mask": partial(_both_passes, (1, 4, 32768, 4, 32768), torch.bfloat16, True),
        "4096 keys fp64": partial(_both_passes, (1, 8, 4096, 4, 4096), torch.float64),
    }.items()
}
