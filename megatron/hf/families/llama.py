"""Llama 2 and 3.x, and the pieces that its descendants share."""

from __future__ import annotations

from megatron.hf.families.family import Family, Key, activation
from megatron.hf.families.limits import Only, whole_weights
from megatron.hf.name_table import OURS, one, words

THEIRS = "model.layers.{layer}."

ATTENTION = (
    one(OURS + "attention.query.weight", THEIRS + "self_attn.q_proj.weight", "query", "hidden"),
    one(OURS + "attention.query.bias", THEIRS + "self_attn.q_proj.bias", "query", only_if="qkv_bias"),
    one(OURS + "attention.key.weight", THEIRS + "self_attn.k_proj.weight", "key", "hidden"),
    one(OURS + "attention.key.bias", THEIRS + "self_attn.k_proj.bias", "key", only_if="qkv_bias"),
    one(OURS + "attention.value.weight", THEIRS + "self_attn.v_proj.weight", "value", "hidden"),
    one(OURS + "attention.value.bias", THEIRS + "self_attn.v_proj.bias", "value", only_if="qkv_bias"),
    one(OURS + "attention.output.weight", THEIRS + "self_attn.o_proj.weight", "hidden", "query"),
    one(OURS + "attention.output.bias", THEIRS + "self_attn.o_proj.bias", "hidden", only_if="output_bias"),
)
HEAD_NORMS = (
    one(OURS + "attention.query_norm.weight", THEIRS + "self_attn.q_norm.weight", "head"),
    one(OURS + "attention.key_norm.weight", THEIRS + "self_attn.k_norm.weight", "head"),
)
NORMS_BEFORE = (
    one(OURS + "attention_norm.weight", THEIRS + "input_layernorm.weight", "hidden"),
    one(OURS + "mlp_norm.weight", THEIRS + "post_attention_layernorm.weight", "hidden"),
)
NORMS_BOTH = (
    one(OURS + "attention_norm.weight", THEIRS + "input_layernorm.weight", "hidden"),
    one(OURS + "attention_after_norm.weight", THEIRS + "post_attention_layernorm.weight", "hidden"),
    one(OURS + "mlp_norm.weight", THEIRS + "pre_feedforward_layernorm.weight", "hidden"),
    one(OURS + "mlp_after_norm.weight", THEIRS + "post_feedforward_layernorm.weight", "hidden"),
)
MLP = (
    one(OURS + "mlp.gate.weight", THEIRS + "mlp.gate_proj.weight", "intermediate", "hidden"),
    one(OURS + "mlp.gate.bias", THEIRS + "mlp.gate_proj.bias", "intermediate", only_if="mlp_bias"),
    one(OURS + "mlp.up.weight", THEIRS + "mlp.up_proj.weight", "intermediate", "hidden"),
    one(OURS + "mlp.up.bias", THEIRS + "mlp.up_proj.bias", "intermediate", only_if="mlp_bias"),
    one(OURS + "mlp.down.weight", THEIRS + "mlp.down_proj.weight", "hidden", "intermediate"),
    one(OURS + "mlp.down.bias", THEIRS + "mlp.down_proj.bias", "hidden", only_if="mlp_bias"),
)
FIRST = (words("embedding.weight", "model.embed_tokens.weight"),)
LAST = (
    one("final_norm.weight", "model.norm.weight", "hidden"),
    words("head.weight", "lm_head.weight", only_if="untied"),
)
TABLE = (*FIRST, *NORMS_BEFORE, *ATTENTION, *MLP, *LAST)
ROTARY_BUFFERS = (".rotary_emb.inv_freq",)

BIASES = (Key("attention_bias", "attention_bias", False), Key("mlp_bias", "mlp_bias", False))
GATED_RMSNORM = {"norm": "rmsnorm", "gated_mlp": True, "parallel_block": False}
NO_BIAS = GATED_RMSNORM | {"attention_bias": False, "mlp_bias": False}


def sizes(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, key_values: int | None, longest: int, eps: float
) -> tuple[Key, ...]:
    """The keys that all of them have, with the values that a class takes where they are left out."""
    return (
        Key("vocab_size", "vocab_size", vocab),
        Key("hidden_size", "hidden_size", hidden),
        Key("intermediate_size", "intermediate_size", inner),
        Key("num_hidden_layers", "num_hidden_layers", layers),
        Key("num_attention_heads", "num_attention_heads", heads),
        Key("num_key_value_heads", "num_key_value_heads", key_values, null=None),
        Key("max_position_embeddings", "max_position_embeddings", longest),
        Key("initializer_range", "initializer_range", 0.02),
        Key("rms_norm_eps", "norm_eps", eps),
    )


HEAD_DIM = Key("head_dim", "head_dim", None)
ACTIVATION = activation("hidden_act", "silu")
TIED = Key("tie_word_embeddings", "tie_word_embeddings", False)

LLAMA = Family(
    name="LlamaForCausalLM",
    model_type="llama",
    table=TABLE,
    keys=(*sizes(32000, 4096, 11008, 32, 32, None, 2048, 1e-6), HEAD_DIM, ACTIVATION, TIED, *BIASES),
    always=GATED_RMSNORM,
    limits=(
        whole_weights,
        Only("pretraining_tp", (1,), "matrices multiplied in slices; newer versions of transformers do not read it"),
    ),
    constants={"attention_dropout": 0.0, "pretraining_tp": 1},
    buffers=ROTARY_BUFFERS,
    whole_heads=True,
)
