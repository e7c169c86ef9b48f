"""Megatron-LM's checkpoints, laid out by hand from the format: every tensor is ours again, and so are the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign.laid_by_hand import (
    GPT2,
    LLAMA,
    args_of,
    lay_megatron,
    logits_of,
    shape_of,
    weights_of,
)
from torch import Tensor

from megatron.config.model_shape import ModelShape
from megatron.foreign.checkpoint import foreign_shape, open_foreign


def imported(folder: Path, words: int, **more: Any) -> tuple[ModelShape, dict[str, Tensor]]:
    checkpoint = open_foreign(folder, pickles_allowed=True, **more)
    shape = foreign_shape(checkpoint, words)
    return shape, checkpoint.tensors(shape).all()


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (4, 2, 1), (2, 2, 2), (1, 1, 2), (8, 1, 1)]
MODELS = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-mha": LLAMA | {"num_key_value_heads": 8, "head_dim": 6},
    "qwen2": LLAMA | {"query_key_value_bias": True},
    "qwen3": LLAMA | {"qk_norm": "head"},
    "gpt2": GPT2,
    "gpt-rope": GPT2 | {"position_embedding": "rope", "partial_rotary_factor": 0.5, "hidden_act": "gelu"},
}
MODELS["gpt-rope"] = {k: v for k, v in MODELS["gpt-rope"].items() if k != "max_position_embeddings"}


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_same_weights_and_logits(model: str, tmp_path: Path) -> None:
    shape = shape_of(MODELS[model])
    weights = weights_of(shape)
    tokens = torch.randint(shape.vocab_size, (2, 40))
    wanted = logits_of(shape, weights, tokens)
    for tp, pp, vpp in LAYOUTS:
        if shape.num_attention_heads % tp:
            continue
        folder = lay_megatron(tmp_path / f"{tp}-{pp}-{vpp}", weights, shape, tp, pp, vpp=vpp)
        found_shape, found = imported(folder, shape.vocab_size)
        assert found_shape == shape
        check_same(found, weights)
        assert torch.equal(logits_of(found_shape, found, tokens), wanted)


@pytest.mark.parametrize("era", ["te", "local", "legacy", "oldest"])
def test_names_of_every_era(era: str, tmp_path: Path) -> None:
    for number, fields in enumerate((LLAMA | {"rope_theta": 10000.0}, GPT2)):
        shape = shape_of(fields)
        weights = weights_of(shape)
        folder = lay_megatron(tmp_path / str(number), weights, shape, 2, 2, era=era)
        assert imported(folder, shape.vocab_size)[0] == shape
        check_same(imported(folder, shape.vocab_size)[1], weights)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_rows_of_the_joint_projection_by_version(version: float, tmp_path: Path) -> None:
    shape = shape_of(GPT2)
    weights = weights_of(shape)
    folder = lay_megatron(tmp_path, weights, shape, 2, 1, era="oldest", version=version)
    check_same(imported(folder, shape.vocab_size)[1], weights)


def test_any_box_is_what_the_whole_has_there(tmp_path: Path) -> None:
    shape = shape_of(LLAMA)
    weights = weights_of(shape)
    checkpoint = open_foreign(lay_megatron(tmp_path, weights, shape, 2, 2), pickles_allowed=True)
    source = checkpoint.tensors(foreign_shape(checkpoint, shape.vocab_size))
    generator = torch.Generator().manual_seed(1)
    for name, whole in weights.items():
        assert source.shape(name) == tuple(whole.shape) and source.dtype(name) == whole.dtype
        for _ in range(6):
            box = []
            for size in whole.shape:
                begin, end = sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist())
                box.append((begin, end - begin))
            found = source.read(name, [begin for begin, _ in box], [size for _, size in box])
            assert torch.equal(found, whole[tuple(slice(begin, begin + size) for begin, size in box)])


def test_norms_stored_as_their_difference_from_one(tmp_path: Path) -> None:
    for number, fields in enumerate((LLAMA, GPT2, LLAMA | {"qk_norm": "head"})):
        shape = shape_of(fields)
        weights = weights_of(shape)
        stored = {n: t - 1 if "norm" in n and n.endswith("weight") else t for n, t in weights.items()}
        args = args_of(shape, 2, 1, apply_layernorm_1p=True)
        folder = lay_megatron(tmp_path / str(number), stored, shape, 2, 1, args=args)
        _, found = imported(folder, shape.vocab_size)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    narrow = {n: t.bfloat16() for n, t in stored.items()}
    folder = lay_megatron(tmp_path / "narrow", narrow, shape, 2, 1, args=args)
    _, found = imported(folder, shape.vocab_size)
    name = "layers.1.mlp_norm.weight"  # 1 + a bf16 number is no bf16 number
    assert torch.equal(found[name], narrow[name].float() + 1) and found["final_norm.weight"].dtype == torch.float32
    assert found["layers.1.mlp.up.weight"].dtype == torch.bfloat16


def test_interleaved_rotary_pairs_are_put_in_our_order(tmp_path: Path) -> None:
    """By turning neighbours in plain complex numbers: the scores of turned queries and keys must be the same."""
    shape = shape_of(LLAMA | {"partial_rotary_factor": 0.5, "head_dim": 8, "qk_norm": "head"})
    weights = weights_of(shape)
    args = args_of(shape, 2, 1, rotary_interleaved=True)
    _, found = imported(lay_megatron(tmp_path, weights, shape, 2, 1, args=args), shape.vocab_size)
    x = torch.randn(5, 32, dtype=torch.float64)
    angles = torch.arange(5)[:, None] * shape.rope_theta ** -(torch.arange(0, 4, 2) / 4)

    def theirs(name: str) -> Tensor:
        y = (x @ weights[f"layers.0.attention.{name}.weight"][:8].double().T) * weights[
            f"layers.0.attention.{name}_norm.weight"
        ]
        pairs = torch.view_as_complex(y[:, :4].unflatten(1, (2, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([torch.view_as_real(pairs).flatten(1), y[:, 4:]], 1)

    def ours(name: str) -> Tensor:
        y = (x @ found[f"layers.0.attention.{name}.weight"][:8].double().T) * found[
            f"layers.0.attention.{name}_norm.weight"
        ]
        pairs = torch.complex(y[:, :2], y[:, 2:4]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag, y[:, 4:]], 1)

    torch.testing.assert_close(ours("query") @ ours("key").T, theirs("query") @ theirs("key").T, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["layers.0.attention.value.weight"], weights["layers.0.attention.value.weight"])


def transformers_logits(shape: ModelShape, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """transformers' Llama or GPT-2 with these weights, by names written out here."""
    state: dict[str, Tensor] = {}
    words = slice(0, shape.vocab_size)
    sizes = {"vocab_size": shape.vocab_size, "use_cache": False, "tie_word_embeddings": shape.tie_word_embeddings}
    if shape.norm == "rmsnorm":
        config: Any = transformers.LlamaConfig(
            **sizes,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            intermediate_size=shape.intermediate_size,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        )
        state["model.embed_tokens.weight"], state["lm_head.weight"] = (
            weights[name][words] for name in ("embedding.weight", "head.weight")
        )
        state["model.norm.weight"] = weights["final_norm.weight"]
        parts = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        parts |= {f"attention.{n}": f"self_attn.{n[0]}_proj" for n in ("query", "key", "value", "output")}
        parts |= {f"mlp.{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
        for name, tensor in weights.items():
            if name.startswith("layers."):
                _, number, part, _ = name.replace("attention.", "attention/").replace("mlp.", "mlp/").split(".")
                state[f"model.layers.{number}.{parts[part.replace('/', '.')]}.weight"] = tensor
    else:
        config = transformers.GPT2Config(
            **sizes,
            n_positions=shape.max_position_embeddings,
            n_embd=shape.hidden_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_inner=shape.intermediate_size,
            activation_function="gelu_pytorch_tanh",
        )
        state["transformer.wte.weight"] = state["lm_head.weight"] = weights["embedding.weight"][words]
        state["transformer.wpe.weight"] = weights["positions.weight"]
        for kind in ("weight", "bias"):
            state[f"transformer.ln_f.{kind}"] = weights[f"final_norm.{kind}"]
            for number in range(shape.num_hidden_layers):
                ours, theirs = f"layers.{number}.", f"transformer.h.{number}."
                qkv = torch.cat([weights[f"{ours}attention.{n}.{kind}"] for n in ("query", "key", "value")])
                state[f"{theirs}attn.c_attn.{kind}"] = qkv.t()
                state[f"{theirs}attn.c_proj.{kind}"] = weights[f"{ours}attention.output.{kind}"].t()
                state[f"{theirs}mlp.c_fc.{kind}"] = weights[f"{ours}mlp.up.{kind}"].t()
                state[f"{theirs}mlp.c_proj.{kind}"] = weights[f"{ours}mlp.down.{kind}"].t()
                state[f"{theirs}ln_1.{kind}"] = weights[f"{ours}attention_norm.{kind}"]
                state[f"{theirs}ln_2.{kind}"] = weights[f"{ours}mlp_norm.{kind}"]
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert not model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, strict=False)[1]
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_logits_are_those_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    shape = shape_of(fields)
    weights = weights_of(shape)
    found_shape, found = imported(lay_megatron(tmp_path, weights, shape, 2, 2), shape.vocab_size)
    tokens = torch.randint(shape.vocab_size, (2, 40))
    wanted = transformers_logits(shape, weights, tokens)
    torch.testing.assert_close(logits_of(found_shape, found, tokens), wanted, rtol=1e-4, atol=1e-4)
