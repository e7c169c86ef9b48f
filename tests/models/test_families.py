"""Each model family against the model of `transformers` with the same weights: logits and all gradients, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import hugging_face_models as theirs
from models.hugging_face_models import Twin, all_in_float64
from models.tensor_cases import IGNORED, LENGTH, make_decoder, tiny_shape

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.kernels.choice import Kernels
from megatron.models.decoder import Decoder
from megatron.models.joined import join
from megatron.parallel.model_place import ONE_PROCESS

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
GEMMA3: dict[str, Any] = {
    "norm_place": "both",
    "norm_unit_offset": True,
    "qk_norm": "head",
    "hidden_size": 64,
    "embedding_multiplier": 8.0,  # sqrt(hidden_size)
    "attention_multiplier": 24**-0.5,
    "hidden_act": "gelu_tanh",
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
COHERE: dict[str, Any] = {"norm": "layernorm_no_bias", "parallel_block": True, "shared_norm": True}
FAMILIES: dict[str, tuple[ModelShape, Callable[[ModelShape, Decoder], Twin]]] = {
    "llama 3.1": (tiny_shape(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 12}), theirs.llama),
    "llama, linear": (tiny_shape(rope_scaling={"rope_type": "linear", "factor": 3.0}), theirs.llama),
    "llama, yarn": (tiny_shape(rope_scaling=YARN, rope_theta=50.0, head_dim=16), theirs.llama),
    "llama, yarn, told": (
        tiny_shape(rope_scaling=YARN | {"attention_factor": 0.7, "beta_fast": 3.0, "beta_slow": 0.5}),
        theirs.llama,
    ),
    "mistral": (tiny_shape(tie_word_embeddings=False), theirs.mistral),
    "qwen2": (tiny_shape(query_key_value_bias=True, norm_eps=1e-6), theirs.qwen2),
    "qwen3": (tiny_shape(qk_norm="head", head_dim=16, norm_eps=1e-6), theirs.qwen3),
    "olmo2": (tiny_shape(qk_norm="width", norm_place="after", tie_word_embeddings=False), theirs.olmo2),
    "phi3": (tiny_shape(tie_word_embeddings=False), theirs.phi3),
    "phi4 mini": (tiny_shape(partial_rotary_factor=0.75, head_dim=16, hidden_size=64), theirs.phi3),
    "gpt2": (tiny_shape("gpt2", num_key_value_heads=4), theirs.gpt2),
    "cohere": (tiny_shape(**COHERE, logit_multiplier=0.0625), theirs.cohere),
    "cohere, biased and untied": (tiny_shape(**COHERE, attention_bias=True, tie_word_embeddings=False), theirs.cohere),
    "mistral with a window": (tiny_shape(tie_word_embeddings=False, sliding_window=7), theirs.mistral),
    "phi3 with a window": (tiny_shape(tie_word_embeddings=False, sliding_window=1), theirs.phi3),
    "gemma3, all layers full": (tiny_shape(**GEMMA3), theirs.gemma3),
    "gemma3": (
        tiny_shape(**GEMMA3, num_hidden_layers=3, sliding_window=6, sliding_pattern=3, rope_local_theta=100.0),
        theirs.gemma3,
    ),
    "gemma3, window beyond the row": (
        tiny_shape(**GEMMA3, sliding_window=LENGTH, sliding_pattern=2, rope_local_theta=100.0),
        theirs.gemma3,
    ),
}


def batch(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(0, vocabulary, (2, 3, LENGTH), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    return tokens, targets, torch.zeros(3, LENGTH, dtype=torch.int32)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, largest: float, name: str) -> None:
    size = float(wanted.abs().max())
    torch.testing.assert_close(
        found, wanted, atol=1e-10 * size + 1e-13 * largest, rtol=1e-9, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient_equal_transformers(family: str, joined: bool, backend: str) -> None:
    shape, build = FAMILIES[family]
    ours = make_decoder(shape, backend, ONE_PROCESS)
    if joined:
        join(ours)
    tokens, targets, documents = batch(shape.vocab_size)
    with all_in_float64():
        twin = build(shape, ours)
        logits = twin.model(tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert logits.dtype == torch.float64
    with torch.no_grad():
        assert_near(ours.logits(tokens, documents), logits.detach(), float(logits.detach().abs().max()), "logits")
    ours(tokens, documents, targets, 1 / int((targets != IGNORED).sum()))[0].backward()
    found = list(twin.gradients(ours))
    largest = max(float(wanted.abs().max()) for _, _, wanted in found)
    for name, mine, wanted in found:
        assert_near(mine, wanted, largest, name)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "gpt2", "gemma3", "cohere", "mistral with a window"])
def test_packed_documents_equal_each_document_alone(family: str) -> None:
    shape, _ = FAMILIES[family]
    packed, alone = (make_decoder(shape, "blockwise", ONE_PROCESS) for _ in range(2))
    tokens, targets, documents = batch(shape.vocab_size)
    documents[:, 5:] = 1
    documents[:, 17:] = 2
    logits = packed.logits(tokens, documents)
    packed(tokens, documents, targets)[0].backward()
    for start, end in ((0, 5), (5, 17), (17, LENGTH)):
        part, one = tokens[:, start:end], torch.zeros_like(documents[:, start:end])
        torch.testing.assert_close(logits[:, start:end], alone.logits(part, one), atol=1e-11, rtol=1e-10)
        alone(part, one, targets[:, start:end])[0].backward()
    largest = max(float(p.grad.abs().max()) for p in alone.parameters())
    for (name, mine), wanted in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert_near(mine.grad, wanted.grad, largest, name)


def test_without_document_mask_learned_positions_count_over_the_row() -> None:
    fields: dict[str, Any] = {"num_key_value_heads": 4, "max_position_embeddings": LENGTH}
    model = make_decoder(tiny_shape("gpt2", document_mask=False, **fields), "sdpa", ONE_PROCESS)
    tokens, _, documents = batch(100)
    split = (torch.arange(LENGTH) // 5).expand(3, -1)
    assert torch.equal(model.logits(tokens, documents), model.logits(tokens, split))
    with pytest.raises(ConfigError, match=f"25 positions is longer than model.max_position_embeddings {LENGTH}"):
        model.logits(torch.zeros(1, LENGTH + 1, dtype=torch.int64), torch.zeros(1, LENGTH + 1, dtype=torch.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_weights_stay_near_wide_ones(family: str) -> None:
    shape, _ = FAMILIES[family]
    wide = Decoder(shape, Kernels(attention="sdpa"))
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.copy_((drawn / 16 + (parameter.ndim == 1 and not shape.norm_unit_offset)).bfloat16())
    narrow = Decoder(shape, Kernels(attention="sdpa")).bfloat16()
    narrow.load_state_dict(wide.state_dict())
    tokens, targets, documents = batch(shape.vocab_size)
    found, wanted = (model.loss(tokens, targets, documents) for model in (narrow, wide))
    assert narrow.logits(tokens, documents).dtype == torch.bfloat16
    torch.testing.assert_close(found.mean(), wanted.mean(), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "gpt2", "gemma3", "cohere", "phi4 mini", "llama, yarn"])
def test_triton_kernels_give_the_same(family: str) -> None:
    shape = dataclasses.replace(FAMILIES[family][0], hidden_dropout=0.0)
    kernels = Kernels(attention="sdpa", norm="triton", rope="triton", activation="triton")
    tokens, targets, documents = (x[:2, :9].contiguous() for x in batch(shape.vocab_size))
    plain, fast = make_decoder(shape, "sdpa", ONE_PROCESS), Decoder(shape, kernels).double()
    fast.load_state_dict(plain.state_dict())
    join(fast)
    totals, gradients = [], []
    for model in (plain, fast):
        total, _ = model(tokens, documents, targets)
        total.backward()
        totals.append(total.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*totals, atol=0, rtol=1e-12)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, wanted in gradients[0].items():
        assert_near(gradients[1][name], wanted, largest, name)
