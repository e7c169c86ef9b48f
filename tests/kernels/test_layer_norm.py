"""LayerNorm against torch's own in float64 and the formula, gradients by gradcheck; the fused addition likewise."""

from __future__ import annotations

import pytest
import torch
from kernels.norm_cases import EPS, close, compare, rows, weights, written_out

from megatron.kernels.layer_norm import add_layer_norm, layer_norm

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 64), (0, 8)])
def test_equals_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = layer_norm(x, weight, bias, EPS)
    theirs = torch.nn.functional.layer_norm(x, shape[-1:], weight, bias, EPS)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(theirs)
    wanted = torch.autograd.grad(theirs, (x, weight, bias), upstream)
    for got, want in zip(torch.autograd.grad(ours, (x, weight, bias), upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_equals_the_formula_in_every_dtype(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, used: tuple[bool, bool]
) -> None:
    x, branch, *upstreams = rows((2, 4, 65), dtype, CPU, 4)
    leaves = [x, branch, *weights(65, weight_dtype or dtype, CPU, True)]
    ups = [up if use else None for up, use in zip(upstreams, used, strict=True)]
    compare(add_layer_norm, leaves, True, ups, twice=True)
    compare(layer_norm, [x, *leaves[2:]], False, upstreams[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_a_bias_it_equals_torch_and_the_formula(dtype: torch.dtype) -> None:
    x, branch, *upstreams = rows((2, 4, 65), dtype, CPU, 4)
    (weight,) = weights(65, dtype, CPU, False)
    compare(lambda *t: add_layer_norm(*t[:-1], None, t[-1]), [x, branch, weight], True, upstreams, True, centres=True)
    compare(lambda *t: layer_norm(*t[:-1], None, t[-1]), [x, weight], False, upstreams[:1], centres=True)
    zero = torch.zeros_like(weight)
    assert torch.equal(layer_norm(x, weight, None, EPS), layer_norm(x, weight, zero, EPS))


def test_gradcheck_on_strided_rows() -> None:
    x, branch = (torch.randn(5, 3, dtype=torch.float64).t().requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    torch.autograd.gradcheck(lambda a, w, c: layer_norm(a, w, c, 1e-3), (x, weight, bias))
    torch.autograd.gradcheck(lambda a, b, w, c: add_layer_norm(a, b, w, c, 1e-3), (x, branch, weight, bias))


def test_bf16_keeps_statistics_in_float32() -> None:
    """A mean of 100 with a deviation of 1: in bfloat16 the mean would be half a unit off."""
    x = (100.3 + torch.randn(16, 256)).bfloat16().requires_grad_()
    weight, bias = torch.ones(256).bfloat16(), torch.zeros(256).bfloat16()
    close(layer_norm(x, weight, bias, EPS), written_out(x, weight, bias))
    compare(layer_norm, [x, weight.requires_grad_(), bias.requires_grad_()], False, [torch.randn(16, 256).bfloat16()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_addition_is_an_addition_and_a_norm(dtype: torch.dtype) -> None:
    x, branch, up, onward = (torch.randn(33, 40).to(dtype).requires_grad_() for _ in range(4))
    weight, bias = (torch.rand(40, requires_grad=True) for _ in range(2))
    summed = x + branch
    wanted = layer_norm(summed, weight, bias, EPS), summed
    found = add_layer_norm(x, branch, weight, bias, EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    gradients = [torch.autograd.grad(out, (x, branch, weight, bias), (up, onward)) for out in (found, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_branch_that_is_not_like_the_stream_is_refused() -> None:
    x = torch.ones(2, 8)
    for branch in (torch.ones(1, 8), torch.ones(2, 8, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="must be alike"):
            add_layer_norm(x, branch, torch.ones(8), torch.zeros(8), EPS)
