"""The resolved shape: published parameter counts, precedence, and errors with their arithmetic."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.presets import PRESETS
from megatron.config.rope_scaling import rope_scaling_of
from megatron.config.schema import ModelSection

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def resolve(vocabulary: int = 100, **fields: object) -> ModelShape:
    return resolve_model(ModelSection(**{"seq_length": 64, **fields}), vocabulary)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "vocabulary", "published"),
    [
        ("llama-1b", 128256, 1_235_814_400),  # Llama-3.2-1B
        ("llama-8b", 128256, 8_030_261_248),  # Meta-Llama-3-8B
        ("llama-3.2-1b", 128256, 1_235_814_400),  # Llama-3.2-1B
        ("llama-3.2-3b", 128256, 3_212_749_824),  # Llama-3.2-3B
        ("llama-3.1-8b", 128256, 8_030_261_248),  # Llama-3.1-8B
        ("mistral-7b", 32768, 7_248_023_552),  # Mistral-7B-v0.3
        ("qwen2.5-0.5b", 151936, 494_032_768),  # Qwen2.5-0.5B
        ("qwen3-0.6b", 151936, 596_049_920),  # Qwen3-0.6B
        ("olmo2-1b", 100352, 1_484_916_736),  # OLMo-2-0425-1B
        ("gemma3-1b", 262144, 999_885_952),  # Gemma-3-1B
        ("neox-160m", 50304, 162_322_944),  # Pythia-160M
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, vocabulary: int, published: int) -> None:
    assert resolve(vocabulary, preset=preset).parameter_count() == published


def test_gpt2_has_the_published_number_of_parameters_but_for_padding() -> None:
    shape = resolve(50257, preset="gpt2")
    padding = (shape.padded_vocab_size - 50257) * 768
    assert shape.parameter_count() - padding == 124_439_808


@pytest.mark.parametrize(
    ("preset", "size"), [("paper-a-2.6b", 2.6e9), ("paper-b-470m", 470e6), ("paper-b-2.8b", 2.8e9)]
)
def test_chosen_shapes_say_so_and_meet_the_papers_size(preset: str, size: float) -> None:
    assert PRESETS[preset].chosen
    vocabulary = 50257 if preset == "paper-a-2.6b" else 256000
    assert resolve(vocabulary, preset=preset).parameter_count() == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_survives_json(preset: str) -> None:
    shape = resolve(preset=preset)
    assert ModelShape.from_json(shape.to_json()) == shape
    assert shape.max_position_embeddings == (1024 if shape.position_embedding == "learned" else 64)
    assert shape.padded_vocab_size == 128
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def test_shapes_of_before_the_families_are_read() -> None:
    shape = resolve(preset="llama-demo")
    younger = {"query_key_value_bias", "qk_norm", "norm_place", "norm_unit_offset", "position_embedding"}
    younger |= {"rope_scaling", "embedding_multiplier", "attention_multiplier"}
    younger |= {"sliding_window", "sliding_pattern", "rope_local_theta"}
    old = {name: value for name, value in shape.to_json().items() if name not in younger}
    assert ModelShape.from_json(old) == shape


def test_a_preset_s_scaling_can_be_replaced_and_left_out() -> None:
    assert resolve(preset="llama-3.2-1b").rope_scaling == rope_scaling_of(LLAMA3, "here")
    assert resolve(preset="llama-3.2-1b", rope_scaling={"rope_type": "default"}).rope_scaling is None
    linear = resolve(preset="llama-3.2-1b", rope_scaling={"rope_type": "linear", "factor": 2}).rope_scaling
    assert linear is not None and linear.to_json() == {"rope_type": "linear", "factor": 2.0}


def test_learned_positions_have_their_rows_whatever_the_longest_sequence() -> None:
    shape = resolve_model(ModelSection(preset="gpt2", seq_length=64), 100, 700)
    assert (shape.max_position_embeddings, shape.rotary_dim) == (1024, 0)
    own = resolve_model(ModelSection(preset="gpt2", seq_length=64, max_position_embeddings=800), 100, 700)
    assert own.max_position_embeddings == 800
    assert shape.parameter_count() - own.parameter_count() == 224 * 768
    assert shape.flops_per_token(64) == own.flops_per_token(64), "rows that are looked up are not multiplied"
    without = resolve(preset="llama-demo", position_embedding="learned", seq_length=48)
    assert without.max_position_embeddings == 48


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
        ({"preset": "gpt2", "seq_length": 1025}, r"1025 positions is longer than model.max_position_embeddings 1024"),
        (
            {"preset": "gpt2", "rope_theta": 5.0},
            r"model\.rope_theta turns.*position_embedding is learned: leave it out",
        ),
        ({"preset": "llama-demo", "max_position_embeddings": 9}, r"max_position_embeddings = 9 is for learned"),
        ({"preset": "gpt2", "query_key_value_bias": True}, r"no effect beside model\.attention_bias = true"),
        ({"preset": "gpt2", "norm_unit_offset": True}, r"is RMSNorm's, and model\.norm is layernorm"),
        ({"preset": "llama-demo", "sliding_pattern": 2}, r"sliding_pattern 2 says .*sliding_window is 0: set sliding"),
        ({"preset": "llama-demo", "sliding_pattern": 1, "sliding_window": 9}, r"sliding_pattern 1 leaves no layer"),
        ({"preset": "llama-demo", "rope_local_theta": 9.0, "sliding_window": 9}, r"here they are all alike: set"),
        ({"preset": "gpt2", "rope_local_theta": 9.0, "sliding_window": 9, "sliding_pattern": 2}, r"is learned: leave"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": "heads"}, r"model\.qk_norm = 'heads' is unknown: set one of none, head, width"),
        ({"norm_place": "between"}, r"model\.norm_place = 'between'"),
        ({"position_embedding": "alibi"}, r"model\.position_embedding = 'alibi' is unknown: set one of rope, learned"),
        ({"hidden_act": "relu"}, r"model\.hidden_act = 'relu'"),
        ({"embedding_multiplier": 0.0}, r"model\.embedding_multiplier = 0\.0 must be a number above 0"),
        ({"attention_multiplier": -1.0}, r"model\.attention_multiplier = -1\.0"),
        ({"qk_norm": 3}, r"field qk_norm is 3, which is not str"),
        ({"rope_scaling": "llama3"}, r"rope_scaling is 'llama3', which is no table"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, r"rope_scaling: factor = '8' is not a number"),
        ({"rope_scaling": LLAMA3, "position_embedding": "learned"}, r"rope_scaling with .* learned scales nothing"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads 3"),
    ],
)
def test_B1_shapes_of_json_that_the_decoder_cannot_express_are_named(changes: dict[str, object], words: str) -> None:
    record = resolve(preset="llama-demo").to_json()
    with pytest.raises(ConfigError, match=words):
        ModelShape.from_json(record | changes)


def test_every_field_of_a_shape_survives_json() -> None:
    shape = dataclasses.replace(
        resolve(preset="qwen3-0.6b"),
        norm_place="both",
        norm_unit_offset=True,
        embedding_multiplier=3.5,
        attention_multiplier=0.25,
        rope_scaling=rope_scaling_of({"rope_type": "yarn", "factor": 4.0}, "here", 512),
    )
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


def test_operations_of_a_sliding_window() -> None:
    """Twice what is visible of the causal matrix, and of a whole window's width, by counting."""
    whole, length, window = resolve(preset="llama-demo", seq_length=100), 100, 30
    visible = sum(min(place + 1, window) for place in range(length)) / length
    for pattern, sliding in ((0, 6), (3, 4)):
        shape = dataclasses.replace(whole, sliding_window=window, sliding_pattern=pattern)
        assert [shape.slides(number) for number in range(6)].count(True) == sliding
        assert shape.attended_lengths(length) == pytest.approx(sliding * 2 * visible + (6 - sliding) * 100, rel=0.02)
        assert shape.attended_lengths(length, causal=False) == sliding * window + (6 - sliding) * length
        each = 256 * 6  # heads x head_dim x 6
        saved = each * (600 - shape.attended_lengths(length))
        assert whole.flops_per_token(length) - shape.flops_per_token(length) == saved > 0
        assert shape.flops_per_token(window) == whole.flops_per_token(window), "a window that hides nothing"
    assert [dataclasses.replace(whole, sliding_window=5, sliding_pattern=3).slides(n) for n in range(3)] == [1, 1, 0]
