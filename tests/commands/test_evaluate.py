"""`stagemix evaluate` from outside: an exported folder and a checkpoint in one file, offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf.made_checkpoint import make_checkpoint

from megatron.commands.evaluate import main
from megatron.commands.export_hf import main as export
from megatron.commands.frame import run_command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder)
    return folder / "run"


def test_heldout_suite_of_two_models(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "checkpoints" / "step-000000008" / "config.toml"
    out = tmp_path / "out"
    assert run_command(export, ["--input", str(run), "--output", str(out), "--no-prove"]) == 0
    file = tmp_path / "evaluation.json"
    models = ["--model", f"folder={out}", "--model", f"checkpoint={run}"]
    options = ["--suite", "heldout", "--config", str(config), "--questions", "10", "--passages", "1000"]
    assert run_command(main, [*models, *options, "--dtype", "float32", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert [model["name"] for model in record["models"]] == ["folder", "checkpoint"]
    one, other = (model["results"] for model in record["models"])
    assert one == other and set(one) == set(record["tasks"])
    assert set(one) == {"heldout_code", "heldout_code_loss", "heldout_text", "heldout_text_loss"}
    assert record["tasks"]["heldout_code"]["chance"] == 0.25
    assert {"acc", "acc_norm"} <= one["heldout_code"]["metrics"].keys()
    assert "0.25" in capsys.readouterr().out
    tasks = tmp_path / "evaluation-tasks"
    again = ["--tasks", "heldout_code", "--include-path", str(tasks), "--dtype", "float32"]
    assert run_command(main, ["--model", str(out), *again, "--output", str(tmp_path / "b.json")]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["models"][0]["results"]["heldout_code"] == one["heldout_code"]


def test_B1_documents_that_were_trained_on_are_not_held_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run / "checkpoints" / "step-000000008" / "config.toml"
    options = ["--suite", "heldout", "--config", str(config), "--set", "validation.fraction=0.5"]
    assert run_command(main, ["--model", str(run), *options, "--output", str(tmp_path / "e.json")]) == 2
    assert "trained with validation fraction 0.33" in capsys.readouterr().err


def test_B1_wrong_options_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(tmp_path), "--output", str(tmp_path / "e.json")]
    for options, words in (
        ([], "--suite"),
        (["--suite", "heldout"], "--config"),
        (["--tasks", "a", "--include-path", str(tmp_path / "gone")], "no such folder"),
        (["--tasks", "a", "--model", f"x={tmp_path / 'gone'}"], "no such folder"),
        (["--tasks", "a", "--model", str(tmp_path)], "names"),
    ):
        assert run_command(main, [*model, *options]) == 2
        assert words in capsys.readouterr().err
