"""A tiny random model of each family as `transformers` makes it, and its tensors as ours by plain slicing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

WORDS = 101
"""Odd, so that the vocabulary is padded."""


@dataclass(frozen=True)
class FamilyCase:
    """A config of `transformers`. exact: whether it computes all in float64 when told to, so that logits must be equal
    to 1e-10 there."""

    model_type: str
    fields: dict[str, Any]
    exact: bool = False


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": None,  # with one, its embedding would not be trained
        **more,
    }


_GPT2 = {
    "vocab_size": WORDS,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_GEMMA = _sizes(
    num_key_value_heads=2,
    layer_types=["full_attention"] * 2,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
_UNCAPPED = {key: value for key, value in _GEMMA.items() if key != "layer_types"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}

_OLMO3_ROPE = {"full_attention": _YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}

CASES = {
    "llama": FamilyCase("llama", _sizes(num_key_value_heads=2, head_dim=12)),
    "llama 2, every head": FamilyCase("llama", _sizes(rms_norm_eps=1e-5)),
    "llama 3": FamilyCase("llama", _sizes(num_key_value_heads=1, rope_parameters=_LLAMA3, tie_word_embeddings=True)),
    "llama linear, biased": FamilyCase("llama", _sizes(rope_parameters=_LINEAR, attention_bias=True, mlp_bias=True)),
    "llama yarn, gelu": FamilyCase("llama", _sizes(rope_parameters=_YARN, hidden_act="gelu")),
    "mistral": FamilyCase("mistral", _sizes(num_key_value_heads=2, head_dim=16, sliding_window=None)),
    "mistral, long window": FamilyCase("mistral", _sizes(num_key_value_heads=2, sliding_window=64)),
    "qwen2": FamilyCase("qwen2", _sizes(num_key_value_heads=2)),
    "qwen2 tied": FamilyCase("qwen2", _sizes(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": FamilyCase("qwen3", _sizes(num_key_value_heads=2, head_dim=16)),
    "qwen3 tied, biased": FamilyCase(
        "qwen3", _sizes(num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, attention_bias=True)
    ),
    "olmo2": FamilyCase("olmo2", _sizes(num_key_value_heads=2)),
    "olmo2 tied": FamilyCase("olmo2", _sizes(num_key_value_heads=None, tie_word_embeddings=True)),
    "phi3": FamilyCase("phi3", _sizes(num_key_value_heads=2)),
    "phi3 partial, tied": FamilyCase("phi3", _sizes(partial_rotary_factor=0.5, tie_word_embeddings=True)),
    "gpt_neox": FamilyCase("gpt_neox", _sizes()),
    "gpt_neox tied, one after the other": FamilyCase(
        "gpt_neox", _sizes(use_parallel_residual=False, tie_word_embeddings=True, rotary_pct=0.5, hidden_act="gelu_new")
    ),
    "gpt_neox without attention biases": FamilyCase("gpt_neox", _sizes(attention_bias=False, rotary_pct=1.0)),
    "gemma": FamilyCase("gemma", _sizes(num_key_value_heads=1, head_dim=16)),
    "gemma2": FamilyCase("gemma2", _GEMMA | {"head_dim": 8, "query_pre_attn_scalar": 20}),
    "gemma3": FamilyCase("gemma3_text", _GEMMA | {"head_dim": 8, "rope_parameters": _GEMMA3_ROPE}),
    "mistral with a window": FamilyCase("mistral", _sizes(num_key_value_heads=2, sliding_window=7)),
    "phi3 with a window": FamilyCase("phi3", _sizes(num_key_value_heads=2, sliding_window=1)),
    "qwen2 with windows": FamilyCase(
        "qwen2", _sizes(num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=0)
    ),
    "qwen3, every other layer": FamilyCase(
        "qwen3",
        _sizes(
            num_key_value_heads=2, head_dim=16, use_sliding_window=True, sliding_window=6, layer_types=[_SLIDING, _FULL]
        ),
    ),
    "gemma2 with windows": FamilyCase("gemma2", _UNCAPPED | {"head_dim": 8, "sliding_window": 8}),
    "gemma3 with windows": FamilyCase(
        "gemma3_text",
        _UNCAPPED
        | {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "sliding_window": 6,
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING],
            "rope_parameters": _GEMMA3_ROPE,
        },
    ),
    "gemma3, too few layers for a full one": FamilyCase(
        "gemma3_text", _UNCAPPED | {"head_dim": 8, "sliding_window": 9}
    ),
    "olmo3": FamilyCase(
        "olmo3",
        _sizes(num_key_value_heads=2, num_hidden_layers=5, sliding_window=7, rope_parameters=_OLMO3_ROPE),
    ),
    "cohere": FamilyCase("cohere", _sizes(num_key_value_heads=2, logit_scale=2.0, layer_norm_eps=1e-3)),
    "cohere untied, biased": FamilyCase(
        "cohere",
        _sizes(tie_word_embeddings=False, attention_bias=True, rope_parameters=_LINEAR, logit_scale=1.3),
    ),
    "gpt2": FamilyCase("gpt2", _GPT2, exact=True),
    "gpt2 untied": FamilyCase("gpt2", _GPT2 | {"tie_word_embeddings": False, "n_inner": 40}, exact=True),
}


def made(case: FamilyCase, folder: Path, shard_size: str = "5GB") -> Any:
    """The model that transformers made, its norms and biases random too, saved to the folder."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(case.model_type, **case.fields)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ours_by_hand(model: Any) -> dict[str, Tensor]:
    """Our tensors of a model of transformers, by plain slicing of its parameters, without any table of ours."""
    config, their = model.config, dict(model.named_parameters(remove_duplicate=True))
    kind = config.model_type
    ours: dict[str, Tensor] = {}
    for name, tensor in their.items():
        tensor = tensor.detach()
        if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight")):
            ours["embedding.weight"] = _padded(tensor)
        elif name in ("lm_head.weight", "embed_out.weight"):
            ours["head.weight"] = _padded(tensor)
        elif name.endswith("wpe.weight"):
            ours["positions.weight"] = tensor
        elif (last := name.removeprefix("model.").removeprefix("gpt_neox.").removeprefix("transformer.")).startswith(
            ("norm.", "final_layer_norm.", "ln_f.")
        ):
            ours["final_norm." + last.split(".")[1]] = tensor
        else:
            ours |= _of_layer(kind, last, tensor, config)
    return ours


