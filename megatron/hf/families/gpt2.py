"""GPT-2: learned positions, and matrices [inputs, outputs]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.hf.families.family import Family, Key, activation
from megatron.hf.families.gpt_neox import LAYERNORM
from megatron.hf.families.limits import Only, whole_weights
from megatron.hf.name_table import OURS, joined, one, query_key_value, words

_THEIRS = "transformer.h.{layer}."
_TABLE = (
    words("embedding.weight", "transformer.wte.weight"),
    one("positions.weight", "transformer.wpe.weight", "positions", "hidden"),
    one(OURS + "attention_norm.weight", _THEIRS + "ln_1.weight", "hidden"),
    one(OURS + "attention_norm.bias", _THEIRS + "ln_1.bias", "hidden"),
    joined(query_key_value("weight"), _THEIRS + "attn.c_attn.weight", "hidden", layout="transposed stack"),
    joined(query_key_value("bias"), _THEIRS + "attn.c_attn.bias", layout="stacked"),
    one(OURS + "attention.output.weight", _THEIRS + "attn.c_proj.weight", "hidden", "query", layout="transposed"),
    one(OURS + "attention.output.bias", _THEIRS + "attn.c_proj.bias", "hidden"),
    one(OURS + "mlp_norm.weight", _THEIRS + "ln_2.weight", "hidden"),
    one(OURS + "mlp_norm.bias", _THEIRS + "ln_2.bias", "hidden"),
    one(OURS + "mlp.up.weight", _THEIRS + "mlp.c_fc.weight", "intermediate", "hidden", layout="transposed"),
    one(OURS + "mlp.up.bias", _THEIRS + "mlp.c_fc.bias", "intermediate"),
    one(OURS + "mlp.down.weight", _THEIRS + "mlp.c_proj.weight", "hidden", "intermediate", layout="transposed"),
    one(OURS + "mlp.down.bias", _THEIRS + "mlp.c_proj.bias", "hidden"),
    one("final_norm.weight", "transformer.ln_f.weight", "hidden"),
    one("final_norm.bias", "transformer.ln_f.bias", "hidden"),
    words("head.weight", "lm_head.weight", only_if="untied"),
)


def _four_times(found: Mapping[str, Any]) -> int:
    return 4 * int(found["hidden_size"])


GPT2 = Family(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    table=_TABLE,
    keys=(
        Key("vocab_size", "vocab_size", 50257),
        Key("n_positions", "max_position_embeddings", 1024),
        Key("n_embd", "hidden_size", 768),
        Key("n_inner", "intermediate_size", _four_times),
        Key("n_layer", "num_hidden_layers", 12),
        Key("n_head", "num_attention_heads", 12),
        activation("activation_function", "gelu_tanh", "gelu_new"),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("initializer_range", "initializer_range", 0.02),
        Key("tie_word_embeddings", "tie_word_embeddings", True),
        Key("resid_pdrop", "hidden_dropout", 0.1),
        Key("embd_pdrop", "hidden_dropout", 0.1),
    ),
    always=LAYERNORM | {"attention_bias": True, "parallel_block": False, "position_embedding": "learned"},
    rotary=None,
    limits=(
        whole_weights,
        Only("scale_attn_weights", (True,), "attention scores that are not divided by sqrt(head_dim)"),
        Only("scale_attn_by_inverse_layer_idx", (False,), "attention scores divided by the layer's number"),
    ),
    constants={
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    spellings=(("transformer.", ""),),  # as the first checkpoints were saved
    buffers=(".attn.bias", ".attn.masked_bias"),
    whole_heads=True,
)
