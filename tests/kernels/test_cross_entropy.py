"""Cross-entropy against torch's own in float64, with padding words, masked rows and odd chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megatron.kernels import cross_entropy as kernel
from megatron.kernels import vocabulary_softmax
from megatron.kernels.cross_entropy import IGNORED, cross_entropy, cross_entropy_in_place, linear_cross_entropy


def random_problem(rows: int, vocabulary: int, padding: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary + padding, 6, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def minimised(logits: Tensor, targets: Tensor, z_loss: float, label_smoothing: float) -> Tensor:
    """The formula, of each row: (1 - e) * -log p of the target + e * the mean of -log p + z * log-sum-exp squared."""
    surprise = -logits.log_softmax(-1)
    counts = targets != IGNORED
    chosen = surprise.gather(1, targets.where(counts, 0)[:, None]).squeeze(1)
    rows = (1 - label_smoothing) * chosen + label_smoothing * surprise.mean(-1)
    return (rows + z_loss * logits.logsumexp(-1).square()).where(counts, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 11), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_equals_torch_on_the_words_that_are_not_padding(rows: int, vocabulary: int, padding: int, seed: int) -> None:
    hidden, weight, targets = random_problem(rows, vocabulary, padding, seed, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_ROWS", 4)
        patch.setattr(vocabulary_softmax, "_SOFTMAX_ELEMENTS", 3 * (vocabulary + padding))
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


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 11), st.integers(1, 9), st.integers(0, 5), st.sampled_from([0, 0.3]), st.sampled_from([0, 0.2]))
def test_z_loss_and_smoothed_labels(rows: int, vocabulary: int, padding: int, z_loss: float, smoothing: float) -> None:
    """Totals have them, reported losses do not."""
    hidden, weight, targets = random_problem(rows, vocabulary, padding, rows, torch.float64)
    logits = hidden @ weight.t()
    expected = minimised(logits[:, :vocabulary], targets, z_loss, smoothing)
    plain = functional.cross_entropy(logits[:, :vocabulary], targets, ignore_index=IGNORED, reduction="none")
    wanted = torch.autograd.grad(0.75 * expected.sum(), (hidden, weight), retain_graph=True)
    found = cross_entropy(logits, targets, z_loss, smoothing, vocabulary)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    if z_loss == 0:
        torch.testing.assert_close(
            found,
            functional.cross_entropy(logits[:, :vocabulary], targets, reduction="none", label_smoothing=smoothing),
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_ROWS", 4)
        patch.setattr(vocabulary_softmax, "_SOFTMAX_ELEMENTS", 3 * (vocabulary + padding))
        terms = {"z_loss": z_loss, "label_smoothing": smoothing}
        total, losses = linear_cross_entropy(hidden, weight, targets, vocabulary, 0.25, **terms)
        alone, same = cross_entropy_in_place(hidden @ weight.t(), targets, vocabulary, 0.25, **terms)
    torch.testing.assert_close(losses, plain.detach(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(same, losses, atol=1e-12, rtol=1e-10)
    for value in (total, alone):
        torch.testing.assert_close(value, 0.25 * expected.sum(), atol=1e-12, rtol=1e-10)
        gradients = torch.autograd.grad(3 * value, (hidden, weight))
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)


def test_terms_that_cannot_be_are_refused() -> None:
    hidden, weight, targets = random_problem(2, 5, 0, 0, torch.float32)
    for terms in ({"z_loss": -1.0}, {"label_smoothing": 1.0}, {"label_smoothing": float("nan")}):
        with pytest.raises(ValueError, match="are needed"):
            linear_cross_entropy(hidden, weight, targets, 5, 1.0, **terms)


def test_backward_again_gives_the_same_and_leaves_what_was_given() -> None:
    hidden, weight, targets = random_problem(9, 7, 2, 5, torch.float64)
    total, _ = linear_cross_entropy(hidden, weight, targets, 7, 0.5)
    expected = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    kept = [value.clone() for value in expected]
    for upstream in (1.0, -3.0):
        for again, want in zip(
            torch.autograd.grad(upstream * total, (hidden, weight), retain_graph=True), kept, strict=True
        ):
            torch.testing.assert_close(again, upstream * want, atol=1e-14, rtol=1e-12)
    for value, want in zip(expected, kept, strict=True):
        assert torch.equal(value, want)
    total, _ = linear_cross_entropy(hidden, weight, targets, 7, 0.5)
    for _ in range(2):
        assert not any(g.any() for g in torch.autograd.grad(0 * total, (hidden, weight), retain_graph=True))


def test_the_gradient_of_the_weight_is_not_copied() -> None:
    """What forward made is what the parameter gets: at 128k words it is a gigabyte."""
    hidden, weight, targets = random_problem(9, 7, 2, 5, torch.float32)
    total, _ = linear_cross_entropy(hidden, weight, targets, 7, 0.5)
    made = total.grad_fn.saved_tensors[1].data_ptr()
    (2 * total).backward()
    assert weight.grad.data_ptr() == made


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    """A hook that gives a copy each time, as those of offloading do, sees no difference at a second pass."""
    hidden, weight, targets = random_problem(9, 7, 2, 5, torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        total, _ = linear_cross_entropy(hidden, weight, targets, 7, 0.5)
    first = torch.autograd.grad(2 * total, (hidden, weight), retain_graph=True)
    for got, want in zip(torch.autograd.grad(6 * total, (hidden, weight)), first, strict=True):
        torch.testing.assert_close(got, 3 * want)
