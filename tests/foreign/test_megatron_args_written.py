"""No field of a shape is dropped on the way to Megatron-LM: what changes the function is said in args, or refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models.tensor_cases import tiny_shape

from megatron.config.rope_scaling import RopeScaling
from megatron.foreign.megatron_args_written import args_for, refusals

CHANGED: dict[str, Any] = {
    "hidden_act": "gelu",
    "gated_mlp": False,
    "norm": "layernorm",
    "norm_eps": 1e-3,
    "attention_bias": True,
    "mlp_bias": True,
    "parallel_block": True,
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "query_key_value_bias": True,
    "qk_norm": "head",
    "norm_place": "after",
    "norm_unit_offset": True,
    "position_embedding": "learned",
    "rope_scaling": RopeScaling("linear", 2.0),
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "logit_multiplier": 0.5,
    "shared_norm": True,
    "sliding_window": 9,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 80,
    "vocab_size": 90,
    "padded_vocab_size": 192,
    "max_position_embeddings": 12,
    "hidden_dropout": 0.1,
    "initializer_range": 0.1,
}
WITHOUT_FUNCTION = {"document_mask", "family", "sliding_pattern", "rope_local_theta"}
"""How rows are packed, a name, and what says something only beside a window."""
BY_TENSORS = {"vocab_size", "padded_vocab_size"}


@pytest.mark.parametrize("spelling", ["mcore", "legacy"])
@pytest.mark.parametrize("name", sorted(CHANGED))
def test_every_field_is_said_or_refused(name: str, spelling: Any) -> None:
    plain = tiny_shape()
    other = dataclasses.replace(plain, **{name: CHANGED[name]})
    said = args_for(other, spelling, 1, 1, torch.float32) != args_for(plain, spelling, 1, 1, torch.float32)
    refused = list(refusals(other, spelling))
    assert not list(refusals(plain, spelling))
    assert said or name in BY_TENSORS or any(f"model.{name}" in words for words in refused)


def test_no_field_is_forgotten_here() -> None:
    assert {field.name for field in dataclasses.fields(tiny_shape())} == CHANGED.keys() | WITHOUT_FUNCTION


def test_a_window_is_dropped_only_where_it_hides_nothing() -> None:
    wide = dataclasses.replace(tiny_shape(), sliding_window=24)
    assert not list(refusals(wide, "mcore"))
    local = dataclasses.replace(wide, rope_local_theta=500.0)
    for shape in (dataclasses.replace(wide, sliding_window=23, sliding_pattern=2), local):
        assert any("model.sliding_window" in words for words in refusals(shape, "mcore"))
