"""Checkpoints of Megatron-LM laid out here from the format's description, by cutting code of its own.

Weights come whole and by our names, go the trainer's way (joined, cut over ranks, spread over stages), and are written
by torch.save. Nothing of megatron.foreign is used.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.models.decoder import Decoder

WORDS = 90

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "norm_eps": 1e-6,
    "rope_theta": 5000.0,
}
GPT2: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu_tanh",
    "gated_mlp": False,
    "norm": "layernorm",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "position_embedding": "learned",
    "max_position_embeddings": 48,
}


def shape_of(fields: dict[str, Any], words: int = WORDS) -> ModelShape:
    """A tiny decoder of 48 positions at most."""
    return resolve_model(ModelSection(seq_length=48, vocab_size=words, **fields), words)


def weights_of(shape: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """Random values everywhere, so that whatever is swapped or forgotten shows; padding rows zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(shape)
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.5)
        if "norm" in name and name.endswith("weight"):
            found[name] += 1.0
        if name in ("embedding.weight", "head.weight"):
            found[name][shape.vocab_size :] = 0
    return found


def logits_of(shape: ModelShape, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """What our decoder makes of tokens [b, T]."""
    model = Decoder(shape)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval().logits(tokens, torch.zeros_like(tokens))


def args_of(shape: ModelShape, tp: int, pp: int, vpp: int = 1, **more: Any) -> argparse.Namespace:
    """The arguments that Megatron-LM would have kept for this model, and some that mean nothing to others."""
    learned = shape.position_embedding == "learned"
    gelu = {"silu": {}, "gelu": {"bias_gelu_fusion": False}, "gelu_tanh": {"bias_gelu_fusion": True}}[shape.hidden_act]
    known = {
        "num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": shape.num_key_value_heads != shape.num_attention_heads,
        "num_query_groups": shape.num_key_value_heads if shape.num_key_value_heads != shape.num_attention_heads else 1,
        "kv_channels": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "seq_length": shape.max_position_embeddings,
        "position_embedding_type": "learned_absolute" if learned else "rope",
        "rotary_base": int(shape.rope_theta),
        "rotary_percent": shape.partial_rotary_factor,
        "rotary_interleaved": False,
        "add_bias_linear": shape.mlp_bias,
        "add_qkv_bias": shape.query_key_value_bias,
        "qk_layernorm": shape.qk_norm == "head",
        "swiglu": shape.gated_mlp,
        "normalization": "RMSNorm" if shape.norm == "rmsnorm" else "LayerNorm",
        "norm_epsilon": shape.norm_eps,
        "apply_layernorm_1p": False,
        "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
        "init_method_std": shape.initializer_range,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "hidden_dropout": 0.1,
        "params_dtype": torch.bfloat16,
        "rank": 0,
        "data_path": ["1.0", "corpus_text_document"],
    }
    return argparse.Namespace(**{**known, **gelu, **more})


def joint(
    weights: dict[str, Tensor], prefix: str, kind: str, shape: ModelShape, tp: int, version: float
) -> list[Tensor]:
    """Each tensor rank's rows of the joint query, key and value projection."""
    size = shape.head_dim
    query, key, value = (
        weights[f"{prefix}attention.{name}.{kind}"].unflatten(0, (-1, size)) for name in ("query", "key", "value")
    )
    if version >= 2:
        each = len(query) // len(key)
        groups = [torch.cat([*query[g * each : (g + 1) * each], key[g], value[g]]) for g in range(len(key))]
        return list(torch.cat(groups).chunk(tp))
    ranks = []
    for parts in zip(query.chunk(tp), key.chunk(tp), value.chunk(tp), strict=True):
        stacked = torch.stack(parts)  # [3, heads, size, …]
        ranks.append(stacked.flatten(0, 2) if version == 0 else stacked.movedim(0, 2).flatten(0, 2))
    return ranks


def layer_on_ranks(
    weights: dict[str, Tensor], number: int, shape: ModelShape, tp: int, version: float
) -> list[dict[str, Tensor]]:
    """A layer's tensors on each tensor rank, by short names of this file."""
    prefix = f"layers.{number}."
    ranks: list[dict[str, Tensor]] = [{} for _ in range(tp)]

    def put(name: str, parts: list[Tensor]) -> None:
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone()

    for kind in ("weight", "bias"):
        for norm in ("attention_norm", "mlp_norm"):
            if f"{prefix}{norm}.{kind}" in weights:
                put(f"{norm}.{kind}", [weights[f"{prefix}{norm}.{kind}"]] * tp)
        if f"{prefix}attention.query.{kind}" in weights:
            put(f"qkv.{kind}", joint(weights, prefix, kind, shape, tp, version))
        if f"{prefix}mlp.up.{kind}" in weights:
            halves = [
                weights[f"{prefix}mlp.{n}.{kind}"].chunk(tp) for n in ("gate", "up") if shape.gated_mlp or n == "up"
            ]
            put(f"fc1.{kind}", [torch.cat(parts) for parts in zip(*halves, strict=True)])
    put("proj.weight", list(weights[f"{prefix}attention.output.weight"].chunk(tp, dim=1)))
    put("fc2.weight", list(weights[f"{prefix}mlp.down.weight"].chunk(tp, dim=1)))
    for name, ours in (("proj.bias", "attention.output.bias"), ("fc2.bias", "mlp.down.bias")):
        if prefix + ours in weights:
            put(name, [weights[prefix + ours]] * tp)
    for name in ("query_norm.weight", "key_norm.weight"):
        if f"{prefix}attention.{name}" in weights:
            put(name, [weights[f"{prefix}attention.{name}"]] * tp)
    return ranks


NAMES: dict[str, dict[str, str]] = {
    "te": {
        "attention_norm.": "self_attention.linear_qkv.layer_norm_",
        "qkv.": "self_attention.linear_qkv.",
        "proj.": "self_attention.linear_proj.",
        "mlp_norm.": "mlp.linear_fc1.layer_norm_",
        "fc1.": "mlp.linear_fc1.",
        "fc2.": "mlp.linear_fc2.",
        "query_norm.": "self_attention.q_layernorm.",
        "key_norm.": "self_attention.k_layernorm.",
    },
    "local": {
        "attention_norm.": "input_layernorm.",
        "qkv.": "self_attention.linear_qkv.",
        "proj.": "self_attention.linear_proj.",
        "mlp_norm.": "pre_mlp_layernorm.",
        "fc1.": "mlp.linear_fc1.",
        "fc2.": "mlp.linear_fc2.",
    },
    "legacy": {
        "attention_norm.": "input_norm.",
        "qkv.": "self_attention.query_key_value.",
        "proj.": "self_attention.dense.",
        "mlp_norm.": "post_attention_norm.",
        "fc1.": "mlp.dense_h_to_4h.",
        "fc2.": "mlp.dense_4h_to_h.",
    },
    "oldest": {
        "attention_norm.": "input_layernorm.",
        "qkv.": "attention.query_key_value.",
        "proj.": "attention.dense.",
        "mlp_norm.": "post_attention_layernorm.",
        "fc1.": "mlp.dense_h_to_4h.",
        "fc2.": "mlp.dense_4h_to_h.",
    },
}
"""By era, how short names begin in a layer."""


def renamed(name: str, era: str) -> str:
    short = next(short for short in NAMES[era] if name.startswith(short))
    return NAMES[era][short] + name.removeprefix(short)


def words_on_ranks(weight: Tensor, shape: ModelShape, tp: int, divisible_by: int) -> list[Tensor]:
    """The embedding with Megatron-LM's padding (noise, so that it shows where it is kept), cut by words."""
    multiple = divisible_by * tp
    rows = -(-shape.vocab_size // multiple) * multiple
    noise = torch.full((rows - shape.vocab_size, weight.shape[1]), 7.0)
    return [part.clone() for part in torch.cat([weight[: shape.vocab_size], noise]).chunk(tp)]


def megatron_contents(
    weights: dict[str, Tensor],
    shape: ModelShape,
    tp: int,
    pp: int,
    vpp: int = 1,
    era: str = "te",
    version: float = 3.0,
    divisible_by: int = 16,
    args: argparse.Namespace | None = None,
) -> dict[tuple[int, int], dict[str, Any]]:
    """By (tensor rank, pipeline rank), what its model_optim_rng.pt holds."""
    old = era in ("legacy", "oldest")
    tables = {name: words_on_ranks(weights[name], shape, tp, divisible_by) for name in weights if name in TABLES}
    args = args or args_of(shape, tp, pp, vpp, padded_vocab_size=len(tables["embedding.weight"][0]) * tp)
    contents: dict[tuple[int, int], dict[str, Any]] = {}
    per = shape.num_hidden_layers // (pp * vpp)
    for t in range(tp):
        for p in range(pp):
            content: dict[str, Any] = {"args": args, "iteration": 7, "optimizer": {"state": {0: torch.ones(3)}}}
            if version:
                content["checkpoint_version"] = version
            for v in range(vpp):
                first, last = p == v == 0, (p, v) == (pp - 1, vpp - 1)
                flat: OrderedDict[str, Tensor] = OrderedDict()
                begin = (v * pp + p) * per
                for local in range(per):
                    for name, tensor in layer_on_ranks(weights, begin + local, shape, tp, version)[t].items():
                        flat[f"layers.{local}.{renamed(name, era)}"] = tensor
                if last:
                    final = {"te": "final_layernorm", "local": "final_layernorm", "legacy": "final_norm"}
                    for kind in ("weight", "bias"):
                        if f"final_norm.{kind}" in weights:
                            flat[f"{final.get(era, 'final_layernorm')}.{kind}"] = weights[f"final_norm.{kind}"]
                make = nested if old else flatly
                key = "model" if vpp == 1 else f"model{v}"
                content[key] = make(flat, weights, tables, shape, t, first, last, era)
            contents[t, p] = content
    return contents


TABLES = ("embedding.weight", "head.weight")


def flatly(
    flat: OrderedDict[str, Tensor],
    weights: dict[str, Tensor],
    tables: dict[str, list[Tensor]],
    shape: ModelShape,
    rank: int,
    first: bool,
    last: bool,
    era: str,
) -> OrderedDict[str, Any]:
    """Megatron-core's one dictionary."""
    found: OrderedDict[str, Any] = OrderedDict()
    if first:
        found["embedding.word_embeddings.weight"] = tables["embedding.weight"][rank]
        if shape.position_embedding == "learned":
            found["embedding.position_embeddings.weight"] = weights["positions.weight"]
    found.update({f"decoder.{name}": tensor for name, tensor in flat.items()})
    if era == "te" and len(flat):
        found["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    if last and not shape.tie_word_embeddings:
        found["output_layer.weight"] = tables["head.weight"][rank]
    elif last and not first:
        found["output_layer.weight"] = tables["embedding.weight"][rank].clone()
    return found


def nested(
    flat: OrderedDict[str, Tensor],
    weights: dict[str, Tensor],
    tables: dict[str, list[Tensor]],
    shape: ModelShape,
    rank: int,
    first: bool,
    last: bool,
    era: str,
) -> OrderedDict[str, Any]:
    """The older dictionaries within dictionaries."""
    language: OrderedDict[str, Any] = OrderedDict()
    if first:
        language["embedding"] = {"word_embeddings": OrderedDict(weight=tables["embedding.weight"][rank])}
        if shape.position_embedding == "learned":
            language["embedding"]["position_embeddings"] = OrderedDict(weight=weights["positions.weight"])
    language["transformer" if era == "oldest" else "encoder"] = flat
    found: OrderedDict[str, Any] = OrderedDict(language_model=language)
    if last and not shape.tie_word_embeddings:
        language["output_layer"] = OrderedDict(weight=tables["head.weight"][rank])
    elif last and not first:
        found["word_embeddings_for_head"] = OrderedDict(weight=tables["embedding.weight"][rank].clone())
    return found


def save_megatron(folder: Path, contents: dict[tuple[int, int], dict[str, Any]], **how: Any) -> Path:
    """The files in their folders, and the tracker."""
    pipeline = max(p for _, p in contents)
    for (t, p), content in contents.items():
        rank = folder / "iter_0000007" / (f"mp_rank_{t:02d}_{p:03d}" if pipeline else f"mp_rank_{t:02d}")
        rank.mkdir(parents=True)
        torch.save(content, rank / "model_optim_rng.pt", **how)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def lay_megatron(folder: Path, weights: dict[str, Tensor], shape: ModelShape, tp: int, pp: int, **more: Any) -> Path:
    """A whole checkpoint."""
    return save_megatron(folder, megatron_contents(weights, shape, tp, pp, **more))
