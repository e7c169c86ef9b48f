"""Sliding windows both ways: which layers have one and how they are turned, as `transformers` has it; refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf.family_cases import CASES, made
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape, check_shape
from megatron.config.rope_scaling import RopeScaling
from megatron.hf.architecture import architecture_for, config_json, shape_from_config, shape_from_folder
from megatron.hf.families.windows import layers_within, plain_layers
from megatron.hf.folder_config import check_config
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.models.decoder import Decoder

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    "num_key_value_heads": 4, "head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
Layer = tuple[int | None, float, str]
"""A layer's window, its rotary base, and how that is scaled."""


def theirs_by_layer(config: Any) -> list[Layer]:
    """As the classes of `transformers` build each layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [FULL if config.sliding_window is None else SLIDING] * config.num_hidden_layers
    rope = config.rope_parameters
    tables = [rope if "rope_theta" in rope else rope[kind] for kind in kinds]
    return [
        (config.sliding_window if kind == SLIDING else None, table["rope_theta"], table["rope_type"])
        for kind, table in zip(kinds, tables, strict=True)
    ]


def ours_by_layer(shape: ModelShape) -> list[Layer]:
    """As `Attention` is told to: by `slides`, and by rope_local_theta where it slides and there is one."""
    scaled = "default" if shape.rope_scaling is None else shape.rope_scaling.rope_type
    own = shape.rope_local_theta
    return [
        (
            shape.sliding_window if slides else None,
            *((own, "default") if slides and own else (shape.rope_theta, scaled)),
        )
        for slides in map(shape.slides, range(shape.num_hidden_layers))
    ]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Of each class with windows, said in the ways that there are."""
    kind = draw(st.sampled_from(["mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3"]))
    layers = draw(st.integers(1, 9))
    said = {"model_type": kind, **SIZES, "num_hidden_layers": layers}
    window = draw(st.sampled_from([1, 7, 127, 128, 4096, "left out", None]))
    said |= {} if window == "left out" else {"sliding_window": window}
    if kind not in ("mistral", "phi3"):
        regular = [SLIDING if (number + 1) % draw(st.integers(1, 5)) else FULL for number in range(layers)]
        any_order = draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers))
        said |= draw(st.sampled_from([{}, {"layer_types": regular}, {"layer_types": any_order}]))
    if kind.startswith("qwen"):
        said |= draw(st.sampled_from([{}, {"use_sliding_window": True}, {"use_sliding_window": False}]))
        said |= draw(st.sampled_from([{}, *({"max_window_layers": first} for first in (0, 1, layers))]))
    if kind == "gemma3_text":
        said |= draw(st.sampled_from([{}, {"sliding_window_pattern": 1}, {"sliding_window_pattern": 3}]))
        said |= draw(st.sampled_from([{}, {"rope_local_base_freq": 77.0}, {"rope_local_base_freq": 1e6}]))
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    return said | draw(st.sampled_from([{}, scaled if kind != "phi3" else {}]))


def irregular(layers: list[Layer]) -> bool:
    """Whether no sliding_pattern says which layers have a window."""
    slides = [window is not None for window, _, _ in layers]
    return not any(slides == [n != 1 and (not n or k % n > 0) for k in range(1, len(slides) + 1)] for n in range(10))


@settings(max_examples=300, deadline=None)
@given(config=configs())
def test_C3_each_layer_is_as_transformers_has_it(config: dict[str, Any]) -> None:
    """Or refused for the reason that there is; and read again from what is written."""
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    wanted = theirs_by_layer(theirs)
    without = theirs.sliding_window is None and SLIDING in (getattr(theirs, "layer_types", None) or ())
    try:
        shape = shape_from_config(config)
    except ConfigError as error:
        assert ("there is no sliding_window" in str(error)) == without and (without or irregular(wanted)), error
        return
    assert not without and ours_by_layer(shape) == wanted
    written = config_json(shape, bos_token_id=1, eos_token_id=1, dtype="float32")
    assert replace(shape_from_config(written), family=shape.family) == shape
    if architecture_for(shape).model_type != config["model_type"]:  # a plainer class, as a Llama for a Mistral
        return
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    # Version 5 reads the older keys of OLMo 3 as version 4 does only where the base is its own default.
    for said in (written, older) if config["model_type"] != "olmo3" or shape.rope_theta == 5e5 else (written,):
        assert theirs_by_layer(type(theirs).from_dict(json.loads(json.dumps(said)))) == wanted


TWO = {"layer_types": [FULL, SLIDING]}
ROPE = {FULL: {"rope_theta": 5e5}, SLIDING: {"rope_theta": 5e5}}


