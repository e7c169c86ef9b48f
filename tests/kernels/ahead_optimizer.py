"""Launches of the optimizer's and fp8's kernels at a model's shapes, to be compiled ahead by `compiled_ahead`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.kernels.adamw import AdamWTensors
from megatron.kernels.adamw_triton import adamw_step_triton
from megatron.kernels.fp8 import E4M3, E5M2
from megatron.kernels.fp8_triton import fp8_cast_triton, fp8_linear_triton
from megatron.kernels.gradient_norm_triton import squared_norm_triton

_META = torch.device("meta")
_SHAPES = ((128256, 2048), (2048, 8192), (2048,))


def _tensors(dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=_META) for shape in _SHAPES]


def _adamw(parameter: torch.dtype, gradient: torch.dtype, copy: torch.dtype | None = None) -> Callable[[], object]:
    def call() -> None:
        wide = torch.float64 if parameter == torch.float64 else torch.float32
        tensors = AdamWTensors(
            _tensors(parameter),
            _tensors(gradient),
            _tensors(wide),
            _tensors(wide),
            _tensors(copy) if copy else (),
            _tensors(torch.int16) if parameter == torch.bfloat16 else (),
        )
        number = torch.empty((), dtype=torch.float64, device=_META)
        steps = torch.empty(len(_SHAPES), device=_META)
        adamw_step_triton(tensors, steps, number, [0.1, 0.1, 0.0], (0.9, 0.95), 1e-8, number, steps[0])

    return call


def _norm(dtype: torch.dtype) -> Callable[[], object]:
    return lambda: squared_norm_triton(_tensors(dtype))


def _cast(dtype: torch.dtype, narrow: torch.dtype, rows: int, columns: int) -> Callable[[], object]:
    return lambda: fp8_cast_triton(torch.empty(rows, columns, dtype=dtype, device=_META), narrow)


def _linear(dtype: torch.dtype, size: int) -> Callable[[], object]:
    def call() -> None:
        x = torch.empty(16384, size, dtype=dtype, device=_META, requires_grad=True)
        weight = torch.empty(4 * size, size, dtype=dtype, device=_META, requires_grad=True)
        out = fp8_linear_triton(x, weight)
        out.backward(torch.empty_like(out))

    return call


CASES: dict[str, Callable[[], object]] = {
    "adamw fp32": _adamw(torch.float32, torch.float32),
    "adamw fp32 with a bf16 copy": _adamw(torch.float32, torch.float32, torch.bfloat16),
    "adamw fp32 of bf16 gradients with a bf16 copy": _adamw(torch.float32, torch.bfloat16, torch.bfloat16),
    "adamw in two halves": _adamw(torch.bfloat16, torch.bfloat16),
    "adamw in two halves of fp32 gradients": _adamw(torch.bfloat16, torch.float32),
    "adamw fp64": _adamw(torch.float64, torch.float64),
    "squared norm fp32": _norm(torch.float32),
    "squared norm bf16": _norm(torch.bfloat16),
    "cast bf16 to e4m3": _cast(torch.bfloat16, E4M3, 16384, 4096),
    "cast bf16 to e5m2, odd rows": _cast(torch.bfloat16, E5M2, 16383, 2048),
    "cast fp32 to e4m3": _cast(torch.float32, E4M3, 16384, 1024),
    "cast fp64 to e4m3": _cast(torch.float64, E4M3, 16384, 1024),
    "cast more than 2^31 elements": _cast(torch.bfloat16, E4M3, 262144, 16384),
    "fp8 linear bf16": _linear(torch.bfloat16, 4096),
}
