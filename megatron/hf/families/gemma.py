"""Gemma 1, 2 and 3 (text), without soft-capped logits: norms that multiply by 1 + weight, embeddings by
sqrt(hidden_size); in 2 every other layer has a sliding window, in 3 five of six.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.families.family import Family, Key, activation
from megatron.hf.families.limits import Softcap, whole_weights
from megatron.hf.families.llama import (
    ATTENTION,
    FIRST,
    GATED_RMSNORM,
    HEAD_NORMS,
    LAST,
    MLP,
    NORMS_BEFORE,
    NORMS_BOTH,
    ROTARY_BUFFERS,
    sizes,
)
from megatron.hf.families.rotary import Rotary
from megatron.hf.families.windows import Windows


def _root_of_width(found: Mapping[str, Any]) -> float:
    return float(int(found["hidden_size"]) ** 0.5)


def _read_scalar(theirs: str, value: Any, found: Mapping[str, Any]) -> float:
    """Scores are divided by the root of query_pre_attn_scalar; that of head_dim is the decoder's own."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{theirs} = {value!r} is not a number above 0")
    return 0.0 if value == found["head_dim"] else float(value) ** -0.5


def _write_scalar(shape: ModelShape) -> int:
    return max(1, round(shape.attention_scale**-2))


def _default_scalar(found: Mapping[str, Any]) -> float:
    return _read_scalar("query_pre_attn_scalar", 256, found)


_GEMMA = GATED_RMSNORM | {"mlp_bias": False, "norm_unit_offset": True, "embedding_multiplier": _root_of_width}
_TIED = Key("tie_word_embeddings", "tie_word_embeddings", True)
_BIAS = Key("attention_bias", "attention_bias", False)
_HEAD_DIM = Key("head_dim", "head_dim", 256)
_ACTIVATION = activation("hidden_activation", "gelu_tanh")
_SCALAR = Key(
    "query_pre_attn_scalar", "attention_multiplier", _default_scalar, reading=_read_scalar, writing=_write_scalar
)
_UNCAPPED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}

GEMMA = Family(
    name="GemmaForCausalLM",
    model_type="gemma",
    table=(*FIRST, *NORMS_BEFORE, *ATTENTION, *MLP, *LAST),
    keys=(
        *sizes(256000, 3072, 24576, 28, 16, 16, 8192, 1e-6),
        _HEAD_DIM,
        activation("hidden_act", "gelu_tanh"),
        activation("hidden_activation", lambda found: found["hidden_act"]),  # vLLM's
        _TIED,
        _BIAS,
    ),
    always=_GEMMA,
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
)
GEMMA2 = Family(
    name="Gemma2ForCausalLM",
    model_type="gemma2",
    table=(*FIRST, *NORMS_BOTH, *ATTENTION, *MLP, *LAST),
    keys=(*sizes(256000, 2304, 9216, 26, 8, 4, 8192, 1e-6), _HEAD_DIM, _ACTIVATION, _TIED, _BIAS, _SCALAR),
    always=_GEMMA | {"norm_place": "both"},
    windows=Windows(4096, by_layer=True, pattern=2),
    limits=(
        whole_weights,
        Softcap("attn_logit_softcapping", 50.0),
        Softcap("final_logit_softcapping", 30.0),
    ),
    constants=_UNCAPPED,
    buffers=ROTARY_BUFFERS,
    whole_heads=True,
)
GEMMA3 = Family(
    name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    table=(*FIRST, *NORMS_BOTH, *ATTENTION, *HEAD_NORMS, *MLP, *LAST),
    keys=(*sizes(262208, 2304, 9216, 26, 8, 4, 131072, 1e-6), _HEAD_DIM, _ACTIVATION, _TIED, _BIAS, _SCALAR),
    always=_GEMMA | {"norm_place": "both", "qk_norm": "head"},
    rotary=Rotary(default_theta=1e6, by_kind=True, local="rope_local_base_freq"),
    windows=Windows(4096, by_layer=True, pattern=6, pattern_key="sliding_window_pattern", own_base=True),
    limits=(
        whole_weights,
        Softcap("attn_logit_softcapping", None),
        Softcap("final_logit_softcapping", None),
    ),
    constants=_UNCAPPED,
    buffers=ROTARY_BUFFERS,
    whole_heads=True,
)
