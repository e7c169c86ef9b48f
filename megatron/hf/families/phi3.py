"""Phi-3 and Phi-4: a Llama with joint matrices, that may turn a part of each head only, and have a sliding window."""

from __future__ import annotations

from megatron.hf.families.family import Family
from megatron.hf.families.limits import whole_weights
from megatron.hf.families.llama import (
    ACTIVATION,
    FIRST,
    HEAD_DIM,
    LAST,
    NO_BIAS,
    NORMS_BEFORE,
    ROTARY_BUFFERS,
    THEIRS,
    TIED,
    sizes,
)
from megatron.hf.families.rotary import Rotary
from megatron.hf.families.windows import Windows
from megatron.hf.name_table import OURS, joined, one, query_key_value

_GATE_UP = {OURS + "mlp.gate.weight": "intermediate", OURS + "mlp.up.weight": "intermediate"}
_LAYERS = (
    joined(query_key_value("weight"), THEIRS + "self_attn.qkv_proj.weight", "hidden", layout="stacked"),
    one(OURS + "attention.output.weight", THEIRS + "self_attn.o_proj.weight", "hidden", "query"),
    joined(_GATE_UP, THEIRS + "mlp.gate_up_proj.weight", "hidden", layout="stacked"),
    one(OURS + "mlp.down.weight", THEIRS + "mlp.down_proj.weight", "hidden", "intermediate"),
)

PHI3 = Family(
    name="Phi3ForCausalLM",
    model_type="phi3",
    table=(*FIRST, *NORMS_BEFORE, *_LAYERS, *LAST),
    keys=(*sizes(32064, 3072, 8192, 32, 32, None, 4096, 1e-5), HEAD_DIM, ACTIVATION, TIED),
    always=NO_BIAS,
    rotary=Rotary(share="partial_rotary_factor", scales=False),
    windows=Windows(),
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    buffers=ROTARY_BUFFERS,
)
