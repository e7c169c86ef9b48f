"""RMSNorm against torch's own, gradients by gradcheck; the fused addition against an addition and a norm."""

from __future__ import annotations

import pytest
import torch
from kernels.norm_cases import compare, rows, weights

from megatron.kernels.rms_norm import add_rms_norm, rms_norm

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 64), (0, 8)])
def test_equals_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    ours, theirs = rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, shape[-1:], weight, 1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(theirs)
    wanted = torch.autograd.grad(theirs, (x, weight), upstream)
    for got, want in zip(torch.autograd.grad(ours, (x, weight), upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-10)


def test_gradcheck_on_strided_rows() -> None:
    x = torch.randn(5, 3, dtype=torch.float64).t().requires_grad_()
    weight = torch.randn(5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-3), (x, weight))


def test_bf16_computes_in_float32() -> None:
    x = (torch.randn(16, 256) * 100).bfloat16()
    weight = torch.rand(256)
    exact = rms_norm(x.double(), weight.double(), 1e-5)
    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, exact.bfloat16(), atol=0, rtol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 64)])
def test_the_fused_addition_equals_the_formula(
    shape: tuple[int, ...], used: tuple[bool, bool], dtype: torch.dtype
) -> None:
    x, branch, *upstreams = rows(shape, dtype, CPU, 4)
    leaves = [x, branch, *weights(shape[-1], torch.promote_types(dtype, torch.float32), CPU, False)]
    ups = [up if use else None for up, use in zip(upstreams, used, strict=True)]
    compare(add_rms_norm, leaves, True, ups, twice=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_addition_is_an_addition_and_a_norm(dtype: torch.dtype) -> None:
    x, branch, up, onward = (torch.randn(33, 40).to(dtype).requires_grad_() for _ in range(4))
    weight = torch.rand(40, requires_grad=True)
    summed = x + branch
    wanted = rms_norm(summed, weight, 1e-5), summed
    found = add_rms_norm(x, branch, weight, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    gradients = [torch.autograd.grad(out, (x, branch, weight), (up, onward)) for out in (found, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradcheck_of_the_fused_addition_without_rows_and_on_strided_rows() -> None:
    weight = torch.randn(5, dtype=torch.float64).requires_grad_()
    x, branch = (torch.randn(5, 3, dtype=torch.float64).t().requires_grad_() for _ in range(2))
    torch.autograd.gradcheck(lambda a, b, w: add_rms_norm(a, b, w, 1e-3), (x, branch, weight))
    normed, summed = add_rms_norm(x[:0], branch[:0], weight, 1e-3)
    assert normed.shape == summed.shape == (0, 5)


def test_a_branch_that_is_not_like_the_stream_is_refused() -> None:
    x = torch.ones(2, 8)
    for branch in (torch.ones(1, 8), torch.ones(2, 8, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="must be alike"):
            add_rms_norm(x, branch, torch.ones(8), 1e-5)
