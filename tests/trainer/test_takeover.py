"""What a stage takes over from a Hugging Face folder: the same on any number of ranks, and checked at the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hf.made_folder import made_by_transformers
from rank_jobs import train_ranks
from safetensors.torch import load_file, save_file
from tiny_run import curve_of, exit_record, make_run, rows_of, train

from megatron.config.load import load_config
from megatron.config.model_shape import resolve_model
from megatron.tokenizers.byte_level import ByteTokenizer

pytestmark = pytest.mark.timeout(300)
FEW = ("--set", "stages.text.steps=3", "--set", "stages.cooldown.steps=2")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run, beside the folder `model` of its shape."""
    path = make_run(tmp_path)
    made_by_transformers(resolve_model(load_config(path).model, ByteTokenizer().vocab_size), tmp_path / "model")
    return path


def test_T1_tensor_ranks_take_the_weights_that_one_process_takes(config: Path, tmp_path: Path) -> None:
    words = (*FEW, "--set", f"stages.text.take.weights='{tmp_path / 'model'}'")
    assert train(config, *words).returncode == 0
    alone = curve_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert "weights from" in train_ranks(2, config, *words, "--set", "parallel.tensor=2").log(0)
    ranks = curve_of(tmp_path / "run")
    assert [row[4] for row in ranks] == pytest.approx([row[4] for row in alone], rel=1e-4)
    assert [row[:4] for row in ranks] == [row[:4] for row in alone]
    shutil.rmtree(tmp_path / "run")
    assert train(config, *FEW).returncode == 0
    kept = curve_of(tmp_path / "run")
    assert kept[:8] == alone[:8] and abs(kept[8][4] - alone[8][4]) > 0.01, "other weights show at once"


def test_B1_a_folder_that_does_not_fit_is_found_before_the_first_step(config: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "run"
    take = ("--set", f"stages.cooldown.take.weights='{model}'")
    done = train(config, *take, "--set", "model.hidden_size=32")
    assert done.returncode == 4 and "stage 'cooldown': take.weights" in done.stderr, done.stderr
    assert "hidden_size is 16, the model has 32" in done.stderr
    done = train(config, *take, "--set", "model.gated_mlp=false")
    assert done.returncode == 4 and "stage 'cooldown': take.weights" in done.stderr
    assert "gated_mlp is True, the model has False" in done.stderr
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, model / "model.safetensors")
    done = train(config, *take)
    assert done.returncode == 4 and "input_layernorm.weight is missing" in done.stderr
    assert exit_record(output)["code"] == 4 and exit_record(output)["step"] == 0
    assert not (output / "metrics.jsonl").exists() or not rows_of(output)
