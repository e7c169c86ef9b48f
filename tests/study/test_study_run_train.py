"""`stagemix study run` with the real `train`: killed twice, it comes to the same weights, each step trained once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from study.run_studies import LR, all_rows, check_trained_once, children_of, make_study, rows, until

from megatron.launch.living_run import is_alive
from megatron.study.node_config import end_checkpoint, node_folder
from megatron.study.plan import plan_study

pytestmark = pytest.mark.soak
ARMS: dict[str, Any] = {
    "text": {"stages": ["init", "on"]},
    "code": {"stages": ["init", "code"]},
    "soup": {
        "stages": [
            {"name": "soup", "average": ["text/on", "code/code"], "weights": [2, 1]},
            {"use": "code", "name": "tail", "take": {"optimizer": "fresh"}},
        ]
    },
}
STAGES: dict[str, Any] = {
    "init": {"steps": 200, "mixture": {"web": 1, "python": 1}, "lr": LR | {"horizon": "500 steps"}},
    "on": {"steps": 100, "mixture": {"web": 3, "python": 1}},
    "code": {"steps": 100, "mixture": {"python": 1}},
}


def start(folder: Path, study: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "megatron.commands.cli", "study", "run", str(study), "--no-evaluation"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with open(folder / "study.log", "ab") as log:
        return subprocess.Popen([*words, "--threads", "1"], cwd=folder, env=environment, stdout=log, stderr=log)


def weights(study: Path) -> dict[str, list[bytes]]:
    """Of each node, the tensors of its last checkpoint, as files."""
    planned = plan_study(study)
    return {
        name: [path.read_bytes() for path in sorted((end_checkpoint(planned, name) / "model").glob("*.safetensors"))]
        for name in planned.graph.nodes
    }


def test_killed_twice_it_comes_to_the_same_weights(tmp_path: Path) -> None:
    quiet, beaten = tmp_path / "quiet", tmp_path / "beaten"
    studies = {folder: make_study(folder, ARMS, STAGES) for folder in (quiet, beaten)}
    assert start(quiet, studies[quiet]).wait(300) == 0, (quiet / "study.log").read_text()
    study, output = studies[beaten], beaten / "out"
    with start(beaten, study) as process:
        until(lambda: all_rows(output) >= 50, "fifty steps", 120)
        orphans = children_of(process.pid)
        process.kill()
    until(lambda: not any(is_alive(pid) for pid in orphans), "orphans save and stop", 120)
    with start(beaten, study) as process:
        until(lambda: all_rows(output) >= 230, "into the branches", 180)
        victims = [pid for pid in children_of(process.pid) if is_alive(pid)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(120) == 137 and victims
    assert start(beaten, study).wait(300) == 0, (beaten / "study.log").read_text()
    check_trained_once(study)
    found = weights(study)
    assert found == weights(studies[quiet]) and all(found.values())
    planned = plan_study(study)
    lost = [
        row for name in planned.graph.nodes for row in rows(node_folder(planned, name).path, "metrics.discarded.jsonl")
    ]
    assert len({(row["step"], row["training_stage"]) for row in lost}) == len(lost)  # never more than once
