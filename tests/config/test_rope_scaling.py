"""Hugging Face's words for scaled rotary frequencies: what they mean, and what is refused, by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.config.load import config_from_tables, config_to_toml
from megatron.config.rope_scaling import RopeScaling, rope_scaling_of

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_what_scales_nothing() -> None:
    assert rope_scaling_of(None, "here") is None
    assert rope_scaling_of({}, "here") is None
    assert rope_scaling_of({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}, "here") is None


def test_words_of_both_generations_of_configs() -> None:
    old = {"type": "linear", "factor": 2.0}
    assert rope_scaling_of(old, "here") == rope_scaling_of({"rope_type": "linear", "factor": 2.0}, "here")
    assert rope_scaling_of(LLAMA3 | {"type": "llama3", "rope_theta": 5e5}, "here") == RopeScaling(
        "llama3", 8.0, 1.0, 4.0, 8192
    )


@pytest.mark.parametrize("words", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_json_gives_the_same_back(words: dict[str, Any]) -> None:
    scaling = rope_scaling_of(words, "here")
    assert scaling is not None
    assert rope_scaling_of(json.loads(json.dumps(scaling.to_json())), "there") == scaling


def test_what_yarn_leaves_out() -> None:
    scaling = rope_scaling_of({"rope_type": "yarn", "original_max_position_embeddings": 100}, "here", 400)
    assert scaling == rope_scaling_of({"rope_type": "yarn", "factor": 4.0}, "here", 100)
    assert scaling is not None and (scaling.beta_fast, scaling.beta_slow) == (32.0, 1.0)
    assert scaling.attention_scale == pytest.approx(0.1 * math.log(4) + 1)
    told = rope_scaling_of(YARN | {"attention_factor": 2.0}, "here")
    assert told is not None and told.attention_scale == 2.0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "here: rope_type 'dynamic' cannot be expressed: its frequencies depend",
        ),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "rope_type 'longrope' cannot be expressed: it has a factor"),
        ({"type": "su", "factor": 2.0}, "rope_type 'su' cannot be expressed; there are linear, llama3, yarn"),
        ({"factor": 2.0}, "factor with rope_type default, which scales nothing"),
        (LLAMA3 | {"factor": 0.5}, "factor 0.5 is below 1"),
        (LLAMA3 | {"factor": math.nan}, "factor nan is below 1"),
        (LLAMA3 | {"factor": True}, "factor = True is not a number"),
        (LLAMA3 | {"high_freq_factor": 1}, "high_freq_factor 1.0 must be above low_freq_factor 1.0"),
        (LLAMA3 | {"beta_fast": 3}, "beta_fast is not known for rope_type llama3: it takes factor"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "original_max_position_embeddings = 0 must be a whole"),
        (LLAMA3 | {"original_max_position_embeddings": 2.5}, "original_max_position_embeddings = 2.5 must be a whole"),
        ({"rope_type": "llama3", "factor": 2}, "needs high_freq_factor, low_freq_factor, original_max"),
        (YARN | {"truncate": False}, "truncate = false of rope_type yarn cannot be expressed"),
        (YARN | {"beta_fast": 0.5}, "beta_fast 0.5 must not be below beta_slow 1.0"),
        (YARN | {"attention_factor": -1}, "attention_factor = -1.0 must be above 0"),
        ({"rope_type": "yarn"}, "rope_type yarn needs factor, original_max_position_embeddings"),
    ],
)
def test_B1_refused_by_name(words: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rope_scaling_of(words, "here")
    assert fault in str(caught.value)


def tables(**model: Any) -> dict[str, Any]:
    return {
        "run": {"name": "a", "output": "b"},
        "tokenizer": {"path": "t"},
        "model": {"preset": "llama-tiny", "seq_length": 64, **model},
        "sources": {"s": {"tokens": "1M"}},
        "train": {"global_batch_size": 1},
        "stages": [{"name": "one", "steps": 1, "mixture": {"s": 1}}],
    }


def test_the_table_of_a_config_is_checked_and_written_back() -> None:
    config = config_from_tables(tables(rope_scaling=LLAMA3))
    assert 'rope_scaling = { rope_type = "llama3", factor = 8.0' in config_to_toml(config)
    for scaling, fault in (
        ({"rope_type": "longrope"}, "model.rope_scaling: rope_type 'longrope' cannot be expressed"),
        (LLAMA3 | {"low_freq_facter": 1}, "model.rope_scaling.low_freq_facter: did you mean 'low_freq_factor'?"),
        ({"factor": 2.0}, "model.rope_scaling.rope_type is missing"),
    ):
        with pytest.raises(ConfigError) as caught:
            config_from_tables(tables(rope_scaling=scaling))
        assert fault in str(caught.value)
