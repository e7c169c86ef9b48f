"""A Hugging Face folder as a checkpoint: every bit of it, trained on by the real commands, and out again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from hf.family_cases import CASES, FamilyCase, made, stored
from hf.streamed import run
from tiny_run import write_corpus
from transformers import AutoModelForCausalLM

from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.commands.evaluate import validation_of
from megatron.commands.import_hf import main, summary
from megatron.config.errors import CheckpointError, ConfigError, DataError
from megatron.config.load import load_config
from megatron.config.model_shape import resolve_model
from megatron.hf.architecture import shape_from_folder
from megatron.hf.checkpoint_source import open_source
from megatron.hf.export import Writing, export_checkpoint
from megatron.hf.import_folder import import_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.planner.ledger_files import NoLedgerError, read_ledger
from megatron.trainer.resume import Start, find_checkpoint
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.takeover import check_takes

REAL = FamilyCase("llama", CASES["llama"].fields | {"vocab_size": 300})
"""With words enough for the byte tokenizer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four files of tensors, without a tokenizer."""
    path = tmp_path_factory.mktemp("made") / "tiny-llama"
    made(REAL, path, "40KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_give_every_bit_back(name: str, tmp_path: Path) -> None:
    model = made(CASES[name], tmp_path / "float")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="15KB")
    imported = import_folder(tmp_path / "theirs", tmp_path / "checkpoint")
    assert imported.dtypes == ("bfloat16",) and imported.tokenizer is None
    source = open_source(tmp_path / "checkpoint", later=True)
    export_checkpoint(source, tmp_path / "out", dtype="keep", proven=False, writing=Writing(20_000))
    wanted, found = stored(tmp_path / "theirs"), stored(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert source.shape == shape_from_folder(tmp_path / "theirs") == shape_from_folder(tmp_path / "out")
    config = load_config(tmp_path / "checkpoint" / "config.toml")
    assert resolve_model(config.model, 1, source.shape.max_position_embeddings) == source.shape


def test_the_checkpoint_says_where_it_comes_from(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "checkpoint", tokenizer="bytes")
    found = open_checkpoint(tmp_path / "checkpoint")
    origin = found.state["imported"]
    assert found.step == 0 and origin["kind"] == "hugging_face" and origin["folder"] == "tiny-llama"
    for name, seal in origin["files"].items():
        content = (folder / name).read_bytes()
        assert seal == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {path.name for path in folder.glob("*.safetensors")} < set(origin["files"])
    assert {tensor.dtype for tensor in found.model().all().values()} == {torch.float32}


def test_an_imported_model_has_no_ledger_and_every_document_is_new_to_it(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "checkpoint", tokenizer="bytes")
    with pytest.raises(NoLedgerError, match="has not been trained here"):
        read_ledger(tmp_path / "checkpoint")
    assert validation_of(tmp_path / "checkpoint") is None


def test_dtype(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "checkpoint", dtype="bfloat16")
    theirs = HuggingFaceTensors(folder, shape_from_folder(folder)).all()
    ours = open_checkpoint(tmp_path / "checkpoint").model().all()
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in theirs.items())


def test_the_real_commands_import_train_and_export(folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 nothing may change: two steps through the trainer give every bit back."""
    done = run("import_hf", "--input", folder, "--output", tmp_path / "checkpoint", "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr
    commands = done.stdout.split("next:\n")[1]
    assert all(word in commands for word in ("preprocess_data.py", "train.py mine.toml", "export_hf.py --input"))
    write_corpus(tmp_path / "mine", 1)
    text = (tmp_path / "checkpoint" / "config.toml").read_text()
    text, edits = re.subn(r'tokens = "1B"     # a size.*', f'data = ["{tmp_path / "mine"}"]\nmax_epochs = 9', text)
    assert edits == 1
    (tmp_path / "mine.toml").write_text(text)
    settings = {
        "run.output": tmp_path / "run",
        "train.global_batch_size": 2,
        "train.precision": "fp32",
        "stages.continued.tokens": 2 * 2 * 64,
        "stages.continued.lr.peak": 0,
        "stages.continued.lr.final": 0,
        "data.cache": tmp_path / "cache",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = run("train", tmp_path / "mine.toml", *words)
    assert done.returncode == 0, done.stderr
    assert "weights from" in done.stdout
    done = run("export_hf", "--input", tmp_path / "run", "--output", tmp_path / "out", "--no-prove")
    assert done.returncode == 0, done.stderr
    wanted, found = stored(folder), stored(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Training stage continued began from the weights at `{tmp_path / 'checkpoint'}`" in card
    assert "Trained for 2 steps" in card


def test_an_import_is_exported_without_training(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "checkpoint")
    done = run("export_hf", "--input", tmp_path / "checkpoint", "--output", tmp_path / "out", "--dtype", "keep")
    assert done.returncode == 0, done.stderr
    assert "proving on random ids" in done.stdout and "proven" in done.stdout
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (folder, tmp_path / "out")
        )
    assert torch.equal(first, second)
    assert "imported from `tiny-llama`" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "origin.json").read_text())["folder"] == "tiny-llama"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_stage_takes_weights_alone_and_of_the_same_function(folder: Path, tmp_path: Path) -> None:
    place = import_folder(folder, tmp_path / "checkpoint").checkpoint
    config = load_config(place / "config.toml")
    shape = resolve_model(config.model, 257)
    check_takes(config.stages, shape)
    other = resolve_model(config.model.model_copy(update={"rope_theta": 1234.0}), 257)
    with pytest.raises(ConfigError, match=r"stage 'continued'.*rope_theta is 10000\.0, the model has 1234\.0"):
        check_takes(config.stages, other)
    stage = config.stages[0]
    for key in ("optimizer", "cursors"):
        take = stage.take.model_copy(update={key: str(place)})
        with pytest.raises(ConfigError, match=f"an imported model has weights alone, no {key}"):
            check_takes([stage.model_copy(update={"take": take})], shape)


