"""plan, inspect_data and ledger as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_runs import run_config, write_corpus

from megatron.checkpoint.manifest import build_manifest, manifest_bytes
from megatron.commands import inspect_data, ledger, plan
from megatron.commands.frame import run_command
from megatron.config.load import config_to_toml
from megatron.planner.resolve import resolve_run


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("code", "text")):
        write_corpus(folder / name, 60, seed)
    sources = {name: {"data": [str(folder / name)]} for name in ("code", "text")}
    stages = [
        {"name": "one", "samples": 80, "mixture": {"code": 0.5, "text": 0.5}},
        {"name": "two", "samples": 40, "mixture": {"code": 0.1, "text": 0.9}},
    ]
    file = folder / "run.toml"
    file.write_text(config_to_toml(run_config(folder, sources, stages)))
    return file


def test_plan_prints_the_ledger_to_be(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(config_file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [stage["samples"] for stage in rows["stages"]] == [80, 40]
    assert {row["source"]: row["samples"] for row in rows["stages"][1]["sources"]} == {"code": 4, "text": 36}
    assert plan.main([str(config_file)]) == 0
    shown = capsys.readouterr().out
    assert "one" in shown and "Learning rate" in shown and "50.00%" not in shown
    assert plan.main([str(config_file), "--detail"]) == 0
    assert "50.00%" in capsys.readouterr().out


def test_plan_needs_no_torch(config_file: Path) -> None:
    code = (
        "import sys; from megatron.commands.plan import main; code = main([sys.argv[1]]); "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config_file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_M3_inspect_data_is_a_witness(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data.main([str(config_file), "--samples", "0:120", "--jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sample"] for row in rows] == list(range(120))
    assert set(rows[0]) == {"sample", "stage", "source", "epoch", "epochs", "pieces"}
    assert all(sum(end - start for _, start, end in row["pieces"]) == 16 for row in rows)
    assert inspect_data.main([str(config_file), "--samples", "77:85", "--jsonl"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows[77:85]
    assert inspect_data.main([str(config_file), "--samples", "3:4"]) == 0
    assert "documents" in capsys.readouterr().out


def checkpoint(folder: Path, config_file: Path, samples: int, **change: Any) -> Path:
    from megatron.config.load import load_config

    run = resolve_run(load_config(config_file, [f"{key}={value}" for key, value in change.items()]))
    stream = run.stream()
    while stream.consumed_samples < samples:
        stream.next_batch()
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"data": stream.ledger.to_json()}))
    (folder / "manifest.json").write_bytes(manifest_bytes(build_manifest(folder, samples // 4, keep_forever=False)))
    return folder


def test_ledger_show_and_diff(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = checkpoint(tmp_path / "run" / "checkpoints" / "step-000000020", config_file, 80)
    late = checkpoint(tmp_path / "run" / "checkpoints" / "step-000000025", config_file, 100)
    assert ledger.main(["show", str(tmp_path / "run"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["consumed_samples"] == 100
    assert all(abs(row["error"]) < 1 for row in record["rows"])
    assert ledger.main(["show", str(early)]) == 0
    assert "epochs of" in capsys.readouterr().out
    assert ledger.main(["diff", str(late), str(late)]) == 0
    assert ledger.main(["diff", str(tmp_path / "run")]) == 5
    assert "+18" in capsys.readouterr().out


def test_plan_checks_an_edited_config_against_a_run(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "step", config_file, 88)
    assert plan.main([str(config_file), "--ledger", str(folder), "--set", "stages.two.samples=60"]) == 0
    argv = [str(config_file), "--ledger", str(folder), "--set", "stages.one.mixture={text=1}"]
    assert run_command(plan.main, argv) == 5
    assert "stage 'one': its weights were {code 0.5, text 0.5} and are now {text 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--samples", "5"], 2, "write A:B"),
        (["--samples", "900:901"], 2, "samples 0 to 119"),
        (["--at", "9B tokens"], 2, "samples 0 to 119"),
        (["--documents", "tex"], 2, "there are: code, text"),
        (["--documents", "text:900:"], 2, "documents 0 to 59"),
        (["--set", "tokenizer.path=nothing.model", "--text"], 3, "nothing.model"),
        (["--set", "sources.code.data=['nowhere']"], 3, "nowhere"),
    ],
)
def test_B1_inspect_data_names_what_is_wrong(
    config_file: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str
) -> None:
    assert run_command(inspect_data.main, [str(config_file), *argv]) == code
    assert words in capsys.readouterr().err


def test_B1_a_ledger_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(ledger.main, ["show", str(tmp_path / "nothing")]) == 4
    assert "no such folder" in capsys.readouterr().err


def test_C1_a_damaged_ledger_is_passed_over_loudly(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "run" / "checkpoints" / "step-000000020", config_file, 80)
    late = checkpoint(tmp_path / "run" / "checkpoints" / "step-000000025", config_file, 100)
    state = late / "state.json"
    state.write_text(state.read_text().replace("100", "101", 1))
    assert run_command(ledger.main, ["show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "step-000000025" in shown.err and "80 samples" in shown.out
    assert run_command(ledger.main, ["show", str(late)]) == 4
