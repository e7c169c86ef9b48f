"""Cross-entropy against torch's own in float64, with padding words, masked rows and odd chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megatron.kernels import cross_entropy as kernel
from megatron.kernels.cross_entropy import IGNORED, cross_entropy, linear_cross_entropy


def random_problem(rows: int, vocabulary: int, padding: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary + padding, 6, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 11), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_equals_torch_on_the_words_that_are_not_padding(rows: int, vocabulary: int, padding: int, seed: int) -> None:
    hidden, weight, targets = random_problem(rows, vocabulary, padding, seed, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_ROWS", 4)
        patch.setattr(kernel, "_SOFTMAX_ELEMENTS", 3 * (vocabulary + padding))
        total, losses = linear_cross_entropy(hidden, weight, targets, vocabulary, 0.25)
    logits = (hidden @ weight.t())[:, :vocabulary]
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(cross_entropy(logits, targets), expected, atol=1e-12, rtol=1e-10)
    wanted = torch.autograd.grad(3 * 0.25 * expected.sum(), (hidden, weight))
    for got, want in zip(torch.autograd.grad(3 * total, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)


def test_gradcheck() -> None:
    hidden, weight, targets = random_problem(5, 7, 2, 3, torch.float64)
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 7, 0.5)[0], (hidden, weight))


def test_large_logits_stay_finite_and_right() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    total, losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]), 3, 1.0)
    assert losses.tolist() == [0.0, 2e4]
    total.backward()
    assert torch.isfinite(weight.grad).all()


def test_bf16_loss_is_float32_and_every_row_masked_is_zero() -> None:
    hidden, weight, targets = random_problem(40, 30, 2, 1, torch.bfloat16)
    total, losses = linear_cross_entropy(hidden, weight, targets, 30, 1.0)
    reference = functional.cross_entropy((hidden.float() @ weight.float().t())[:, :30], targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference.detach(), atol=0.05, rtol=0.02)
    total, losses = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), 30, 1.0)
    total.backward()
    assert float(total.detach()) == 0 and not losses.any() and not hidden.grad.any() and not weight.grad.any()
