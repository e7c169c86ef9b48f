"""OLMo 2: norms of what attention and MLP give, and of all queries and all keys at once. OLMo 3: the same, and three of
four layers have a sliding window."""

from __future__ import annotations

from megatron.hf.families.family import Family, Key
from megatron.hf.families.limits import whole_weights
from megatron.hf.families.llama import (
    ACTIVATION,
    ATTENTION,
    FIRST,
    GATED_RMSNORM,
    HEAD_DIM,
    LAST,
    MLP,
    ROTARY_BUFFERS,
    THEIRS,
    TIED,
    sizes,
)
from megatron.hf.families.rotary import Rotary
from megatron.hf.families.windows import Windows
from megatron.hf.name_table import OURS, one

_NORMS = (
    one(OURS + "attention.query_norm.weight", THEIRS + "self_attn.q_norm.weight", "query"),
    one(OURS + "attention.key_norm.weight", THEIRS + "self_attn.k_norm.weight", "key"),
    one(OURS + "attention_after_norm.weight", THEIRS + "post_attention_layernorm.weight", "hidden"),
    one(OURS + "mlp_after_norm.weight", THEIRS + "post_feedforward_layernorm.weight", "hidden"),
)

_TABLE = (*FIRST, *ATTENTION, *_NORMS, *MLP, *LAST)
_KEYS = (
    *sizes(50304, 4096, 11008, 32, 32, None, 2048, 1e-5),
    HEAD_DIM,
    ACTIVATION,
    TIED,
    Key("attention_bias", "attention_bias", False),
)
_ALWAYS = GATED_RMSNORM | {"mlp_bias": False, "qk_norm": "width", "norm_place": "after"}

OLMO2 = Family(
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    table=_TABLE,
    keys=_KEYS,
    always=_ALWAYS,
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
)
OLMO3 = Family(
    name="Olmo3ForCausalLM",
    model_type="olmo3",
    table=_TABLE,
    keys=_KEYS,
    always=_ALWAYS,
    rotary=Rotary(default_theta=500000.0, by_kind=True),
    windows=Windows(4096, by_layer=True, pattern=4, own_base=True),
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
)