def test_it_is_no_run_to_resume(folder: Path, tmp_path: Path) -> None:
    place = import_folder(folder, tmp_path / "checkpoint").checkpoint
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="take = .*weights"):
        find_checkpoint(Start(resume_from=place), RunFolder(tmp_path / "run"), manager, print)


def test_what_follows_where_no_tokenizer_can_be_used(folder: Path, tmp_path: Path) -> None:
    imported = import_folder(folder, tmp_path / "checkpoint")
    lines = summary(imported, 1.0)
    assert any("no tokenizer was imported" in line and "--tokenizer" in line for line in lines)
    assert any("--tokenizer TOKENIZER" in line for line in lines)
    assert open_source(tmp_path / "checkpoint").tokenizer is None
    assert load_config(tmp_path / "checkpoint" / "config.toml").tokenizer.path == "TOKENIZER"
    given = open_source(tmp_path / "checkpoint", "bytes").tokenizer
    assert given is not None and given.name == "bytes"


def test_more_ids_than_the_embedding_has_rows(tmp_path: Path) -> None:
    made(CASES["llama"], tmp_path / "small")
    with pytest.raises(DataError, match="ids up to 256, and the embedding has 101 rows"):
        import_folder(tmp_path / "small", tmp_path / "checkpoint", tokenizer="bytes")
    import_folder(tmp_path / "small", tmp_path / "checkpoint")
    with pytest.raises(DataError, match="ids up to 256, and the embedding has 101 rows"):
        open_source(tmp_path / "checkpoint", "bytes")


def test_what_is_there_is_kept_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    words = ["--input", str(folder), "--output", str(tmp_path / "checkpoint")]
    assert main(words) == 0
    with pytest.raises(ConfigError, match="--overwrite"):
        main(words)
    assert main([*words, "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        import_folder(folder, tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "mine"]
    with pytest.raises(CheckpointError, match="no such folder"):
        import_folder(tmp_path / "absent", tmp_path / "other")
