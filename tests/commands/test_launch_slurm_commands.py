"""`stagemix launch_slurm … -- COMMAND`: shards and their merge, arrays over models, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from batch_stand_ins import directives, submissions, submitting_stand_ins

from megatron.commands.frame import run_command
from megatron.commands.launch_slurm import main


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch and squeue that write down what they get; the folder in which they do."""
    folder = submitting_stand_ins(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run_command(main, list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said


def test_shards_and_their_merge(tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "data" / "code"
    words = [
        "preprocess_data",
        "--input",
        "a b.jsonl",
        "--output-prefix",
        str(prefix),
        "--tokenizer",
        "bytes",
        "--keep-parts",
    ]
    assert run_command(main, ["--array", "0-31%8", "--time", "4:00:00", "--cpus-per-task", "4", "--", *words]) == 0
    folder = tmp_path / "data" / "code.slurm"
    shards, merge = folder / "0001-preprocess_data.sbatch", folder / "0001-merge_data.sbatch"
    wait = ["--kill-on-invalid-dep=yes", "--dependency=afterok:101"]
    assert submissions(cluster) == [["--parsable", str(shards)], ["--parsable", *wait, str(merge)]]
    text = shards.read_text()
    assert directives(text)["array"] == "0-31%8" and '--shard "$((SLURM_ARRAY_TASK_ID + 1))/32"' in text
    assert f"merge_data --output-prefix {prefix} --keep-parts &" in merge.read_text()
    assert "array" not in directives(merge.read_text())
    # those that are missing, by themselves
    assert run_command(main, ["--array", "3,7", "--shards", "32", "--time", "60", "--", *words]) == 0
    assert len(submissions(cluster)) == 3
    assert '--shard "$SLURM_ARRAY_TASK_ID/32"' in (folder / "0002-preprocess_data.sbatch").read_text()


BAD_COMMANDS = {
    "nothing": (["--time", "9", "--"], "preprocess_data"),
    "unknown": (["--time", "9", "--", "exporthf"], "did you mean 'export_hf'"),
    "train": (["--time", "9", "--", "train", "x"], "CONFIG"),
    "shard": (["--time", "9", "--", "preprocess_data", "--input", "a", "--output-prefix", "p", "--tokenizer", "bytes",
               "--shard", "1/2"], "--shard 1/2"),
    "gaps": (["--array", "1,3", "--time", "9", "--", "preprocess_data", "--input", "a", "--output-prefix", "p",
              "--tokenizer", "bytes"], "--shards N"),
    "same": (["--over", "a", "--time", "9", "--", "export_hf", "--input", "a", "--output", "b"], "{item}"),
    "same output": (["--over", "a", "--time", "9", "--", "export_hf", "--input", "{item}", "--output", "b"], "{name}"),
    "same names": (["--over", "a/x", "--over", "b/x", "--time", "9", "--", "export_hf", "--input", "{item}", "--output",
                    "out/{name}"], "'x'"),
    "array without task": (["--array", "0-3", "--time", "9", "--", "evaluate", "--model", "a"], "{task}"),
    "no time": (["--", "export_hf", "--input", "a", "--output", "b"], "--time"),
    "nodes": (["--nodes", "2", "--time", "9", "--", "export_hf"], "one node"),
    "config": (["run.toml", "--time", "9", "--", "export_hf"], "CONFIG is for training"),
}  # fmt: skip


@pytest.mark.parametrize("words, expected", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_commands_that_cannot_be_launched(
    words: list[str], expected: str, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *words)
    assert not submissions(cluster)


def test_exports_of_several_models(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["export_hf", "--input", "{item}", "--output", "exports/{name}"]
    assert (
        run_command(main, ["--over", "runs/a", "--over", "runs/b", "--at-once", "1", "--time", "90", "--", *words]) == 0
    )
    script = (tmp_path / "exports" / "slurm" / "0001-export_hf.sbatch").read_text()
    assert directives(script)["array"] == "0-1%1" and "[1]=runs/b" in script
    assert "signal" not in directives(script)  # it does not resume by itself
