"""Whole runs with padded stages: what they say, that they go on bit for bit, and how they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import CONFIG, curve_of, make_run, rows_of, train

from megatron.commands.frame import run_command
from megatron.commands.inspect_data import main as inspect_data
from megatron.commands.ledger import main as ledger
from megatron.commands.plan import main as plan

pytestmark = pytest.mark.timeout(300)
PADDED = CONFIG.replace('name = "text"\n', 'name = "text"\npacking = "padded"\nseq_length = 48\ntoo_long = "drop"\n')
"""Packed for 8 steps, padded for 6, packed for 10."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, all of its checkpoints kept; `whole.toml` is its config."""
    folder = tmp_path_factory.mktemp("padded")
    done = train(make_run(folder, "whole", PADDED), "--set", "checkpoint.keep=20")
    assert done.returncode == 0, done.stderr
    assert "note: stage 'text': padded, a document a sample: " in done.stdout or "padding" in done.stdout
    return folder


@pytest.mark.parametrize("last", [6, 9, 12, 14])
def test_T2_a_run_that_is_stopped_goes_on_as_if_it_was_not(trained: Path, tmp_path: Path, last: int) -> None:
    """Before the padded stage, within it, at its end."""
    shutil.copytree(trained / "whole", tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > last:
            shutil.rmtree(folder)
    config = tmp_path / "run.toml"
    config.write_text(PADDED.format(output=tmp_path / "run", data=trained / "data"))
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert curve_of(tmp_path / "run") == curve_of(trained / "whole")


def test_rows_and_ledger_say_what_is_padding(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(trained / "whole")
    assert [row["tokens"] for row in rows] == [128] * 8 + [384] * 6 + [128] * 10
    padding = [row.get("padding", 0) for row in rows]
    assert padding[:8] == [0] * 8 and padding[14:] == [0] * 10 and all(padding[8:14])
    for row in rows[8:14]:
        assert row["valid_targets"] == 384 - row["padding"] - 8, "a document's last token has no target"
        spent = row["tokens_per_second"] * row["step_seconds"]
        assert spent == pytest.approx(384 - row["padding"], rel=1e-2)
    assert run_command(ledger, ["show", str(trained / "whole"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    stage = [row for row in shown["rows"] if row["training_stage"] == "text"]
    assert sum(row["padding"] for row in stage) == sum(padding)
    assert sum(row["tokens"] + row["padding"] for row in stage) == 6 * 384
    assert all(row["skipped"] and row["skipped_documents"] for row in stage)
    assert run_command(ledger, ["show", str(trained / "whole")]) == 0
    words = capsys.readouterr().out
    assert f"of these tokens {sum(padding)} are padding (" in words and "skipped documents" in words


def test_the_plan_and_the_witness_show_padded_samples(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(trained / "whole.toml")
    assert run_command(plan, [config]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "text: padded, too_long drop;" in words and "of its tokens are padding (" in words
    assert "longer than 48 tokens left out" in words and "read both packed and padded" in words
    assert run_command(inspect_data, [config, "--samples", "64:112", "--jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row["padded"] and len(row["pieces"]) == 1 and row["pieces"][0][1] == 0 for row in rows)
    assert run_command(inspect_data, [config, "--samples", "64:66", "--pieces"]) == 0
    words = capsys.readouterr().out
    assert words.count("begins here, ends here") == words.count("padding from here on") == 2
    assert run_command(inspect_data, [config, "--samples", "64:112", "--summary", "--jsonl"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row["samples"] for row in summary["rows"]] == [44, 4] or [row["samples"] for row in summary["rows"]] == [
        4,
        44,
    ]


def test_long_documents_end_the_command_before_it_trains(tmp_path: Path) -> None:
    config = make_run(tmp_path, text=PADDED.replace('too_long = "drop"\n', ""))
    done = train(config)
    assert done.returncode == 3 and not (tmp_path / "run" / "checkpoints").exists()
    assert "stage 'text': source 'prose'" in done.stderr and "are longer than a sample of 48 tokens" in done.stderr
    assert 'too_long to "drop" or "truncate"' in done.stderr


def test_ledger_diff_names_the_packing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "cut.toml"
    text = PADDED.replace('"drop"', '"truncate"').format(output=tmp_path / "cut", data=trained / "data")
    config.write_text(text)
    assert train(config, "--set", "checkpoint.keep=20").returncode == 0
    assert run_command(ledger, ["diff", str(trained / "whole"), str(tmp_path / "cut")]) == 5
    words = " ".join(capsys.readouterr().out.split())
    assert "stage 'text': its packing is padded, too_long drop and padded, too_long truncate" in words
    assert "they part at sample 64: stage 'text': padded, too_long drop in A, padded, too_long truncate in B" in words
