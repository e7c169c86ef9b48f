"""config.json both ways: what each family reads, what it takes for a key that is left out, and what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers
from hf.family_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_section import FamilyName
from megatron.config.model_shape import ModelShape, check_shape, padded_vocabulary
from megatron.config.rope_scaling import RopeScaling
from megatron.hf.architecture import (
    FAMILIES,
    architecture_for,
    config_json,
    family_named,
    shape_from_config,
    shape_from_folder,
    training_notes,
)
from megatron.hf.families.family import FREE, Family
from megatron.hf.families.windows import plain_layers

EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "gemma2": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "cohere": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}
"""What must be said for a class's own defaults to be a model of ours."""
GENERIC = transformers.PretrainedConfig().to_dict().keys() | {
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
HARMLESS = {
    "attention_dropout", "attn_pdrop", "classifier_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "is_decoder", "_sliding_window_pattern", "original_max_position_embeddings",
    "rope_parameters",
}  # fmt: skip
"""Keys that say nothing about logits, or that the rotary words read."""
CHECKED = {
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "pretraining_tp", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "add_cross_attention", "use_bidirectional_attention", "attn_logit_softcapping",
    "final_logit_softcapping", "use_qk_norm",
}  # fmt: skip
"""Keys of which some values are refused."""


def defaults(family: Family) -> dict[str, Any]:
    """All keys of the class's config as `transformers` fills them in."""
    config = transformers.AutoConfig.for_model(family.model_type, **EXPRESSIBLE.get(family.model_type, {}))
    return json.loads(json.dumps(config.to_dict()))  # type: ignore[no-any-return]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.model_type)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


def test_the_config_schema_knows_every_family() -> None:
    assert set(get_args(FamilyName)) == {family.model_type for family in FAMILIES}


def test_every_field_of_a_shape_is_said_or_fixed(family: Family) -> None:
    own = {item.name: item for item in fields(ModelShape)}
    said = {key.ours for key in family.keys}
    assert said | family.always.keys() <= own.keys() and not said & family.always.keys()
    other = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_theta"}
    left = own.keys() - said - family.always.keys() - FREE - other
    assert [name for name in left if own[name].default is MISSING] == []


def test_the_class_of_transformers_has_the_names(family: Family) -> None:
    config = transformers.AutoConfig.for_model(family.model_type)
    assert transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__ == family.name


def test_a_key_left_out_means_what_transformers_takes_for_it(family: Family) -> None:
    full, said = defaults(family), EXPRESSIBLE.get(family.model_type, {})
    wanted = shape_from_config(full)
    assert shape_from_config({"model_type": family.model_type, **said}) == wanted
    for key in full.keys() - said.keys() - {"model_type"}:
        assert shape_from_config({name: value for name, value in full.items() if name != key}) == wanted, key
    # other sizes than the defaults, so that a default that follows from them does
    odd: dict[str, Any] = {"num_attention_heads": 8, "n_head": 8, "hidden_size": 256, "n_embd": 256, "n_inner": None}
    never_null = family.model_type.startswith(("gemma", "mistral"))
    odd |= {"num_key_value_heads": 4 if never_null else None}
    some = {key: value for key, value in odd.items() if key in full} | said
    again = transformers.AutoConfig.for_model(family.model_type, **some).to_dict()
    assert shape_from_config({"model_type": family.model_type, **some}) == shape_from_config(again)


def test_no_key_of_transformers_is_overlooked(family: Family) -> None:
    read = {key.theirs for key in family.keys}
    assert defaults(family).keys() - GENERIC - read - HARMLESS - CHECKED == set()


SIZES = {
    "hidden_size": 64, "n_embd": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    "num_key_value_heads": 4,
}  # fmt: skip
MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 2, **SIZES}, "has 'linear_attention'"),
        ({"model_type": "mixtral", **MOE}, "model_type = 'mixtral'.* cannot be expressed; known: LlamaForCausalLM"),
        ({"model_type": "llama", **MOE}, "num_local_experts = 8: this needs a mixture of experts"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
         "rope_type 'longrope' cannot be expressed"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, "rope_type 'su' cannot be expressed"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs high_freq_factor"),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "contradict each other"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0},
          "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "older and newer readers"),
        ({"model_type": "llama", "rope_scaling": [1]}, "rope_scaling = .* is no table"),
        ({"model_type": "llama", "pretraining_tp": 2}, "pretraining_tp = 2: this needs matrices multiplied in slices"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"model_type": "llama", "hidden_act": "relu2"}, "hidden_act = 'relu2': the decoder has no such activation"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size = 'wide' is not a number"),
        ({"model_type": "llama", "hidden_size": 64.5}, "hidden_size = 64.5 is not a whole number"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers = 0 is not a whole number of at least 1"),
        ({"model_type": "llama", "rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not a number"),
        ({"model_type": "llama", "vocab_size": 10**400}, "vocab_size = 1000.* is not a number"),
        ({"model_type": "llama", "rope_theta": 0}, "rope_theta = 0 is not above 0"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": ["yarn"]}}, "rope_type = .'yarn'. is no name"),
        ({"model_type": "llama", "layer_types": [{}]}, "layer_types has {}: only full_attention and sliding_attention"),
        ({"model_type": "llama", "layer_types": ["full_attention"]}, "layer_types names 1 layers, and there are 32"),
        ({"model_type": "phi3", "partial_rotary_factor": 2.0}, "partial_rotary_factor = 2.0 turns more than a head"),
        ({"model_type": "gpt2", "resid_pdrop": 1.0}, "resid_pdrop = 1.0 is not from 0 to below 1"),
        ({"model_type": ["llama"], "architectures": "LlamaForCausalLM"}, "architectures = .* is no list"),
        ({"model_type": ["llama"]}, "model_type = .'llama'."),
        ({"model_type": "llama", "tie_word_embeddings": 1}, "tie_word_embeddings = 1 is neither true nor false"),
        ({"model_type": "llama", "num_attention_heads": 3}, "hidden_size 4096 is not a multiple of num_att"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM can be"),
        ({"architectures": ["Custom"], "auto_map": {"AutoModel": "x.Y"}}, "code that comes with a model is never run"),
        ({}, "model_type = None"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention = True: this needs cross-attention"),
        ({"model_type": "gemma2", **SIZES}, "(?s)attn_logit_softcapping = 50.0 .*final_logit_softcapping = 30.0"),
        ({"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu_new"}, "contradicts hidden_act"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "attention ahead"),
        ({"model_type": "cohere", "rope_theta": 1e4, "use_qk_norm": True}, "use_qk_norm = True: this needs LayerNorms"),
        ({"model_type": "cohere"}, "rope_theta is left out: version 4 of transformers takes 10000 .* 5 takes 500000"),
        ({"model_type": "cohere", "rope_theta": 1e4, **SIZES, "head_dim": 32}, "head_dim = 32: .*, which is 16"),
        ({"model_type": "cohere", "rope_theta": 1e4, **SIZES, "head_dim": {}}, "head_dim = {}: this class has no such"),
        ({"model_type": "cohere", "rope_theta": 1e4, "logit_scale": None}, "logit_scale is null, and must be a number"),
        ({"model_type": "cohere", "rope_theta": 1e4, "logit_scale": 0}, "logit_scale = 0 is not above 0"),
        ({"model_type": "cohere2", **SIZES}, "model_type = 'cohere2'.* cannot be expressed; .*CohereForCausalLM"),
    ],
)  # fmt: skip
def test_B1_what_the_decoder_cannot_express_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        shape_from_config(config, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")


def test_B1_code_in_a_folder_is_neither_run_nor_looked_at(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    config = defaults(family_named("llama")) | {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Mine: pass\n")
    shape_from_folder(tmp_path)
    assert not canary.exists()
    assert any("auto_map" in note for note in training_notes(config))


@pytest.mark.parametrize("text", ["{", "[]", "", '{"a": ' * 100_000])
def test_B1_a_config_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        shape_from_folder(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        shape_from_folder(tmp_path)


LLAMA_FIELDS: dict[str, Any] = {
    "vocab_size": 100, "padded_vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "hidden_act": "silu", "gated_mlp": True,
    "norm": "rmsnorm", "norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "parallel_block": False,
    "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "tie_word_embeddings": False, "initializer_range": 0.02,
    "document_mask": True, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = ModelShape(**LLAMA_FIELDS)
NEOX = replace(
    LLAMA,
    norm="layernorm",
    gated_mlp=False,
    mlp_bias=True,
    attention_bias=True,
    num_key_value_heads=4,
    hidden_act="gelu",
)


COHERE = replace(LLAMA, norm="layernorm_no_bias", parallel_block=True, shared_norm=True)
OLMO3 = replace(LLAMA, qk_norm="width", norm_place="after", sliding_window=9, sliding_pattern=2, family="olmo3")


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (LLAMA, "LlamaForCausalLM"),
        (replace(LLAMA, attention_bias=True, mlp_bias=True), "LlamaForCausalLM"),
        (replace(LLAMA, query_key_value_bias=True), "Qwen2ForCausalLM"),
        (replace(LLAMA, qk_norm="head"), "Qwen3ForCausalLM"),
        (replace(LLAMA, qk_norm="head", attention_bias=True), "Qwen3ForCausalLM"),
        (replace(LLAMA, qk_norm="width", norm_place="after"), "Olmo2ForCausalLM"),
        (replace(LLAMA, partial_rotary_factor=0.5), "Phi3ForCausalLM"),
        (replace(LLAMA, family="mistral"), "MistralForCausalLM"),
        (replace(LLAMA, family="phi3"), "Phi3ForCausalLM"),
        (replace(LLAMA, sliding_window=9), "MistralForCausalLM"),
        (replace(LLAMA, sliding_window=9, sliding_pattern=7), "MistralForCausalLM"),
        (replace(LLAMA, sliding_window=9, query_key_value_bias=True, sliding_pattern=2), "Qwen2ForCausalLM"),
        (replace(LLAMA, sliding_window=9, qk_norm="width", norm_place="after", sliding_pattern=2), "Olmo3ForCausalLM"),
        (replace(LLAMA, attention_multiplier=8**-0.5), "LlamaForCausalLM"),
        (NEOX, "GPTNeoXForCausalLM"),
        (replace(NEOX, parallel_block=True), "GPTNeoXForCausalLM"),
        (replace(NEOX, position_embedding="learned"), "GPT2LMHeadModel"),
        (COHERE, "CohereForCausalLM"),
        (replace(COHERE, logit_multiplier=0.0625, attention_bias=True), "CohereForCausalLM"),
        (replace(LLAMA, norm_unit_offset=True, embedding_multiplier=5.65685425), "GemmaForCausalLM"),
        (replace(LLAMA, norm_unit_offset=True, embedding_multiplier=32**0.5, norm_place="both"), "Gemma2ForCausalLM"),
    ],
)  # fmt: skip
def test_the_plainest_family_that_says_a_shape_is_chosen(shape: ModelShape, name: str) -> None:
    assert architecture_for(shape).name == name


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (replace(LLAMA, parallel_block=True), "Llama.*:\n  model.parallel_block = true: .* only say false"),
        (replace(COHERE, norm="rmsnorm"), "Cohere.*:\n  model.norm = 'rmsnorm': .* only say 'layernorm_no_bias'"),
        (replace(COHERE, head_dim=16), "model.head_dim = 16: CohereForCausalLM can only say 8"),
        (replace(COHERE, shared_norm=False), "model.shared_norm = false: CohereForCausalLM can only say true"),
        (replace(LLAMA, logit_multiplier=0.5), "model.logit_multiplier = 0.5: LlamaForCausalLM can only say 1.0"),
        (replace(LLAMA, qk_norm="width"), "model.qk_norm = 'width': LlamaForCausalLM can only say 'none'"),
        (replace(LLAMA, qk_norm="head", query_key_value_bias=True), "model.q"),
        (replace(NEOX, num_key_value_heads=2), "model.num_key_value_heads = 2: GPTNeoXForCausalLM can only say 4"),
        (replace(LLAMA, norm_unit_offset=True), "model.norm_unit_offset = true: LlamaForCausalLM can only say false"),
        (replace(LLAMA, norm_unit_offset=True, family="gemma"), "embedding_multiplier = 1.0: GemmaForCausalLM .* 5.65"),
        (replace(LLAMA, attention_multiplier=0.1), "attention_multiplier = 0.1: LlamaForCausalLM can only say 0.0"),
        (replace(LLAMA, family="mistral", mlp_bias=True), r'family = "mistral" makes this a Mistral.*\n.*mlp_bias'),
        (replace(LLAMA, sliding_window=9, sliding_pattern=2), "sliding_pattern = 2: MistralForCausalLM can only say 0"),
        (replace(LLAMA, sliding_window=9, family="llama"), "model.sliding_window = 9: LlamaForCausalLM can only say 0"),
        (replace(OLMO3, rope_local_theta=9.0), "model.rope_local_theta = 9.0: Olmo3ForCausalLM can only say 0.0"),
        (replace(OLMO3, rope_scaling=RopeScaling("linear", 2.0)), "rope_local_theta = 0.0: .* can only say 10000.0"),
        (replace(OLMO3, sliding_pattern=0, rope_scaling=RopeScaling("linear", 2.0)), "model.rope_scaling"),
        (replace(LLAMA, family="phi3", rope_scaling=RopeScaling("linear", 2.0)), "model.rope_scaling"),
        (replace(LLAMA, family="gemma2", norm_unit_offset=True, embedding_multiplier=32**0.5, norm_place="both",
                 attention_multiplier=0.3), "attention_multiplier = 0.3: Gemma2ForCausalLM can only say"),
    ],
)  # fmt: skip
def test_B1_a_shape_that_no_family_says_is_refused_by_field(shape: ModelShape, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        architecture_for(shape)


def _shapes() -> st.SearchStrategy[ModelShape]:
    yes = st.booleans()
    scalings = st.sampled_from(
        [
            None,
            RopeScaling("linear", 2.0),
            RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
            RopeScaling("yarn", 4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0),
            RopeScaling("yarn", 4.0, None, None, 16, 1.25, 24.0, 2.0),
        ]
    )
    patterns = st.sampled_from([(0, 0.0), (2, 0.0), (3, 0.0), (2, 100.0), (3, 100.0)])
    some = st.tuples(st.sampled_from([1, 9, 64, 10**6]), patterns).map(
        lambda drawn: {"sliding_window": drawn[0], "sliding_pattern": drawn[1][0], "rope_local_theta": drawn[1][1]}
    )
    windows = st.one_of(st.just({}), some)
    return st.builds(
        lambda windows, **given: replace(
            LLAMA, **given, **windows, padded_vocab_size=padded_vocabulary(given["vocab_size"])
        ),
        windows=windows,
        vocab_size=st.integers(1, 1000),
        num_key_value_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([8, 12]),
        intermediate_size=st.integers(1, 200),
        hidden_act=st.sampled_from(["silu", "gelu", "gelu_tanh"]),
        gated_mlp=yes,
        norm=st.sampled_from(["rmsnorm", "layernorm", "layernorm_no_bias"]),
        norm_eps=st.floats(1e-12, 1e-2),
        attention_bias=yes,
        mlp_bias=yes,
        parallel_block=yes,
        shared_norm=yes,
        logit_multiplier=st.sampled_from([1.0, 0.0625]),
        rope_theta=st.floats(1.0, 1e7),
        partial_rotary_factor=st.sampled_from([1.0, 0.5]),
        tie_word_embeddings=yes,
        max_position_embeddings=st.integers(1, 10**6),
        query_key_value_bias=yes,
        qk_norm=st.sampled_from(["none", "head", "width"]),
        norm_place=st.sampled_from(["before", "after", "both"]),
        norm_unit_offset=yes,
        position_embedding=st.sampled_from(["rope", "learned"]),
        rope_scaling=scalings,
        embedding_multiplier=st.sampled_from([1.0, 32**0.5]),
        attention_multiplier=st.sampled_from([0.0, 0.2]),
        family=st.sampled_from(["", *get_args(FamilyName)]),
    )


def _is_model(shape: ModelShape) -> bool:
    try:
        check_shape(shape)
    except ConfigError:
        return False
    return True


@settings(max_examples=400, deadline=None)
@given(shape=_shapes(), seed=st.integers(0, 2**32))
def test_a_shape_is_refused_or_read_back_from_its_config(shape: ModelShape, seed: int) -> None:
    """Draws near each family besides: what it cannot say is set to what it can, field by field, but for one or none."""
    families = [family_named(shape.family)] if shape.family else list(FAMILIES)
    chosen = random.Random(seed).choice(families)
    wanted = {name: only for name, _, only in chosen.wants(shape)}
    for name in sorted(wanted):
        shape = replace(shape, **{name: wanted[name]})
    if shape.position_embedding == "learned":
        shape = replace(shape, rope_theta=10000.0, rope_scaling=None, partial_rotary_factor=1.0)
    if not _is_model(shape):
        return
    config = json.loads(json.dumps(config_json(shape, bos_token_id=1, eos_token_id=2, dtype="bfloat16")))
    again = shape_from_config(config)
    assert replace(again, family=shape.family) == plain_layers(shape)
    assert architecture_for(again) is architecture_for(shape)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transformers_reads_our_config_as_its_own(case: Any) -> None:
    theirs = transformers.AutoConfig.for_model(case.model_type, **json.loads(json.dumps(case.fields)))
    shape = shape_from_config(json.loads(json.dumps(theirs.to_dict())))
    ours = config_json(shape, bos_token_id=1, eos_token_id=1, dtype="float32")
    read = type(theirs).from_dict(ours)
    read, wanted = read.to_dict(), theirs.to_dict()
    more = {"head_dim", "partial_rotary_factor", "rope_theta", "hidden_activation", "sliding_window_pattern"}
    assert read.keys() - wanted.keys() <= more
    # Said in other words: a null as what it means, one function by another name; dropout of a classifier; what
    # layer_types say, and what layers that are not there would do.
    words = {"n_inner", "hidden_act", "classifier_dropout", "max_window_layers", "_sliding_window_pattern"}
    tables, rope = (said.get("rope_parameters") or {} for said in (read, wanted))
    kinds = set(wanted.get("layer_types") or ()) & rope.keys()
    for ours_said, theirs_said in [(tables[kind], rope[kind]) for kind in kinds] or [(tables, rope)]:
        assert theirs_said.items() <= ours_said.items(), "yarn is written with what may be left out"
    words.add("rope_parameters")
    words |= {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {key: read[key] for key in wanted.keys() - words} == {key: wanted[key] for key in wanted.keys() - words}
