"""The masked softmax in Triton against its definition and torch's softmax; and how many kernels it launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels import masked_softmax_triton as kernels
from megatron.kernels.attention import attention_sdpa, piece_starts, plan_for_sdpa
from megatron.kernels.attention_unfused import UnfusedPlan, attention_unfused
from megatron.kernels.masked_softmax import Span, causal_span, document_span, masked_softmax
from megatron.kernels.masked_softmax_triton import (
    TRITON,
    masked_softmax_triton,
    softmax_gradient_into_triton,
    softmax_into_triton,
)

TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made_span(batch: int, queries: int, keys: int, device: torch.device) -> Span:
    """A stretch for each query, some of them empty."""
    first = torch.randint(0, keys, (batch, queries), generator=torch.Generator().manual_seed(1))
    end = torch.randint(0, keys + 1, (batch, queries), generator=torch.Generator().manual_seed(2))
    return Span(first.int().to(device), end.int().to(device))


def both(scores: Tensor, scale: float, span: Span | None, mask: Tensor | None) -> None:
    """Forward and backward, in the scores' dtype against the definition in float64."""
    tolerance = TOLERANCE[scores.dtype]
    scores = scores.detach().requires_grad_()
    exact = scores.detach().double().requires_grad_()
    out, expected = masked_softmax_triton(scores, scale, span, mask), masked_softmax(exact, scale, span, mask)
    assert out.dtype == scores.dtype and out.shape == scores.shape and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    upstream = normal(*scores.shape, seed=9).to(scores)
    (got,) = torch.autograd.grad(out, scores, upstream)
    (want,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(got.double(), want, atol=8 * tolerance * scale, rtol=4 * tolerance)


SHAPES = [(2, 2, 3, 5), (1, 2, 3, 2, 33), (2, 1, 2, 1, 257), (1, 1, 5, 1), (0, 2, 3, 4), (2, 2, 0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", ["nothing", "span", "mask", "both"])
def test_equals_the_definition(shape: tuple[int, ...], masked: str, device: torch.device) -> None:
    span = made_span(shape[0], shape[2], shape[-1], device) if masked in ("span", "both") else None
    generator = torch.Generator().manual_seed(4)
    mask = (torch.rand(*shape[2:], generator=generator) < 0.6).to(device) if masked in ("mask", "both") else None
    both(normal(*shape).to(device), 0.6, span, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    both((normal(1, 2, 4, 2, 40) * 3).to(device, dtype), 0.5, causal_span(4, 40, device), None)


@pytest.mark.parametrize("masked", ["nothing", "span", "mask"])
def test_rows_longer_than_registers(masked: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROW", 8)
    monkeypatch.setattr(kernels, "_CHUNK", 16)
    shape = (2, 1, 3, 2, 53)
    span = made_span(2, 3, 53, device) if masked == "span" else None
    mask = (torch.rand(2, 1, 3, 2, 53) < 0.5).to(device) if masked == "mask" else None
    both(normal(*shape).to(device), 0.6, span, mask)
    if span is not None:
        both(normal(*shape).to(device), 0.6, Span(span.first[:1], span.end[:1]), mask)


def test_one_span_and_one_mask_serve_all_rows(device: torch.device) -> None:
    mask = (torch.rand(2, 1, 1, 1, 9) < 0.7).to(device)
    both(normal(2, 3, 4, 2, 9).to(device), 1.3, causal_span(4, 9, device), mask.expand(2, 3, 4, 2, 9))
    both(normal(2, 3, 4, 9).to(device), 1.3, causal_span(4, 9, device), mask[:, :, 0])


def test_without_masks_it_is_torchs_softmax(device: torch.device) -> None:
    scores = normal(2, 2, 3, 41).to(device).requires_grad_()
    ours, theirs = masked_softmax_triton(scores, 0.7), torch.softmax(0.7 * scores, -1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    upstream = normal(2, 2, 3, 41, seed=1).to(device)
    (got,), (want,) = (torch.autograd.grad(out, scores, upstream) for out in (ours, theirs))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_strided_scores_and_gradients(device: torch.device) -> None:
    scores = normal(2, 5, 3, 4).to(device).transpose(1, 3).requires_grad_()
    expected = torch.softmax(scores, -1)
    out = masked_softmax_triton(scores)
    upstream = normal(5, 2, 4, 3).to(device).permute(1, 2, 3, 0)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    (got,), (want,) = (torch.autograd.grad(x, scores, upstream) for x in (out, expected))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_scores_stay_finite(dtype: torch.dtype, device: torch.device) -> None:
    scores = (torch.tensor([1e4, -1e4, 9984.0, 0.0]) * torch.ones(1, 1, 2, 1)).to(device, dtype)
    expected = torch.softmax(scores.double(), -1)
    ours = masked_softmax_triton(scores).double()
    torch.testing.assert_close(ours, expected, atol=2**-7, rtol=2**-7)


def test_what_is_hidden_may_be_anything(device: torch.device) -> None:
    """Scores and gradients outside a span are neither used nor spread."""
    span = causal_span(3, 20, device)
    weights, grad = normal(1, 1, 3, 20).to(device), normal(1, 1, 3, 20, seed=1).to(device)
    clean_weights, clean_grad = weights.clone(), grad.clone()
    hidden = torch.arange(20, device=device) >= span.end[0, :, None]
    weights[0, 0, hidden], grad[0, 0, hidden] = torch.nan, torch.inf
    for w, g in ((weights, grad), (clean_weights, clean_grad)):
        softmax_into_triton(w, 0.5, span)
        softmax_gradient_into_triton(w, g, 0.5, span)
    assert torch.equal(weights, clean_weights) and torch.equal(grad, clean_grad)
    assert (weights[0, 0, hidden] == 0).all() and (grad[0, 0, hidden] == 0).all()


def test_in_place_needs_contiguous_tensors_and_says_that_it_wrote(device: torch.device) -> None:
    scores = normal(1, 2, 3, 4).to(device)
    before = scores._version
    softmax_into_triton(scores, 1.0)
    assert scores._version > before
    with pytest.raises(ValueError, match="written in place, a tensor is contiguous"):
        softmax_into_triton(normal(1, 2, 4, 3).to(device).transpose(2, 3), 1.0)


def test_gradcheck(device: torch.device) -> None:
    scores = normal(1, 2, 3, 2, 4).to(device).requires_grad_()
    torch.autograd.gradcheck(lambda x: masked_softmax_triton(x, 0.3, causal_span(3, 4, device)), (scores,))


def test_unfused_attention_on_it(device: torch.device) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1]], device=device)
    first = piece_starts(ids)
    inputs = [normal(2, 2, 6, n, 4, seed=k).to(device).requires_grad_() for k, n in enumerate((3, 1, 1))]
    expected = attention_sdpa(*inputs, plan_for_sdpa(first))
    ours = attention_unfused(*inputs, UnfusedPlan(document_span(first), TRITON))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)
    upstream = normal(*expected.shape, seed=5).to(device)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for got, want in zip(torch.autograd.grad(ours, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)


def test_one_launch_each_way(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: object) -> object:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("_forward_rows", "_backward_rows", "_forward_long", "_backward_long"):
        monkeypatch.setattr(kernels, name, Counting(name))
    scores = normal(1, 2, 3, 8).to(device).requires_grad_()
    masked_softmax_triton(scores, 1.0, causal_span(3, 8, device)).sum().backward()
    assert launched == ["_forward_rows", "_backward_rows"]
    assert masked_softmax_triton(scores[:0]).shape == (0, 2, 3, 8) and len(launched) == 2