@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
         r"max_window_layers = 1 with use_sliding_window = true: .*\(sliding_pattern\); up to 8 positions .*: "
         "set max_position_embeddings to 8 and use_sliding_window to false to take it so"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 128},
         "without it: set use_sliding_window to false"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, **TWO},
         r"layer_types has sliding_attention in 1 of 2 layers \(1\): the decoder's .* layer_types to full_attention"),
        ("qwen3", {"sliding_window": 8, "layer_types": [SLIDING] * 2}, r"no sliding_window \(use_sliding_window is"),
        ("qwen3", {"use_sliding_window": 1}, "use_sliding_window = 1 is neither true nor false"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers = -1 is not a whole"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers = 'all' is not a whole"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0 is not a whole number of at least 1"),
        ("mistral", {"sliding_window": 8.5}, "sliding_window = 8.5 is not a whole number"),
        ("mistral", {"sliding_window": True}, "sliding_window = True is not a number"),
        ("mistral", {"sliding_window": [8]}, r"sliding_window = \[8\] is not a number"),
        ("mistral", {"sliding_window": 8, **TWO}, "does not read layer_types, and all of its layers are alike"),
        ("phi3", {"layer_types": [SLIDING] * 2}, "sliding_window is None: this class of transformers does not read"),
        ("gemma3_text", {"sliding_window": None}, r"most layers have a window \(no layer_types\), and there is no sl"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0 is not a whole number of at least"),
        ("gemma3_text", {"sliding_window_pattern": None}, "sliding_window_pattern = None is not a whole number"),
        ("gemma3_text", TWO, r"layer_types has sliding_attention in 1 of 2 layers \(1\): [^;]*$"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "has no table full_attention and no sliding_att"),
        ("gemma3_text", {"rope_parameters": {SLIDING: 9.0}}, "rope_parameters.sliding_attention = 9.0 is no table"),
        ("gemma3_text", {"rope_local_base_freq": 9.0, "rope_parameters": {SLIDING: {"rope_theta": 8.0}}},
         "rope_parameters.sliding_attention.rope_theta = 8.0 and rope_local_base_freq = 9.0 contradict each other"),
        ("gemma3_text", {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 8.0}}},
         "rope_parameters.sliding_attention of rope_type 'linear': layers with a window are never scaled"),
        ("gemma3_text", {"rope_local_base_freq": "low"}, "rope_local_base_freq = 'low' is not a number"),
        ("olmo3", {"rope_theta": 1e4}, "sliding_attention.rope_theta is 500000.0 where it is left out.* other layers "
         "10000.0: version 4"),
        ("olmo3", {"rope_parameters": ROPE | {SLIDING: {"rope_theta": 9.0}}}, "rope_theta is 9.0, and that of the"),
        ("llama", {"sliding_window": 64}, "sliding_window = 64: the layers of this class of transformers have no"),
        ("olmo2", {"layer_types": [SLIDING] * 2}, "sliding_attention in 2 of 2 layers: the layers of this class"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: this needs soft-capped scores"),
    ],
)  # fmt: skip
def test_B1_windows_that_cannot_be_expressed_are_named(model_type: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape_from_config({"model_type": model_type, **SIZES, **config})


@pytest.mark.parametrize("window", [128, 4096])
@pytest.mark.parametrize("model_type", ["mistral", "phi3", "gemma3_text", "olmo3"])
def test_a_window_that_hides_nothing_is_written_as_it_was(model_type: str, window: int) -> None:
    shape = shape_from_config({"model_type": model_type, "sliding_window": window, **SIZES})
    assert not shape.window_bites()
    shape_from_config({"model_type": "llama", "sliding_window": window, **SIZES})  # which reads none
    assert config_json(shape, bos_token_id=1, eos_token_id=1, dtype="float32")["sliding_window"] == window


def test_models_on_the_hub_are_read_as_they_say() -> None:
    """The windows of config.json of Mistral-7B-v0.1, Phi-3-mini-4k, Gemma 3 1B, OLMo 3 7B and Qwen2.5-7B."""
    published: list[tuple[dict[str, Any], tuple[int, int, float]]] = [
        ({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768}, (4096, 0, 0.0)),
        ({"model_type": "phi3", "sliding_window": 2047, "max_position_embeddings": 4096}, (2047, 0, 0.0)),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1000000,
          "rope_local_base_freq": 10000, "num_hidden_layers": 26, "rope_scaling": None}, (512, 6, 10000.0)),
        ({"model_type": "olmo3", "sliding_window": 4096, "rope_theta": 500000, "max_position_embeddings": 65536,
          "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 8, "rope_scaling": {
              "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
              "original_max_position_embeddings": 8192, "rope_type": "yarn"}}, (4096, 4, 500000.0)),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
         (0, 0, 0.0)),
    ]  # fmt: skip
    for config, wanted in published:
        shape = shape_from_config(config)
        assert (shape.sliding_window, shape.sliding_pattern, shape.rope_local_theta) == wanted, config
        assert (
            config_json(shape, bos_token_id=1, eos_token_id=1, dtype="bfloat16")["model_type"] == config["model_type"]
        )


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    shape = shape_from_config({"model_type": "llama", **SIZES, "num_hidden_layers": draw(st.integers(1, 5))})
    shape = replace(
        shape,
        sliding_window=draw(st.sampled_from([0, 5, 128, 200])),
        sliding_pattern=draw(st.sampled_from([0, 2, 3, 4, 6])),
        rope_theta=draw(st.sampled_from([50.0, 60.0])),
        rope_local_theta=draw(st.sampled_from([0.0, 50.0])),
        rope_scaling=draw(st.sampled_from([None, RopeScaling("linear", 2.0)])),
    )
    try:
        check_shape(shape)
    except ConfigError:
        assume(False)
    return shape


