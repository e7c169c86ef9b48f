"""Checkpoints of GPT-NeoX laid out here from their source's description, by cutting code of its own (laid_by_hand)."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from foreign.laid_by_hand import TABLES, words_on_ranks
from torch import Tensor

from megatron.config.model_shape import ModelShape


def neox_config(shape: ModelShape, **more: Any) -> dict[str, Any]:
    """The keys of a GPT-NeoX config."""
    learned = shape.position_embedding == "learned"
    act = {("silu", True): "swiglu", ("gelu", True): "geglu", ("silu", False): "silu"}
    return {
        "num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "num-attention-heads": shape.num_attention_heads,
        "num_kv_heads": shape.num_key_value_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "seq_length": shape.max_position_embeddings,
        "pos_emb": "learned" if learned else "rotary",
        "rotary_pct": shape.partial_rotary_factor,
        "rotary_emb_base": int(shape.rope_theta),
        "norm": shape.norm,
        "layernorm_epsilon": shape.norm_eps,
        "rms_norm_epsilon": shape.norm_eps,
        "activation": act.get((shape.hidden_act, shape.gated_mlp), "gelu"),
        "bias_gelu_fusion": shape.hidden_act == "gelu_tanh",
        "gpt_j_residual": shape.parallel_block,
        "no_weight_tying": not shape.tie_word_embeddings,
        "attention_config": [[["flash"], shape.num_hidden_layers]],
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
        **more,
    }


def neox_layers(
    weights: dict[str, Tensor], shape: ModelShape, tp: int, divisible_by: int = 16, split_mlp: bool = False
) -> dict[int, list[dict[str, Tensor]]]:
    """By number in the pipeline module, each rank's tensors under their own names."""
    norm = "weight" if shape.norm == "layernorm" else "scale"
    tables = {name: words_on_ranks(weights[name], shape, tp, divisible_by) for name in weights if name in TABLES}
    layers: dict[int, list[dict[str, Tensor]]] = {0: [{"word_embeddings.weight": part} for part in tables[TABLES[0]]]}
    if shape.position_embedding == "learned":
        for rank in layers[0]:
            rank["position_embeddings.weight"] = weights["positions.weight"]
    for number in range(shape.num_hidden_layers):
        layers[number + 2] = [{} for _ in range(tp)]
        for name, parts in neox_layer(weights, f"layers.{number}.", shape, tp, norm, split_mlp):
            for rank, part in zip(layers[number + 2], parts, strict=True):
                rank[name] = part.clone()
    last = shape.num_hidden_layers + 3
    layers[last] = [{f"norm.{norm}": weights["final_norm.weight"]} for _ in range(tp)]
    if "final_norm.bias" in weights:
        for rank in layers[last]:
            rank["norm.bias"] = weights["final_norm.bias"]
    if "head.weight" in weights:
        layers[last + 1] = [{"final_linear.weight": part} for part in tables["head.weight"]]
    return layers


def neox_layer(
    weights: dict[str, Tensor], prefix: str, shape: ModelShape, tp: int, norm: str, split_mlp: bool
) -> list[tuple[str, list[Tensor]]]:
    found: list[tuple[str, list[Tensor]]] = []
    for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
        found.append((f"{theirs}.{norm}", [weights[f"{prefix}{ours}.weight"]] * tp))
        if f"{prefix}{ours}.bias" in weights:
            found.append((f"{theirs}.bias", [weights[f"{prefix}{ours}.bias"]] * tp))
    for kind in ("weight", "bias"):
        if f"{prefix}attention.query.{kind}" in weights:
            parts = [weights[f"{prefix}attention.{n}.{kind}"].unflatten(0, (-1, shape.head_dim)) for n in QKV]
            if len(parts[0]) == len(parts[1]):
                ranks = list(torch.stack(parts, dim=1).flatten(0, 2).chunk(tp))
            else:
                cut = [part.chunk(tp) for part in parts]
                ranks = [torch.cat([part[rank].flatten(0, 1) for part in cut]) for rank in range(tp)]
            found.append((f"attention.query_key_value.{kind}", ranks))
        if f"{prefix}mlp.up.{kind}" not in weights:
            continue
        up = weights[f"{prefix}mlp.up.{kind}"].chunk(tp)
        if not shape.gated_mlp:
            found.append((f"mlp.dense_h_to_4h.{kind}", list(up)))
        elif split_mlp:
            found += [
                ("mlp.w3.weight", list(up)),
                ("mlp.w1.weight", list(weights[f"{prefix}mlp.gate.{kind}"].chunk(tp))),
            ]
        else:
            gate = weights[f"{prefix}mlp.gate.{kind}"].chunk(tp)
            found.append((f"mlp.linear1.{kind}", [torch.cat(pair) for pair in zip(up, gate, strict=True)]))
    down = ("mlp.w2" if split_mlp else "mlp.linear2") if shape.gated_mlp else "mlp.dense_4h_to_h"
    for theirs, ours in (("attention.dense", "attention.output"), (down, "mlp.down")):
        found.append((f"{theirs}.weight", list(weights[f"{prefix}{ours}.weight"].chunk(tp, dim=1))))
        if f"{prefix}{ours}.bias" in weights:
            bias = weights[f"{prefix}{ours}.bias"]
            # in a parallel block the ranks' biases are summed with their outputs
            shares = [bias * 0.25, bias * 0.75] if shape.parallel_block and tp == 2 else [bias] * tp
            found.append((f"{theirs}.bias", shares))
    return found


QKV = ("query", "key", "value")


def save_neox(
    folder: Path, layers: dict[int, list[dict[str, Tensor]]], config: dict[str, Any], pipeline: bool = True
) -> Path:
    """The step's folder as DeepSpeed and GPT-NeoX write it, and `latest`."""
    step = folder / "global_step7"
    (step / "configs").mkdir(parents=True)
    # as their own: braces, comments and trailing commas
    lines = ",\n  ".join(f'"{key}": {json.dumps(value)}' for key, value in config.items())
    (step / "configs" / "model.yml").write_text(f"# a comment\n{{\n  {lines},\n}}\n")
    (folder / "latest").write_text("global_step7")
    ranks = len(layers[0])
    for rank in range(ranks):
        module = OrderedDict(
            (f"sequential.{number}.{name}", tensor)
            for number, parts in layers.items()
            for name, tensor in parts[rank].items()
        )
        state = {"module": None if pipeline else module, "iteration": 7, "args": {"num_layers": config["num_layers"]}}
        torch.save({**state, "cuda_rng_state": torch.zeros(4)}, step / f"mp_rank_{rank:02d}_model_states.pt")
    for number, parts in layers.items() if pipeline else ():
        for rank, tensors in enumerate(parts):
            torch.save(tensors, step / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    return folder
