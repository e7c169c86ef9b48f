"""Qwen3, dense: a Llama that norms each head's query and key."""

from __future__ import annotations

from megatron.hf.families.family import Family, Key
from megatron.hf.families.limits import whole_weights
from megatron.hf.families.llama import (
    ACTIVATION,
    ATTENTION,
    FIRST,
    GATED_RMSNORM,
    HEAD_NORMS,
    LAST,
    MLP,
    NORMS_BEFORE,
    ROTARY_BUFFERS,
    TIED,
    sizes,
)
from megatron.hf.families.qwen2 import WINDOWS

QWEN3 = Family(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    table=(*FIRST, *NORMS_BEFORE, *ATTENTION, *HEAD_NORMS, *MLP, *LAST),
    keys=(
        *sizes(151936, 4096, 22016, 32, 32, 32, 32768, 1e-6),
        Key("head_dim", "head_dim", 128),
        ACTIVATION,
        TIED,
        Key("attention_bias", "attention_bias", False),
    ),
    always=GATED_RMSNORM | {"mlp_bias": False, "qk_norm": "head"},
    windows=WINDOWS,
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
)