@given(shape=shapes(), longest=st.sampled_from([4, 5, 6, 1000]))
def test_fewer_fields_are_the_same_function(shape: ModelShape, longest: int) -> None:
    plain = plain_layers(shape)
    assert ours_by_layer(plain) == ours_by_layer(shape) and plain_layers(plain) == plain
    assert plain.sliding_pattern <= shape.num_hidden_layers

    def seen(layers: list[Layer]) -> list[Layer]:
        return [(None if window is None or window >= longest else window, *rope) for window, *rope in layers]

    assert seen(ours_by_layer(layers_within(shape, longest))) == seen(ours_by_layer(shape))


@settings(max_examples=300)
@given(shape=shapes(), other=shapes(), longest=st.sampled_from([4, 100]))
def test_layers_within_a_length_are_equal_when_they_do_the_same(
    shape: ModelShape, other: ModelShape, longest: int
) -> None:
    other = replace(other, num_hidden_layers=shape.num_hidden_layers)

    def seen(layers: list[Layer]) -> list[Layer]:
        return [(None if window is None or window >= longest else window, *rope) for window, *rope in layers]

    same = seen(ours_by_layer(shape)) == seen(ours_by_layer(other))
    assert (layers_within(shape, longest) == layers_within(other, longest)) or not same


def test_weights_for_sequences_that_fit_into_the_window_are_taken_without_one(tmp_path: Path) -> None:
    theirs = shape_from_config({"model_type": "mistral", "sliding_window": 64, **SIZES})
    config = config_json(theirs, bos_token_id=0, eos_token_id=0, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for ours in (theirs, replace(theirs, sliding_window=0, max_position_embeddings=64)):
        assert check_config(tmp_path, ours).name == "MistralForCausalLM"
    with pytest.raises(CheckpointError, match="sliding_window is 64, the model has 0"):
        check_config(tmp_path, replace(theirs, sliding_window=0, max_position_embeddings=65))
    with pytest.raises(CheckpointError, match="sliding_window is 64, the model has 63"):
        check_config(tmp_path, replace(theirs, sliding_window=63))
    with pytest.raises(CheckpointError, match="sliding_pattern is 0, the model has 2"):
        check_config(tmp_path, replace(theirs, sliding_pattern=2))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "window" in name or name == "olmo3"])
@torch.no_grad()
def test_C3_logits_tell_a_window_that_is_one_longer_or_shorter(name: str, tmp_path: Path) -> None:
    """So that the comparison with `transformers` proves how many positions a window is."""
    model = made(CASES[name], tmp_path)
    shape = shape_from_folder(tmp_path)
    tokens = torch.randint(shape.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    wanted = model(tokens).logits
    for window in {shape.sliding_window, shape.sliding_window + 1, max(1, shape.sliding_window - 1)}:
        ours = Decoder(replace(shape, sliding_window=window))
        ours.load_state_dict(HuggingFaceTensors(tmp_path, shape).all())
        logits = ours.logits(tokens, torch.zeros_like(tokens))[..., : shape.vocab_size]
        difference = float((logits - wanted).abs().max())
        hidden = window == shape.sliding_window or min(window, shape.sliding_window) >= 40
        assert difference <= 1e-4 if hidden else difference > 1e-2
