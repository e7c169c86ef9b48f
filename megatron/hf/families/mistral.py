"""Mistral: a Llama whose layers may all have a sliding window, as 0.1 has."""

from __future__ import annotations

from megatron.hf.families.family import Family
from megatron.hf.families.limits import whole_weights
from megatron.hf.families.llama import ACTIVATION, HEAD_DIM, NO_BIAS, ROTARY_BUFFERS, TABLE, TIED, sizes
from megatron.hf.families.windows import Windows

MISTRAL = Family(
    name="MistralForCausalLM",
    model_type="mistral",
    table=TABLE,
    keys=(*sizes(32000, 4096, 14336, 32, 32, 8, 131072, 1e-6), HEAD_DIM, ACTIVATION, TIED),
    always=NO_BIAS,
    windows=Windows(4096),
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
)
