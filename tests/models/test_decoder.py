"""The decoder against transformers' Llama and GPT-NeoX with the same weights, and packed rows against rows alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.kernels.choice import Kernels
from megatron.kernels.cross_entropy import IGNORED
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise

LENGTH = 160  # more than one block of the block-wise attention, and not a multiple of it


def llama_shape(**fields: object) -> ModelShape:
    section = ModelSection(preset="llama-tiny", seq_length=LENGTH, **fields)  # type: ignore[arg-type]
    return resolve_model(section, 100)


def neox_shape(**fields: object) -> ModelShape:
    section = ModelSection(
        preset="neox-160m",
        seq_length=LENGTH,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        **fields,  # type: ignore[arg-type]
    )
    return resolve_model(section, 100)


def decoder(shape: ModelShape, dtype: torch.dtype = torch.float32, backend: str = "blockwise") -> Decoder:
    model = Decoder(shape, Kernels(attention=backend))  # type: ignore[arg-type]
    initialise(model, 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases too must differ from 1 and 0
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 10)
    return model.to(dtype)


def hugging_face_llama(shape: ModelShape, ours: Decoder) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        attention_bias=shape.attention_bias,
        mlp_bias=shape.mlp_bias,
        tie_word_embeddings=shape.tie_word_embeddings,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    state = {}
    places = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    for name, value in ours.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if module.startswith("layers."):
            _, number, rest = module.split(".", 2)
            state[f"model.layers.{number}.{places[rest]}.{kind}"] = value
        elif module == "final_norm":
            state["model.norm.weight"] = value
        else:
            place = "model.embed_tokens.weight" if module == "embedding" else "lm_head.weight"
            state[place] = value[: shape.vocab_size]
    if shape.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def hugging_face_neox(shape: ModelShape, ours: Decoder) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        layer_norm_eps=shape.norm_eps,
        rotary_pct=shape.partial_rotary_factor,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "partial_rotary_factor": shape.partial_rotary_factor,
        },
        hidden_act="gelu",
        use_parallel_residual=shape.parallel_block,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = GPTNeoXForCausalLM(config)
    source, state = ours.state_dict(), {}
    heads, size = shape.num_attention_heads, shape.head_dim
    for n in range(shape.num_hidden_layers):
        here, there = f"layers.{n}.", f"gpt_neox.layers.{n}."
        for kind in ("weight", "bias"):
            names = [f"{here}attention.{part}.{kind}" for part in ("query", "key", "value")]
            parts = [source[name].view(heads, size, -1) for name in names]
            fused = torch.stack(parts, 1).reshape(3 * heads * size, -1)
            state[f"{there}attention.query_key_value.{kind}"] = fused if kind == "weight" else fused[:, 0]
            state[f"{there}attention.dense.{kind}"] = source[f"{here}attention.output.{kind}"]
            state[f"{there}mlp.dense_h_to_4h.{kind}"] = source[f"{here}mlp.up.{kind}"]
            state[f"{there}mlp.dense_4h_to_h.{kind}"] = source[f"{here}mlp.down.{kind}"]
            state[f"{there}input_layernorm.{kind}"] = source[f"{here}attention_norm.{kind}"]
            state[f"{there}post_attention_layernorm.{kind}"] = source[f"{here}mlp_norm.{kind}"]
    for kind in ("weight", "bias"):
        state[f"gpt_neox.final_layer_norm.{kind}"] = source[f"final_norm.{kind}"]
    state["gpt_neox.embed_in.weight"] = source["embedding.weight"][: shape.vocab_size]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing in (["lm_head.weight"], ["embed_out.weight"])  # renamed in transformers 5
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(source["head.weight"][: shape.vocab_size])
    return model.eval()


def random_batch(rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 100, (rows, LENGTH), generator=generator)
    targets = torch.randint(0, 100, (rows, LENGTH), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    return tokens, targets, torch.zeros(rows, LENGTH, dtype=torch.int32)


CASES = {
    "llama": (llama_shape(), hugging_face_llama),
    "llama untied, biases, no groups": (
        llama_shape(tie_word_embeddings=False, attention_bias=True, mlp_bias=True, num_key_value_heads=4),
        hugging_face_llama,
    ),
    "llama one key head, long base": (llama_shape(num_key_value_heads=1, rope_theta=5e5), hugging_face_llama),
    "neox": (neox_shape(), hugging_face_neox),
    "neox sequential, whole rotary": (neox_shape(parallel_block=False, partial_rotary_factor=1.0), hugging_face_neox),
}


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str, backend: str) -> None:
    shape, build = CASES[case]
    ours = decoder(shape, backend=backend)
    theirs = build(shape, ours)
    tokens, targets, documents = random_batch()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens, documents), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    valid = int((targets != IGNORED).sum())
    total, rows = ours(tokens, documents, targets, 1 / valid)
    total.backward()
    expected = torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(total[0].detach(), expected.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rows.sum() / valid, expected.detach().double(), atol=1e-6, rtol=1e-6)
    theirs_embedding = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.embedding.weight.grad[:100], theirs_embedding, atol=2e-6, rtol=1e-4)
    assert not ours.embedding.weight.grad[100:].any(), "padding words were trained"
    ours_norm = torch.stack([p.grad.norm() for p in ours.parameters()]).norm()
    theirs_norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
    torch.testing.assert_close(ours_norm, theirs_norm, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("shape", [llama_shape(), neox_shape()], ids=["llama", "neox"])
def test_packed_documents_equal_each_document_alone(shape: ModelShape, backend: str) -> None:
    packed = decoder(shape, torch.float64, backend)
    alone = decoder(shape, torch.float64, backend)
    tokens, targets, documents = random_batch(rows=2, seed=5)
    cuts = [[0, 1, 50, 130, LENGTH], [0, 128, LENGTH]]
    for row, row_cuts in enumerate(cuts):
        for number, start in enumerate(row_cuts[1:-1], 1):
            documents[row, start:] = number
    logits = packed.logits(tokens, documents)
    total, _ = packed(tokens, documents, targets)
    total.backward()
    for row, row_cuts in enumerate(cuts):
        for start, end in zip(row_cuts, row_cuts[1:], strict=False):
            part, zero = tokens[row : row + 1, start:end], torch.zeros(1, end - start, dtype=torch.int32)
            expected = alone.logits(part, zero)
            torch.testing.assert_close(logits[row : row + 1, start:end], expected, atol=1e-12, rtol=1e-10)
            alone.loss(part, targets[row : row + 1, start:end], zero).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-9, msg=name)


def test_without_document_mask_a_row_is_one_document() -> None:
    shape = dataclasses.replace(llama_shape(), document_mask=False)
    model, (tokens, _, documents) = decoder(shape), random_batch()
    split = documents.clone()
    split[:, 70:] = 1
    assert torch.equal(model.logits(tokens, documents), model.logits(tokens, split))


def test_bf16_stays_near_fp32_and_keeps_its_dtype() -> None:
    shape, (tokens, targets, documents) = llama_shape(), random_batch()
    wide, narrow = decoder(shape), decoder(shape, torch.bfloat16)
    assert narrow.logits(tokens, documents).dtype == torch.bfloat16
    loss = narrow.loss(tokens, targets, documents)
    assert loss.dtype == torch.float32 and not loss[targets == IGNORED].any()
    torch.testing.assert_close(loss.mean(), wide.loss(tokens, targets, documents).mean(), atol=5e-3, rtol=5e-3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([2, 8, 14]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["rmsnorm", "layernorm"]),
    st.integers(1, 200),
)
def test_parameter_count_is_that_of_the_module(
    layers: int, groups: int, a_group: int, size: int, gated: bool, bias: bool, tied: bool, norm: str, vocabulary: int
) -> None:
    section = ModelSection(
        seq_length=8,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=groups * a_group,
        num_key_value_heads=groups,
        head_dim=size,
        intermediate_size=40,
        gated_mlp=gated,
        attention_bias=bias,
        mlp_bias=not bias,
        tie_word_embeddings=tied,
        norm=norm,  # type: ignore[arg-type]
    )
    shape = resolve_model(section, vocabulary)
    with torch.device("meta"):
        model = Decoder(shape)
    assert shape.parameter_count() == sum(p.numel() for p in model.parameters())
    assert shape.padded_vocab_size % 64 == 0 and 0 <= shape.padded_vocab_size - vocabulary < 64


def test_initial_weights_do_not_depend_on_construction_order_or_dtype() -> None:
    shape = llama_shape()
    first = Decoder(shape)
    initialise(first, 3)
    torch.manual_seed(99)
    torch.rand(11)
    second = Decoder(shape)
    second.layers = torch.nn.ModuleDict(reversed(list(second.layers.items())))
    initialise(second.double(), 3)
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, theirs[name].float()), name
    initialise(second, 4)
    assert not torch.equal(first.embedding.weight, second.embedding.weight.float())


def test_initial_weights_are_scaled_by_depth_where_they_write_to_the_residual_stream() -> None:
    section = ModelSection(preset="llama-demo", seq_length=8, num_hidden_layers=8)
    model = Decoder(resolve_model(section, 64))
    initialise(model, 1)
    layer = model.layers["5"]
    assert abs(float(layer.mlp.up.weight.detach().std()) / 0.02 - 1) < 0.02
    for module in (layer.mlp.down, layer.attention.output):
        assert abs(float(module.weight.detach().std()) / (0.02 / 4) - 1) < 0.02
    assert torch.equal(model.final_norm.weight, torch.ones(256))
