"""GPT-NeoX and Pythia."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.hf.families.family import Family, Key, activation
from megatron.hf.families.limits import whole_weights
from megatron.hf.families.rotary import Rotary
from megatron.hf.name_table import OURS, joined, one, query_key_value, words

_THEIRS = "gpt_neox.layers.{layer}."

_QKV = _THEIRS + "attention.query_key_value."
_TABLE = (
    words("embedding.weight", "gpt_neox.embed_in.weight"),
    one(OURS + "attention_norm.weight", _THEIRS + "input_layernorm.weight", "hidden"),
    one(OURS + "attention_norm.bias", _THEIRS + "input_layernorm.bias", "hidden"),
    one(OURS + "mlp_norm.weight", _THEIRS + "post_attention_layernorm.weight", "hidden"),
    one(OURS + "mlp_norm.bias", _THEIRS + "post_attention_layernorm.bias", "hidden"),
    joined(query_key_value("weight"), _QKV + "weight", "hidden", layout="per-head qkv"),
    joined(query_key_value("bias"), _QKV + "bias", layout="per-head qkv", only_if="qkv_bias"),
    one(OURS + "attention.output.weight", _THEIRS + "attention.dense.weight", "hidden", "query"),
    one(OURS + "attention.output.bias", _THEIRS + "attention.dense.bias", "hidden", only_if="output_bias"),
    one(OURS + "mlp.up.weight", _THEIRS + "mlp.dense_h_to_4h.weight", "intermediate", "hidden"),
    one(OURS + "mlp.up.bias", _THEIRS + "mlp.dense_h_to_4h.bias", "intermediate"),
    one(OURS + "mlp.down.weight", _THEIRS + "mlp.dense_4h_to_h.weight", "hidden", "intermediate"),
    one(OURS + "mlp.down.bias", _THEIRS + "mlp.dense_4h_to_h.bias", "hidden"),
    one("final_norm.weight", "gpt_neox.final_layer_norm.weight", "hidden"),
    one("final_norm.bias", "gpt_neox.final_layer_norm.bias", "hidden"),
    words("head.weight", "embed_out.weight", only_if="untied"),
)


def whole_head_dim(found: Mapping[str, Any]) -> int:
    """Of a class that cannot say another."""
    return int(found["hidden_size"]) // int(found["num_attention_heads"])


def every_head(found: Mapping[str, Any]) -> int:
    """Key and value heads of a class without groups."""
    return int(found["num_attention_heads"])


LAYERNORM = {
    "norm": "layernorm",
    "gated_mlp": False,
    "mlp_bias": True,
    "num_key_value_heads": every_head,
    "head_dim": whole_head_dim,
}

GPT_NEOX = Family(
    name="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    table=_TABLE,
    keys=(
        Key("vocab_size", "vocab_size", 50432),
        Key("hidden_size", "hidden_size", 6144),
        Key("intermediate_size", "intermediate_size", 24576),
        Key("num_hidden_layers", "num_hidden_layers", 44),
        Key("num_attention_heads", "num_attention_heads", 64),
        Key("max_position_embeddings", "max_position_embeddings", 2048),
        Key("initializer_range", "initializer_range", 0.02),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        activation("hidden_act", "gelu"),
        Key("tie_word_embeddings", "tie_word_embeddings", False),
        Key("attention_bias", "attention_bias", True),
        Key("use_parallel_residual", "parallel_block", True),
        Key("hidden_dropout", "hidden_dropout", 0.0),
    ),
    always=LAYERNORM,
    rotary=Rotary(theta="rotary_emb_base", share="rotary_pct", default_share=0.25),
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0, "classifier_dropout": 0.0},
    spellings=(("embed_out.", "lm_head."),),  # the head's own name in transformers 5
    buffers=(".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
    whole_heads=True,
)
