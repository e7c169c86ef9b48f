"""The sum of squares of many tensors against float64's, and what clipping by it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from kernels.counted_launches import counted
from torch import Tensor

from megatron.kernels import gradient_norm_triton
from megatron.kernels.gradient_norm import clip_scale, squared_norm
from megatron.kernels.gradient_norm_triton import squared_norm_triton

Norm = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("norm", [squared_norm, squared_norm_triton], ids=["eager", "triton"])
SHAPES = ((3, 7), (8192,), (8193,), (), (0, 4), (3, 5000))
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def drawn(device: torch.device, dtypes: Sequence[torch.dtype], size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [tensor.to(device, dtypes[index % len(dtypes)]) for index, tensor in enumerate(tensors)]


def by_numpy(tensors: Sequence[Tensor]) -> float:
    return float(sum((tensor.double().cpu().numpy() ** 2).sum() for tensor in tensors))


@BOTH
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES], ids=["fp32", "bf16", "mixed"])
def test_the_sum_is_float64s(norm: Norm, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    tensors = drawn(device, dtypes)
    got = norm(tensors)
    assert (got.dtype, got.shape) == (torch.float64, ())
    assert float(got) == pytest.approx(by_numpy(tensors), rel=1e-13)
    assert torch.equal(got, norm(tensors))


@BOTH
def test_squares_beyond_float32_and_below_it(norm: Norm, device: torch.device) -> None:
    for size in (1e30, 1e-30):
        tensors = drawn(device, (torch.float32, torch.bfloat16), size)
        assert float(norm(tensors)) == pytest.approx(by_numpy(tensors), rel=1e-13)


@BOTH
def test_views_that_begin_anywhere_and_have_strides(norm: Norm, device: torch.device) -> None:
    whole = torch.randn(40, 33, device=device)
    tensors = [whole.flatten()[1:900], whole.t(), whole[:, ::2], whole[3:5]]
    assert float(norm(tensors)) == pytest.approx(by_numpy(tensors), rel=1e-13)


@BOTH
def test_what_is_not_finite_is_seen(norm: Norm, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = drawn(device, (dtype,))
        tensors[2][8192] = float("inf")
        assert float(norm(tensors)) == float("inf")
        tensors[0][1, 1] = float("nan")
        assert norm(tensors).isnan()


@BOTH
def test_nothing_has_no_norm(norm: Norm, device: torch.device) -> None:
    for tensors in ([], [torch.zeros(0, 3, device=device)]):
        got = norm(tensors, device)
        assert (float(got), got.dtype, got.device.type) == (0.0, torch.float64, device.type)


def test_the_scale_clips_as_the_engines_do(device: torch.device) -> None:
    def scaled(norm: float, bound: float) -> tuple[float, float]:
        scale, found = clip_scale(torch.tensor(norm, dtype=torch.float64, device=device) ** 2, bound)
        assert (scale.dtype, found.dtype, scale.shape, found.shape) == (torch.float64, torch.float32, (), ())
        return float(scale), float(found)

    assert scaled(4.0, 1.0) == (0.25, 0.0)
    assert scaled(0.5, 1.0) == (1.0, 0.0)
    assert scaled(0.0, 1.0) == (1.0, 0.0)
    assert scaled(4.0, 0.0) == (1.0, 0.0)
    assert scaled(float("inf"), 1.0)[1] == 1.0
    assert scaled(float("nan"), 1.0)[1] == scaled(float("nan"), 0.0)[1] == 1.0


def test_a_dtype_is_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted(monkeypatch, gradient_norm_triton, "_squares_kernel")
    squared_norm_triton(drawn(device, DTYPES[:1]))
    squared_norm_triton(drawn(device, DTYPES[:2]))
    assert launches == ["_squares_kernel"] * 3
