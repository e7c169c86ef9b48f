"""RMSNorm against torch's own, gradients by gradcheck."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.rms_norm import rms_norm


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
