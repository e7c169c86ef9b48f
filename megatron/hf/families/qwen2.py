"""Qwen2 and 2.5: a Llama whose queries, keys and values have biases."""

from __future__ import annotations

from megatron.hf.families.family import Family
from megatron.hf.families.limits import whole_weights
from megatron.hf.families.llama import ACTIVATION, HEAD_DIM, NO_BIAS, ROTARY_BUFFERS, TABLE, TIED, sizes
from megatron.hf.families.windows import Windows

WINDOWS = Windows(4096, by_layer=True, switched=True)

QWEN2 = Family(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    table=TABLE,
    keys=(*sizes(151936, 4096, 22016, 32, 32, 32, 32768, 1e-6), HEAD_DIM, ACTIVATION, TIED),
    always=NO_BIAS | {"query_key_value_bias": True},
    windows=WINDOWS,
    limits=(whole_weights,),
    constants={"attention_dropout": 0.0},
    buffers=ROTARY_BUFFERS,
)
