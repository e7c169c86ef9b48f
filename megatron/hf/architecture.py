"""Which Hugging Face architecture says the same as a ModelShape, and its config.json.

A model that no architecture can express is refused with the field that stands in the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.name_table import GPT_NEOX, LLAMA, Entry

_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Architecture:
    """A model class of `transformers` and its name table."""

    name: str
    model_type: str
    table: tuple[Entry, ...]


LLAMA_ARCHITECTURE = Architecture("LlamaForCausalLM", "llama", LLAMA)
NEOX_ARCHITECTURE = Architecture("GPTNeoXForCausalLM", "gpt_neox", GPT_NEOX)


def architecture_for(shape: ModelShape) -> Architecture:
    """RMSNorm models are Llamas, LayerNorm models GPT-NeoXs. Raises ConfigError naming each field that neither says."""
    if shape.norm == "rmsnorm":
        architecture, wanted = LLAMA_ARCHITECTURE, _llama_wants(shape)
    else:
        architecture, wanted = NEOX_ARCHITECTURE, _neox_wants(shape)
    missed = [
        f"model.{field} = {value!r}: {architecture.name} can only say {only!r}"
        for field, value, only in wanted
        if value != only
    ]
    if missed:
        kind = f'model.norm = "{shape.norm}" makes this a {architecture.name}, which cannot express it all:'
        raise ConfigError("\n  ".join([kind, *missed]))
    return architecture


def _llama_wants(shape: ModelShape) -> list[tuple[str, Any, Any]]:
    return [
        ("gated_mlp", shape.gated_mlp, True),
        ("parallel_block", shape.parallel_block, False),
        ("partial_rotary_factor", float(shape.partial_rotary_factor), 1.0),
        ("hidden_size", shape.hidden_size, _multiple(shape.hidden_size, shape.num_attention_heads)),
    ]


def _neox_wants(shape: ModelShape) -> list[tuple[str, Any, Any]]:
    return [
        ("gated_mlp", shape.gated_mlp, False),
        ("mlp_bias", shape.mlp_bias, True),
        ("num_key_value_heads", shape.num_key_value_heads, shape.num_attention_heads),
        ("head_dim", shape.head_dim, shape.hidden_size // shape.num_attention_heads),
        ("hidden_size", shape.hidden_size, _multiple(shape.hidden_size, shape.num_attention_heads)),
    ]


def _multiple(size: int, of: int) -> int:
    return size // of * of


def config_json(shape: ModelShape, *, bos_token_id: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
    """The folder's config.json, in the words of `transformers` 4 and 5 both. `dtype`: "float32" or "bfloat16"."""
    architecture = architecture_for(shape)
    common: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "hidden_act": _ACTIVATION[shape.hidden_act],
        "max_position_embeddings": shape.max_position_embeddings,
        "initializer_range": shape.initializer_range,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attention_bias": shape.attention_bias,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if architecture is LLAMA_ARCHITECTURE:
        return common | {
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "mlp_bias": shape.mlp_bias,
            "rms_norm_eps": shape.norm_eps,
        }
    factor = float(shape.partial_rotary_factor)
    common["rope_parameters"]["partial_rotary_factor"] = factor
    return common | {
        "layer_norm_eps": shape.norm_eps,
        "use_parallel_residual": shape.parallel_block,
        "rotary_pct": factor,
        "rotary_emb_base": shape.rope_theta,
        "hidden_dropout": shape.hidden_dropout,  # its three sites are ours; Llama's config has none
        "classifier_dropout": 0.0,
    }
