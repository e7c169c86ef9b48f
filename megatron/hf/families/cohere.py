"""Cohere's Command R: attention and MLP side by side behind one LayerNorm without bias; logits times `logit_scale`.

Its rotary positions turn neighbours, (x[2i], x[2i + 1]), where the decoder turns halves, (x[i], x[i + d/2]), by the
same angles: so the rows of query and key lie in another order within each head ("interleaved heads" in name_table.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron.hf.families.family import Family, Key
from megatron.hf.families.gpt_neox import whole_head_dim
from megatron.hf.families.limits import Only, whole_weights
from megatron.hf.families.llama import ACTIVATION, ATTENTION, FIRST, LAST, MLP, ROTARY_BUFFERS, THEIRS
from megatron.hf.families.rotary import Rotary
from megatron.hf.name_table import OURS, Entry, one

_TURNED = (OURS + "attention.query.", OURS + "attention.key.")


def _neighbours(entry: Entry) -> Entry:
    return replace(entry, layout="interleaved heads") if entry.ours[0].startswith(_TURNED) else entry


def _said_base(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Nothing says the base in the config of a class whose versions take different ones."""
    words = (config.get(name) for name in ("rope_parameters", "rope_scaling"))
    said = [config.get("rope_theta"), *(table.get("rope_theta") for table in words if isinstance(table, Mapping))]
    if all(base is None for base in said):
        yield (
            "rope_theta is left out: version 4 of transformers takes 10000 for it, version 5 takes 500000; write the "
            "one that the model was trained with"
        )


def _whole_heads(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """A head_dim of its own is an attribute that some readers of this class look at, and others do not."""
    width, heads, said = found["hidden_size"], found["num_attention_heads"], config.get("head_dim")
    if said is not None and not (isinstance(said, int) and said * heads == width):
        yield (
            f"head_dim = {said!r}: this class has no such key, and some of its readers take hidden_size / "
            f"num_attention_heads, which is {width / heads:g}"
        )


COHERE = Family(
    name="CohereForCausalLM",
    model_type="cohere",
    table=(
        *FIRST,
        one(OURS + "attention_norm.weight", THEIRS + "input_layernorm.weight", "hidden"),
        *map(_neighbours, ATTENTION),
        *MLP,
        *LAST,
    ),
    keys=(
        Key("vocab_size", "vocab_size", 256000),
        Key("hidden_size", "hidden_size", 8192),
        Key("intermediate_size", "intermediate_size", 22528),
        Key("num_hidden_layers", "num_hidden_layers", 40),
        Key("num_attention_heads", "num_attention_heads", 64),
        Key("num_key_value_heads", "num_key_value_heads", None, null=None),
        Key("max_position_embeddings", "max_position_embeddings", 8192),
        Key("initializer_range", "initializer_range", 0.02),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("logit_scale", "logit_multiplier", 0.0625),
        ACTIVATION,
        Key("tie_word_embeddings", "tie_word_embeddings", True),
        Key("attention_bias", "attention_bias", False),
    ),
    always={
        "norm": "layernorm_no_bias",
        "gated_mlp": True,
        "mlp_bias": False,
        "parallel_block": True,
        "shared_norm": True,
        "head_dim": whole_head_dim,
    },
    rotary=Rotary(default_theta=500000.0),
    limits=(
        whole_weights,
        Only("use_qk_norm", (False,), "LayerNorms of queries and keys with a weight for each head"),
        _said_base,
        _whole_heads,
    ),
    constants={"attention_dropout": 0.0, "use_qk_norm": False},
    buffers=ROTARY_BUFFERS,
    whole_heads=True,
)
