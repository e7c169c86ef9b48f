"""Every attention that can have a sliding window against plain softmax over what a token may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.config.errors import ConfigError
from megatron.config.kernel_checks import WHOLE_DOCUMENTS, attention_limit
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.kernels.document_lengths import DocumentBounds, document_bounds
from megatron.models.attention import plan_attention
from megatron.parallel.axis import ALONE
from megatron.parallel.context_attention import context_attention

LENGTH = 300  # more than two blocks of 128


def windowed(window: int, **fields: int) -> ModelShape:
    return resolve_model(ModelSection(preset="llama-tiny", seq_length=LENGTH, sliding_window=window, **fields), 64)


def brute_force(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, window: int) -> Tensor:
    places = torch.arange(LENGTH)
    seen = (places <= places[:, None]) & (places > places[:, None] - window)
    seen = (seen & (documents[:, None, :] == documents[:, :, None]))[:, None, None]
    scores = torch.einsum("bgthd,bgsxd->bghts", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bghts,bgsxd->btghd", weights, value).flatten(2)


@pytest.mark.parametrize("backend", ["sdpa", "blockwise", "flex", "unfused"])
@pytest.mark.parametrize("window", [1, 5, 128, 200, LENGTH])
@pytest.mark.parametrize("pattern", [0, 2])
def test_a_token_sees_its_window_and_no_other_document(backend: str, window: int, pattern: int) -> None:
    generator = torch.Generator().manual_seed(window)
    query = torch.randn(2, 2, LENGTH, 3, 16, generator=generator, requires_grad=backend != "flex")
    key, value = torch.randn(2, 2, 2, LENGTH, 1, 16, generator=generator)
    documents = torch.stack((torch.arange(LENGTH) // 170, torch.arange(LENGTH) // 37)).int()
    shape = windowed(window, sliding_pattern=pattern)
    bounds = document_bounds(documents) if window != 5 else None
    plan = plan_attention(shape, documents, torch.float32, backend, bounds=bounds)  # type: ignore[arg-type]
    for slides in (True, False)[: 1 + bool(pattern)]:
        mask = plan.of(slides).mask
        found = context_attention(query, key, value, mask, ALONE, "all-to-all", backend)  # type: ignore[arg-type]
        wanted = brute_force(query, key, value, documents, window if slides else LENGTH)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
        if query.requires_grad:
            upstream = torch.randn(found.shape, generator=generator)
            gradients = [torch.autograd.grad(out, query, upstream)[0] for out in (found, wanted)]
            torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", WHOLE_DOCUMENTS)
def test_B1_attentions_of_whole_documents_refuse_a_window_that_bites(backend: str) -> None:
    words = "it takes whole documents, and model.sliding_window is shorter than the sequences"
    assert attention_limit(backend, "bfloat16", 64, False, windowed=True) == words
    assert attention_limit(backend, "bfloat16", 64, False, windowed=False) is None
    documents = torch.zeros(1, LENGTH, dtype=torch.int32)
    with pytest.raises(ConfigError, match=f"kernels.attention = {backend} is not possible: {words}; set"):
        plan_attention(windowed(7), documents, torch.bfloat16, backend, bounds=DocumentBounds(1, LENGTH))  # type: ignore[arg-type]
