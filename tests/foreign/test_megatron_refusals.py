"""Laws B1 and T3 for Megatron-LM's folders: what is missing, contradicts itself or cannot be expressed is named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign.laid_by_hand import (
    GPT2,
    LLAMA,
    args_of,
    lay_megatron,
    megatron_contents,
    save_megatron,
    shape_of,
    weights_of,
)

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape
from megatron.foreign.checkpoint import foreign_shape, open_foreign, parse_overrides

WQ = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return shape_of(LLAMA)


def read(folder: Path, words: int | None = None, **more: Any) -> ModelShape:
    checkpoint = open_foreign(folder, pickles_allowed=True, **more)
    shape = foreign_shape(checkpoint, words)
    checkpoint.tensors(shape).all()
    return shape


def refused(folder: Path, said: str, error: type[Exception] = CheckpointError, **more: Any) -> None:
    with pytest.raises(error, match=said):
        read(folder, **more)


def test_missing_ranks_are_named(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    lay_megatron(tmp_path, weights, shape, 2, 2)
    ranks = tmp_path / "iter_0000007"
    (ranks / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    refused(tmp_path, r"mp_rank_01_000: holds no model_optim_rng\.pt")
    (ranks / "mp_rank_01_000").rmdir()
    refused(tmp_path, "mp_rank_01_000 missing, of 2 tensor x 2 pipeline ranks")
    (ranks / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    (ranks / "mp_rank_01_001").rmdir()
    refused(tmp_path, r"files of 1 tensor ranks, and args\.tensor_model_parallel_size is 2")
    (ranks / "mp_rank_00_002_000").mkdir()
    refused(tmp_path, "mp_rank_00_002_000.*experts")


def test_ranks_of_different_checkpoints(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    for number, (change, said) in enumerate(
        (
            ({"iteration": 8}, "iteration is 8, and 7 in"),
            ({"checkpoint_version": 2.0}, r"checkpoint_version is 2\.0, and 3\.0"),
            ({"args": args_of(shape, 2, 1, norm_epsilon=1e-3)}, r"args\.norm_epsilon is 0\.001, and 1e-06"),
            ({"model": {}}, "hold different tensors"),
        )
    ):
        contents = megatron_contents(weights, shape, 2, 1)
        contents[1, 0] = {**contents[1, 0], **change}
        folder = save_megatron(tmp_path / str(number), contents)
        refused(folder, said)


def test_sizes_that_disagree_name_file_key_and_both_shapes(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    for number, (key, value, said) in enumerate(
        (
            (WQ, torch.zeros(31, 32), r"mp_rank_01.*linear_qkv\.weight: is \[31, 32\], and .* say \[32, 32\]"),
            ("embedding.word_embeddings.weight", torch.zeros(8, 32), r"\[8, 32\].*\[48, 32\]|words on 2 tensor ranks"),
            ("decoder.final_layernorm.weight", torch.zeros(31), r"final_layernorm\.weight: is \[31\].*\[32\]"),
            (
                "decoder.layers.0.mlp.linear_fc2.weight",
                torch.zeros(32, 24).int(),
                r"linear_fc2\.weight: is of torch\.int32",
            ),
            ("decoder.layers.0.mlp.linear_fc2.weight", torch.full((32, 24), torch.nan), "linear_fc2.weight: holds NaN"),
            (
                "decoder.layers.0.mlp.router.weight",
                torch.zeros(2, 2),
                r"router\.weight of \[2, 2\] is none of a plain GPT",
            ),
            ("decoder.layers.0.mlp.linear_fc1.bias", torch.zeros(48), "fc1.bias: args do not say that the model has"),
        )
    ):
        contents = megatron_contents(weights, shape, 2, 1)
        for rank in (0, 1) if "router" in key or "bias" in key else (1,):
            contents[rank, 0]["model"][key] = value
        refused(save_megatron(tmp_path / str(number), contents), said)


def test_missing_tensors_and_layers(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    for number, (begin, said) in enumerate(
        (
            (WQ, r"mp_rank_00.*lacks layers\.0\.qkv\.weight"),
            ("decoder.layers.1.", "layers up to 3 of its own, but not number 1"),
            ("decoder.layers.3.", r"holds 3 layers, and args\.num_layers says 4"),
            ("decoder.final_layernorm", r"lacks final_norm\.weight"),
            ("output_layer", r"lacks head\.weight"),
            ("embedding", "holds no embedding"),
        )
    ):
        contents = megatron_contents(weights, shape, 1, 1)
        model = contents[0, 0]["model"]
        contents[0, 0]["model"] = {key: value for key, value in model.items() if not key.startswith(begin)}
        refused(save_megatron(tmp_path / str(number), contents), said)


def test_a_tied_copy_that_is_another_tensor(tmp_path: Path) -> None:
    shape = shape_of(LLAMA | {"tie_word_embeddings": True})
    contents = megatron_contents(weights_of(shape), shape, 2, 2)
    contents[1, 1]["model"]["output_layer.weight"][5, 3] += 1
    refused(save_megatron(tmp_path, contents), r"mp_rank_01_001.*output_layer\.weight: differs from .*rows 0 and")


def test_replicas_that_drifted_apart_are_told(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    contents = megatron_contents(weights, shape, 2, 1)
    assert open_foreign(save_megatron(tmp_path / "a", contents), pickles_allowed=True).notes() == []
    contents[1, 0]["model"]["decoder.layers.2.mlp.linear_fc1.layer_norm_weight"] = (
        weights["layers.2.mlp_norm.weight"] + 0.25
    )
    (note,) = open_foreign(save_megatron(tmp_path / "b", contents), pickles_allowed=True).notes()
    assert "1 tensors" in note and "0.25" in note and "layers.2.mlp.linear_fc1.layer_norm_weight" in note


REFUSED = {
    "num_experts": 8,
    "multi_latent_attention": True,
    "mtp_num_layers": 1,
    "squared_relu": True,
    "quick_geglu": True,
    "apply_residual_connection_post_layernorm": True,
    "window_size": (128, 0),
    "no_rope_freq": 4,
    "softmax_type": "learnable",
    "hybrid_override_pattern": "M*M*",
    "spec": ["megatron.core.models.mamba", "stack"],
    "use_mup": True,
    "normalization": "L2Norm",
    "position_embedding_type": "yarn",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_decoder_cannot_express_is_refused_by_name(name: str, shape: ModelShape, tmp_path: Path) -> None:
    args = args_of(shape, 1, 1, **{name: REFUSED[name]})
    folder = lay_megatron(tmp_path, weights_of(shape), shape, 1, 1, args=args)
    refused(folder, rf"args\.{name} = ", ConfigError)


def test_all_refusals_come_at_once(shape: ModelShape, tmp_path: Path) -> None:
    args = args_of(shape, 1, 1, num_experts=8, squared_relu=True)
    folder = lay_megatron(tmp_path, weights_of(shape), shape, 1, 1, args=args)
    refused(folder, r"(?s)num_experts = 8.*squared_relu = True", ConfigError)


def test_distributed_checkpoints_are_refused_with_the_remedy(tmp_path: Path) -> None:
    step = tmp_path / "iter_0000007"
    step.mkdir()
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (step / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    refused(tmp_path, "torch_dist.*--ckpt-convert-format torch")
    refused(step, "torch_dist.*--ckpt-convert-format torch")


def test_which_iteration(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    lay_megatron(tmp_path, weights, shape, 1, 1)
    (tmp_path / "iter_0000007").rename(tmp_path / "iter_0000030")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for words in ("7", "../../etc", "-1", "", "release"):
        tracker.write_text(words)
        refused(tmp_path, "latest_checkpointed_iteration.txt: names .*iterations 30: say --iteration")
    assert read(tmp_path, 90, iteration=30) == shape
    refused(tmp_path, "no iteration 7: there are iterations 30", iteration=7)
    tracker.unlink()
    assert read(tmp_path, 90) == read(tmp_path / "iter_0000030", 90) == shape
    (tmp_path / "iter_0000040").mkdir()
    refused(tmp_path, "holds iterations 30, 40 and no latest", ConfigError)
    (tmp_path / "iter_0000030").rename(tmp_path / "release")
    tracker.write_text("release")
    assert read(tmp_path, 90) == shape
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "other").mkdir()
    refused(tmp_path / "other", "not a checkpoint of Megatron-LM")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    rank = tmp_path / "iter_0000007" / "mp_rank_00"
    rank.mkdir(parents=True)
    for content, said in (
        ([1, 2], "holds no model, but list"),
        ({"weights": 1}, r"holds no model, but \['weights'\]"),
        ({"model": {}, "iteration": 1}, "holds no args"),
        ({"model": {}, "args": {"num_layers": 4}}, r"args\.hidden_size is None"),
        ({"model": {"w.weight": torch.ones(1)}, "args": argparse.Namespace()}, r"w\.weight of \[1\] is none of"),
        ({"model": {}, "args": {}, "checkpoint_version": 9.0}, "checkpoint_version 9 is unknown"),
    ):
        torch.save(content, rank / "model_optim_rng.pt")
        refused(tmp_path, said)


def test_arguments_with_no_meaning(shape: ModelShape, tmp_path: Path) -> None:
    for number, (change, said) in enumerate(
        (
            ({"num_layers": "four"}, r"args\.num_layers is 'four'"),
            ({"hidden_size": -3}, r"args\.hidden_size is -3"),
            ({"num_attention_heads": 2**80}, r"linear_qkv\.weight: is \[64, 32\], and args"),
            ({"swiglu": {"x": 1}}, r"args\.swiglu is dict"),
            ({"num_query_groups": 3}, "num_key_value_heads 3"),
            ({"padded_vocab_size": 512}, r"96 words on 1 tensor ranks, and args\.padded_vocab_size is 512"),
        )
    ):
        args = args_of(shape, 1, 1, **change)
        folder = lay_megatron(tmp_path / str(number), weights_of(shape), shape, 1, 1, args=args)
        refused(folder, said, (CheckpointError, ConfigError))  # type: ignore[arg-type]


def test_arguments_that_older_versions_lack_and_that_are_said_anew(tmp_path: Path) -> None:
    shape = shape_of(GPT2)
    old = {
        key: value
        for key, value in vars(args_of(shape, 1, 1)).items()
        if key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "seq_length", "rank")
    }
    args = argparse.Namespace(**old, layernorm_epsilon=1e-4, model_parallel_size=1)
    folder = lay_megatron(tmp_path, weights_of(shape), shape, 1, 1, era="oldest", version=0, args=args)
    found = read(folder, shape.vocab_size)
    assert found.norm_eps == 1e-4 and (found.hidden_act, found.norm) == ("gelu_tanh", "layernorm")
    checkpoint = open_foreign(folder, pickles_allowed=True, overrides=parse_overrides(["bias_gelu_fusion=False"]))
    assert foreign_shape(checkpoint, shape.vocab_size).hidden_act == "gelu"
    assert any("--set bias_gelu_fusion: False" in line for line in checkpoint.said)
    assert any("not in args, so Megatron-LM's default" in line and "normalization" in line for line in checkpoint.said)
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_overrides(["swiglu"])


def test_rope_scaling(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    args = args_of(shape, 1, 1, use_rope_scaling=True, rope_scaling_factor=32.0)
    llama3 = read(lay_megatron(tmp_path / "a", weights, shape, 1, 1, args=args)).rope_scaling
    assert llama3 is not None and (llama3.rope_type, llama3.factor) == ("llama3", 32.0)
    assert (llama3.low_freq_factor, llama3.high_freq_factor) == (1.0, 4.0)
    args = args_of(shape, 1, 1, rotary_seq_len_interpolation_factor=4)
    linear = read(lay_megatron(tmp_path / "b", weights, shape, 1, 1, args=args)).rope_scaling
    assert linear is not None and (linear.rope_type, linear.factor) == ("linear", 4.0)
    args.use_rope_scaling = True
    refused(lay_megatron(tmp_path / "c", weights, shape, 1, 1, args=args), "at once", ConfigError)


def test_vocabularies(shape: ModelShape, tmp_path: Path) -> None:
    folder = lay_megatron(tmp_path, weights_of(shape), shape, 2, 1, divisible_by=16)
    assert (read(folder).vocab_size, read(folder).padded_vocab_size) == (96, 128)
    assert read(folder, 70).padded_vocab_size == 128
    refused(folder, "96 words on 2 tensor ranks, and the vocabulary has 97: is it this model's tokenizer", words=97)


def test_what_legacy_models_do_not_look_at_is_asked_for(shape: ModelShape, tmp_path: Path) -> None:
    weights = weights_of(shape)
    folder = lay_megatron(tmp_path / "base", weights, shape, 1, 1, era="legacy")
    refused(folder, r"rotary_base = 5000, .*--set rotary_base=10000, or --set rotary_base=5000", ConfigError)
    for base in (10000, 5000):
        assert read(folder, 90, overrides={"rotary_base": base}).rope_theta == base
    args = args_of(shape, 1, 1, rotary_base=10000, use_rope_scaling=True)
    folder = lay_megatron(tmp_path / "scaling", weights, shape, 1, 1, era="legacy", args=args)
    refused(folder, "use_rope_scaling = True", ConfigError)


@pytest.mark.parametrize(
    ("era", "change", "act"),
    [
        ("legacy", {"openai_gelu": True, "bias_gelu_fusion": False}, "gelu_tanh"),
        ("te", {"openai_gelu": True, "bias_gelu_fusion": False}, "gelu"),  # mcore does not look at it
        ("legacy", {"onnx_safe": True}, "gelu"),
        ("te", {"bias_gelu_fusion": True}, "gelu_tanh"),
        ("te", {"bias_gelu_fusion": False}, "gelu"),
    ],
)
def test_which_gelu(era: str, change: dict[str, Any], act: str, tmp_path: Path) -> None:
    shape = shape_of(GPT2)
    args = args_of(shape, 1, 1, **change)
    assert read(lay_megatron(tmp_path, weights_of(shape), shape, 1, 1, era=era, args=args), 90).hidden_act == act


def test_names_from_a_file_never_reach_a_terminal_as_they_are(shape: ModelShape, tmp_path: Path) -> None:
    contents = megatron_contents(weights_of(shape), shape, 1, 1)
    contents[0, 0]["\x1b[2Joptimizer"] = 1
    contents[0, 0]["iteration"] = "\x1b[2J"
    checkpoint = open_foreign(save_megatron(tmp_path / "a", contents), pickles_allowed=True)
    assert "\x1b" not in "".join(map(str, [*checkpoint.ignored, checkpoint.step, checkpoint.origin()]))
    assert checkpoint.step == "iter_0000007"
    contents[0, 0]["model"]["\x1b[2J.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError) as error:
        read(save_megatron(tmp_path / "b", contents))
    assert "\x1b" not in str(error.value)
