"""A folder whose config.json means another model than ours is refused by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection
from megatron.hf.architecture import config_json
from megatron.hf.folder_config import check_config

LLAMA = resolve_model(ModelSection(preset="llama-tiny", seq_length=16), 64)
NEOX = resolve_model(ModelSection(preset="neox-160m", seq_length=16), 64)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def write(folder: Path, shape: Any, **over: Any) -> None:
    config = config_json(shape, bos_token_id=0, eos_token_id=0, dtype="float32") | over
    kept = {key: value for key, value in config.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("shape", [LLAMA, NEOX], ids=["llama", "neox"])
def test_our_own_words_are_ours(tmp_path: Path, shape: Any) -> None:
    write(tmp_path, shape)
    check_config(tmp_path, shape)


@pytest.mark.parametrize(
    "over",
    [
        {"rope_parameters": "left out"},
        {"rope_theta": "left out", "rope_scaling": "left out"},
        {"rope_scaling": {"type": "default"}},
        {"hidden_act": "left out", "attention_bias": "left out", "mlp_bias": "left out"},
    ],
    ids=str,
)
def test_older_and_newer_readers_words_are_the_same(tmp_path: Path, over: dict[str, Any]) -> None:
    write(tmp_path, LLAMA, **over)
    check_config(tmp_path, LLAMA)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads is 8, the model has 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, the model has 2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', the model has 'silu'"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps is 0.5"),
        ({"rope_theta": 77.0, "rope_parameters": None}, "rope_theta is 77.0, the model has 10000.0"),
        ({"rope_parameters": LLAMA3}, "rope_scaling is rope_type llama3, factor 8.0, .* the model has none"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type linear, factor 2.0"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "query_key_value_bias is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ],
)
def test_B1_what_would_train_another_function_is_named(tmp_path: Path, over: dict[str, Any], words: str) -> None:
    write(tmp_path, LLAMA, **over)
    with pytest.raises(CheckpointError, match=words):
        check_config(tmp_path, LLAMA)


def test_another_class_that_means_the_same_is_taken(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    assert check_config(tmp_path, LLAMA).name == "MistralForCausalLM"


def test_what_changes_no_logit_may_differ(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, max_position_embeddings=4096, initializer_range=0.5)
    check_config(tmp_path, LLAMA)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_B1_a_config_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        check_config(tmp_path, LLAMA)


def test_B1_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json is missing: it says what the folder's weights mean"):
        check_config(tmp_path, LLAMA)
