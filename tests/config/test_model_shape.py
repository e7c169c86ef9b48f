"""The resolved shape: published parameter counts, precedence, and errors with their arithmetic."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.presets import PRESETS
from megatron.config.schema import ModelSection


def resolve(vocabulary: int = 100, **fields: object) -> ModelShape:
    return resolve_model(ModelSection(**{"seq_length": 64, **fields}), vocabulary)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "vocabulary", "published"),
    [
        ("llama-1b", 128256, 1_235_814_400),  # Llama-3.2-1B
        ("llama-8b", 128256, 8_030_261_248),  # Meta-Llama-3-8B
        ("neox-160m", 50304, 162_322_944),  # Pythia-160M
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, vocabulary: int, published: int) -> None:
    assert resolve(vocabulary, preset=preset).parameter_count() == published


@pytest.mark.parametrize(("preset", "size"), [("paper-b-470m", 470e6), ("paper-b-2.8b", 2.8e9)])
def test_chosen_shapes_say_so_and_meet_the_papers_size(preset: str, size: float) -> None:
    assert PRESETS[preset].chosen
    assert resolve(256000, preset=preset).parameter_count() == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_survives_json(preset: str) -> None:
    shape = resolve(preset=preset)
    assert ModelShape.from_json(shape.to_json()) == shape
    assert shape.max_position_embeddings == 64 and shape.padded_vocab_size == 128


def test_dropout_is_off_unless_asked_for_and_in_shapes_of_before_it() -> None:
    shape = resolve(preset="llama-demo")
    assert shape.hidden_dropout == 0.0
    assert resolve(preset="llama-demo", hidden_dropout=0.1).hidden_dropout == 0.1
    old = {name: value for name, value in shape.to_json().items() if name != "hidden_dropout"}
    assert ModelShape.from_json(old) == shape
    with pytest.raises(ConfigError, match="model shape lacks norm"):
        ModelShape.from_json({name: value for name, value in old.items() if name != "norm"})


def test_what_the_user_says_wins_over_the_preset() -> None:
    said: dict[str, object] = {"hidden_size": 512, "tie_word_embeddings": False, "rope_theta": 7.0}
    shape = resolve(preset="llama-demo", document_mask=False, **said)
    assert (shape.hidden_size, shape.head_dim, shape.tie_word_embeddings, shape.rope_theta) == (512, 64, False, 7.0)
    assert not shape.document_mask and shape.num_hidden_layers == 6
    assert resolve_model(ModelSection(preset="llama-demo", seq_length=64), 100, 4096).max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, r"model\.hidden_size is missing"),
        ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}, r"model\.intermediate_size is missing"),
        ({"preset": "lama-1b"}, r"'lama-1b' is unknown: did you mean 'llama-1b'"),
        ({"preset": "llama-demo", "num_attention_heads": 7}, r"256 = 7 x 36 \+ 4\).*num_attention_heads to 8"),
        ({"preset": "llama-demo", "num_key_value_heads": 3}, r"8 = 3 x 2 \+ 2\).*value_heads to 2.*heads to 9"),
        ({"preset": "llama-demo", "num_key_value_heads": 16}, r"num_key_value_heads to 8"),
        ({"preset": "llama-demo", "partial_rotary_factor": 0.1}, r"turns 3 dimensions.*rotary_factor to 0\.125"),
        ({"preset": "llama-demo", "vocab_size": 50}, r"vocab_size 50 is smaller than the tokenizer's 100"),
    ],
)
def test_B1_errors_name_the_field_and_the_nearest_that_works(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(**fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"norm": 3}, "norm"), ({"extra": 1}, "extra"), ({"hidden_size": True}, "hidden_size"), ({"norm": None}, "norm")],
)
def test_a_shape_from_json_is_checked(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelShape.from_json({**resolve(preset="llama-tiny").to_json(), **change})
    with pytest.raises(ConfigError, match="lacks norm_eps"):
        ModelShape.from_json({k: v for k, v in resolve(preset="llama-tiny").to_json().items() if k != "norm_eps"})


def test_flops_in_both_conventions() -> None:
    shape = resolve(64, preset="llama-tiny")
    assert shape.flops_per_token(64, causal=False) - shape.flops_per_token(64) == 6 * 2 * 4 * 16 * 64
    assert shape.flops_per_token(64) == 6 * shape.parameter_count() + 6 * 2 * 64 * 64


def test_resolving_needs_no_torch() -> None:
    code = "import sys, megatron.config.model_shape; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
