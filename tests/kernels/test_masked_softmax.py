"""The masked softmax's definition against torch's own softmax, and the attention around it against SDPA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels import attention_unfused
from megatron.kernels.attention import attention_sdpa, piece_starts, plan_for_sdpa, visibility
from megatron.kernels.attention_unfused import attention_weights, plan_unfused
from megatron.kernels.masked_softmax import (
    Span,
    causal_span,
    document_span,
    masked_softmax,
    softmax_gradient_into,
    softmax_into,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 5, 2, 7), (1, 1, 1, 1), (0, 2, 3, 4)])
def test_without_masks_it_is_torchs_softmax(shape: tuple[int, ...]) -> None:
    scores = normal(*shape).requires_grad_()
    ours, theirs = masked_softmax(scores, 0.7), torch.softmax(0.7 * scores, -1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    upstream = normal(*shape, seed=1)
    (got,), (want,) = (torch.autograd.grad(out, scores, upstream) for out in (ours, theirs))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_a_causal_span_is_the_lower_right_triangle() -> None:
    scores = normal(2, 3, 4, 6)
    triangle = torch.ones(4, 6, dtype=torch.bool).tril(2)
    expected = torch.softmax((scores * 0.5).masked_fill(~triangle, -torch.inf), -1)
    torch.testing.assert_close(masked_softmax(scores, 0.5, causal_span(4, 6)), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(masked_softmax(scores, 0.5, mask=triangle), expected, atol=1e-12, rtol=1e-12)


def test_a_documents_span_is_its_mask() -> None:
    first = piece_starts(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]]))
    scores, mask = normal(2, 2, 5, 3, 5), visibility(first, 0, 5, 0, 5)[:, None, :, None]
    expected = masked_softmax(scores, 1.0, mask=mask)
    assert torch.equal(masked_softmax(scores, 1.0, document_span(first)), expected)
    positions = torch.tensor([1, 4])
    part = masked_softmax(scores[:, :, positions], 1.0, document_span(first, positions))
    assert torch.equal(part, expected[:, :, positions])


def test_a_row_that_sees_nothing_is_zero() -> None:
    scores = normal(1, 1, 3, 4).requires_grad_()
    span = Span(torch.tensor([[0, 2, 3]], dtype=torch.int32), torch.tensor([[4, 2, 1]], dtype=torch.int32))
    out = masked_softmax(scores, 1.0, span)
    assert (out[0, 0, 1:] == 0).all() and out[0, 0, 0].sum().item() == pytest.approx(1)
    (grad,) = torch.autograd.grad(out, scores, normal(1, 1, 3, 4, seed=1))
    assert torch.isfinite(grad).all() and (grad[0, 0, 1:] == 0).all()
    assert (masked_softmax(torch.full((1, 1, 1, 3), -torch.inf)) == 0).all()


def test_large_scores_of_bfloat16() -> None:
    scores = torch.tensor([[[[1e4, -1e4, 9984.0]]]], dtype=torch.bfloat16)
    expected = torch.softmax(scores.double(), -1)
    torch.testing.assert_close(masked_softmax(scores).double(), expected, atol=2**-8, rtol=2**-8)


def test_gradcheck() -> None:
    scores = normal(2, 1, 3, 2, 4).requires_grad_()
    mask = torch.tensor([True, True, False, True])
    torch.autograd.gradcheck(lambda x: masked_softmax(x, 0.3, causal_span(3, 4), mask), (scores,))


def test_in_place_it_is_the_same() -> None:
    scores, span = normal(2, 2, 5, 3, 5).requires_grad_(), causal_span(5, 5)
    expected = masked_softmax(scores, 0.4, span)
    upstream = normal(2, 2, 5, 3, 5, seed=1)
    (wanted,) = torch.autograd.grad(expected, scores, upstream)
    weights = scores.detach().clone()
    softmax_into(weights, 0.4, span)
    assert torch.equal(weights, expected)
    upstream[:, :, :-1, :, -1] = torch.inf  # of keys that are hidden
    softmax_gradient_into(weights, upstream, 0.4, span)
    torch.testing.assert_close(upstream, wanted, atol=1e-13, rtol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    scores = normal(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"is int32 \[2 or 1, 4\], not torch.int32 \[1, 3\]"):
        masked_softmax(scores, 1.0, causal_span(3, 5))
    with pytest.raises(ValueError, match=r"scores are .*, not \[5\]"):
        masked_softmax(scores[0, 0, 0])


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
@pytest.mark.parametrize("shape", [(2, 2, 9, 3, 4), (1, 1, 1, 1, 1), (3, 1, 5, 2, 3)])
def test_unfused_attention_equals_the_definition(
    shape: tuple[int, ...], kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_unfused, "KEPT_BYTES", kept_bytes)
    batch, groups, length, heads, size = shape
    inputs = [normal(batch, groups, length, n, size, seed=n + 7 * k) for k, n in enumerate((heads, 1, 1))]
    inputs = [x.requires_grad_() for x in inputs]
    ids = (torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.3).cumsum(1)
    first = piece_starts(ids)
    positions = torch.arange(length // 2, length)
    whole = attention_sdpa(*inputs, plan_for_sdpa(first))
    for query, plan, expected in (
        (inputs[0], plan_unfused(first), whole),
        (inputs[0][:, :, positions], plan_unfused(first, positions), whole[:, positions]),
    ):
        ours = attention_unfused.attention_unfused(query, *inputs[1:], plan)
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)
        upstream = normal(*expected.shape, seed=5)
        wanted = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
        for got, want in zip(torch.autograd.grad(ours, inputs, upstream), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)
        weights = attention_weights(query, inputs[1], plan)
        assert weights.shape == (batch, groups, query.shape[2], heads, length)
        joined = torch.einsum("bgqhk,bgkd->bqghd", weights, inputs[2].squeeze(3)).flatten(2)
        torch.testing.assert_close(joined, expected, atol=1e-12, rtol=1e-10)
