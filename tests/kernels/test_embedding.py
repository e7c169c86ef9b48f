"""The embedding's gradient keeps counting where a bfloat16 sum would stop."""

from __future__ import annotations

import torch

from megatron.kernels.embedding import embedding


def test_gradient_equals_torch_in_float64() -> None:
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 9, (3, 7))
    upstream = torch.randn(3, 7, 4, dtype=torch.float64)
    expected = torch.nn.functional.embedding(tokens, weight)
    assert torch.equal(embedding(tokens, weight), expected)
    (ours,) = torch.autograd.grad(embedding(tokens, weight), weight, upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, weight, upstream)[0], atol=1e-12, rtol=1e-12)


def test_a_frequent_token_is_summed_wide() -> None:
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    embedding(torch.zeros(4096, dtype=torch.int64), weight).backward(torch.ones(4096, 1, dtype=torch.bfloat16))
    assert weight.grad.flatten().tolist() == [4096.0, 0.0]