def _padded(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(-len(tensor) % 64, tensor.shape[1])])


_OWN = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "attention.output",
    "dense": "attention.output",
    "q_norm": "attention.query_norm",
    "k_norm": "attention.key_norm",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
    "dense_h_to_4h": "mlp.up",
    "dense_4h_to_h": "mlp.down",
    "input_layernorm": "attention_norm",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_after_norm",
    "post_attention_layernorm": "mlp_norm",
}
_AFTER = ("olmo2", "olmo3", "gemma2", "gemma3_text")
"""Families whose norm of that name is of what attention gives."""


def _of_layer(kind: str, name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    _, number, *path, module, what = name.split(".")
    begin = f"layers.{number}."
    size = config.hidden_size // config.num_attention_heads
    if module == "query_key_value":
        heads = tensor.reshape(config.num_attention_heads, 3, size, -1)
        return {
            f"{begin}attention.{part}.{what}": heads[:, k].reshape(-1, *tensor.shape[1:])
            for k, part in enumerate(("query", "key", "value"))
        }
    if module in ("qkv_proj", "c_attn"):
        whole = tensor.t() if module == "c_attn" and what == "weight" else tensor
        query, group = config.num_attention_heads * size, getattr(config, "num_key_value_heads", 0) * size
        parts = whole.split([query, group, group] if group else [query] * 3)
        return {f"{begin}attention.{p}.{what}": t for p, t in zip(("query", "key", "value"), parts, strict=True)}
    if kind == "cohere" and module in ("q_proj", "k_proj"):  # neighbours of a head turn there, halves here
        heads = tensor.unflatten(0, (-1, size))
        return {f"{begin}{_OWN[module]}.{what}": torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1)}
    if module == "gate_up_proj":
        gate, up = tensor.chunk(2)
        return {begin + "mlp.gate." + what: gate, begin + "mlp.up." + what: up}
    if module in ("c_proj", "c_fc"):
        own = {"attn": "attention.output", "mlp": "mlp.up" if module == "c_fc" else "mlp.down"}[path[0]]
        return {f"{begin}{own}.{what}": tensor.t() if what == "weight" else tensor}
    own = "attention_after_norm" if kind in _AFTER and module == "post_attention_layernorm" else _OWN[module]
    return {f"{begin}{own}.{what}": tensor}
