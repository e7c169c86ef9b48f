"""Our weights as Megatron-LM's files: what torch.load finds there is what the format's description asks for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign.laid_by_hand import GPT2, LLAMA, megatron_contents, shape_of, weights_of
from torch import Tensor

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.errors import ConfigError, StorageError
from megatron.config.model_shape import ModelShape
from megatron.foreign.checkpoint import foreign_shape, open_foreign
from megatron.foreign.megatron_args_written import flags_for
from megatron.foreign.megatron_export import MegatronLayout, export_megatron, needed_bytes

ERAS = {"mcore": "te", "mcore-local": "local", "legacy": "legacy"}
TEN = {"rope_theta": 10000.0}


def flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None and "_extra_state" not in key:
            found[prefix + key] = value
    return found


def exported(
    tmp_path: Path, shape: ModelShape, weights: dict[str, Tensor], layout: MegatronLayout, **more: Any
) -> Path:
    export_megatron(WholeTensors(weights), shape, tmp_path, layout, iteration=12, **more)
    return tmp_path


@pytest.mark.parametrize("spelling", ERAS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)])
def test_files_are_those_of_the_format(spelling: Any, tp: int, pp: int, tmp_path: Path) -> None:
    for fields in (LLAMA | TEN, GPT2):
        shape = shape_of(fields)
        weights = weights_of(shape)
        folder = exported(
            tmp_path / fields["hidden_act"] if "hidden_act" in fields else tmp_path / "l",
            shape,
            weights,
            MegatronLayout(tp, pp, spelling, 16),
        )
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "12"
        wanted = megatron_contents(weights, shape, tp, pp, era=ERAS[spelling])
        for (t, p), content in wanted.items():
            rank = folder / "iter_0000012" / (f"mp_rank_{t:02d}_{p:03d}" if pp > 1 else f"mp_rank_{t:02d}")
            found = torch.load(rank / "model_optim_rng.pt", weights_only=False)
            assert (found["checkpoint_version"], found["iteration"]) == (3.0, 12)
            ours, theirs = flat(found["model"]), flat(content["model"])
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                if "word_embeddings" in name or "output_layer" in name:  # padding is the last word over and over
                    real = max(0, min(len(tensor), shape.vocab_size - t * len(tensor)))
                    assert torch.equal(ours[name][:real], tensor[:real]) and len(ours[name]) == len(tensor)
                    last = weights[
                        "head.weight"
                        if name.endswith("output_layer.weight") and "head.weight" in weights
                        else "embedding.weight"
                    ][shape.vocab_size - 1]
                    assert torch.equal(ours[name][real:], last.expand(len(tensor) - real, -1))
                else:
                    assert torch.equal(ours[name], tensor), name
            args = found["args"]
            assert isinstance(args, argparse.Namespace)
            for key, value in vars(content["args"]).items():
                if key in ("hidden_dropout", "params_dtype", "rank", "data_path", "rotary_base", "bias_gelu_fusion"):
                    continue
                assert getattr(args, key) == value, key


@pytest.mark.parametrize(
    "model", [LLAMA | {"query_key_value_bias": True, "qk_norm": "head"}, GPT2], ids=["llama", "gpt2"]
)
def test_there_and_back(model: dict[str, Any], tmp_path: Path) -> None:
    shape = shape_of(model)
    weights = weights_of(shape)
    folder = exported(tmp_path / "m", shape, weights, MegatronLayout(2, 2), dtype=torch.bfloat16)
    checkpoint = open_foreign(folder, pickles_allowed=True)
    assert foreign_shape(checkpoint, shape.vocab_size) == shape
    found = checkpoint.tensors(shape).all()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights.items())


def test_rope_scaling_and_unit_offset_are_said(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for number, fields in enumerate(
        ({"rope_scaling": llama3}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    ):
        shape = shape_of(LLAMA | fields)
        folder = exported(tmp_path / str(number), shape, weights_of(shape), MegatronLayout())
        assert foreign_shape(open_foreign(folder, pickles_allowed=True), shape.vocab_size) == shape
        assert any("scal" in flag or "interpolation" in flag for flag in flags_for(shape, "mcore", 128))
    shape = shape_of(LLAMA | {"norm_unit_offset": True})
    weights = weights_of(shape)
    checkpoint = open_foreign(exported(tmp_path / "offset", shape, weights, MegatronLayout()), pickles_allowed=True)
    plain = foreign_shape(checkpoint, shape.vocab_size)
    assert not plain.norm_unit_offset
    assert torch.equal(checkpoint.tensors(plain).whole("final_norm.weight"), weights["final_norm.weight"] + 1)


@pytest.mark.parametrize(
    ("fields", "layout", "said"),
    [
        (LLAMA, MegatronLayout(3, 1), "num_attention_heads 8 is not a multiple of --tensor 3"),
        (LLAMA, MegatronLayout(8, 1), "num_key_value_heads 4 is not a multiple of --tensor 8"),
        (LLAMA, MegatronLayout(1, 3), "num_hidden_layers 4 is not a multiple of --pipeline 3"),
        (LLAMA, MegatronLayout(0, 1), "--tensor 0"),
        (LLAMA, MegatronLayout(divisible_by=0), "--make-vocab-size-divisible-by 0"),
        (LLAMA, MegatronLayout(spelling="legacy"), "rope_theta = 5000: legacy models turn by 10000"),
        (LLAMA | {"parallel_block": True}, MegatronLayout(), "model.parallel_block = True"),
        (LLAMA | {"norm_place": "after"}, MegatronLayout(), "model.norm_place = 'after'"),
        (LLAMA | {"hidden_act": "gelu"}, MegatronLayout(), "gated silu"),
        (LLAMA | {"mlp_bias": True}, MegatronLayout(), "one flag for both"),
        (LLAMA | {"qk_norm": "width"}, MegatronLayout(), "model.qk_norm = 'width'"),
        (LLAMA | {"qk_norm": "head"}, MegatronLayout(spelling="legacy"), "model.qk_norm = 'head'"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 1.5}}, MegatronLayout(), "a whole factor"),
    ],
)
def test_what_megatron_cannot_express(
    fields: dict[str, Any], layout: MegatronLayout, said: str, tmp_path: Path
) -> None:
    shape = shape_of(fields)
    with pytest.raises(ConfigError, match=said):
        exported(tmp_path / "m", shape, weights_of(shape), layout)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(LLAMA)
    weights = weights_of(shape)
    calls = []

    def full(content: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"x")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="free some space"):
        exported(tmp_path / "m", shape, weights, MegatronLayout(2, 1))
    assert not list(tmp_path.iterdir())


def test_what_lies_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    shape = shape_of(LLAMA)
    weights = weights_of(shape)
    folder = exported(tmp_path / "m", shape, weights, MegatronLayout(2, 1))
    with pytest.raises(ConfigError, match="exists already"):
        exported(folder, shape, weights, MegatronLayout(1, 1))
    exported(folder, shape, weights, MegatronLayout(1, 1), overwrite=True)
    assert [path.name for path in (folder / "iter_0000012").iterdir()] == ["mp_rank_00"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not a checkpoint of Megatron-LM"):
        exported(tmp_path / "other", shape, weights, MegatronLayout(), overwrite=True)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_the_room_that_is_looked_for_is_what_is_written(tp: int, pp: int, tmp_path: Path) -> None:
    for number, fields in enumerate((LLAMA | {"query_key_value_bias": True, "qk_norm": "head"}, GPT2)):
        shape = shape_of(fields)
        weights, layout = weights_of(shape), MegatronLayout(tp, pp)
        folder = exported(tmp_path / str(number), shape, weights, layout, dtype=torch.bfloat16)
        written = [flat(torch.load(path, weights_only=False)["model"]) for path in folder.rglob("*.pt")]
        total = sum(tensor.nbytes for tensors in written for tensor in tensors.values())
        assert needed_bytes(WholeTensors(weights), shape, layout, torch.bfloat16) == total
