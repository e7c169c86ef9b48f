"""Small studies with real data, run by real processes whose commands are stand-ins; and what they left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from made_runs import write_corpus
from study.made_studies import BASE, write

from megatron.study.node_config import end_checkpoint, node_folder, node_words, write_node
from megatron.study.node_state import trained_checkpoint
from megatron.study.plan import PlannedStudy, plan_study
from megatron.study.study_record import read_record, write_record

SCRIPT = Path(__file__).with_name("stand_in_study.py")
LR = {"peak": Decimal("0.001"), "shape": "cosine", "final": Decimal("0.0001"), "horizon": "200 steps"}
ARMS: dict[str, Any] = {
    "text": {"stages": ["init", "on"]},
    "code": {"stages": ["init", "code"]},
    "more": {"from": "text/on", "stages": ["code"]},
    "soup": {"stages": [{"name": "soup", "average": ["text/on", "code/code"], "weights": [2, 1]}]},
}
STAGES: dict[str, Any] = {
    "init": {"steps": 12, "mixture": {"web": 1, "python": 1}, "lr": LR},
    "on": {"steps": 9, "mixture": {"web": 3, "python": 1}},
    "code": {"steps": 8, "mixture": {"python": 1}},
}


def make_study(folder: Path, arms: Mapping[str, Any] = ARMS, stages: Mapping[str, Any] = STAGES, **over: Any) -> Path:
    """A study whose output is `folder/out`, over two sources that are in `folder/data`."""
    folder.mkdir(exist_ok=True)
    data = folder / "data"
    if not data.exists():
        write_corpus(data / "web", 400, 1)
        write_corpus(data / "python", 300, 2)
    sources = {
        "web": {"data": [str(data / "web")], "max_epochs": 9},
        "python": {"data": [str(data / "python")], "group": "code", "max_epochs": 9},
    }
    head = {"name": "made", "output": str(folder / "out"), "seeds": [7], "baseline": next(iter(arms))}
    base = BASE | {"sources": sources, "checkpoint": {"every": 4, "keep": 2}}
    tables = {"study": head, "base": base, "stages": dict(stages), "arms": dict(arms)} | over
    return write(folder, tables)


def changed(**stages: dict[str, Any]) -> dict[str, Any]:
    """STAGES with other values, and others."""
    return {name: {**words, **stages.get(name, {})} for name, words in STAGES.items()} | {
        name: words for name, words in stages.items() if name not in STAGES
    }


class StudyProcess:
    """`stagemix study WORDS…` in a process of its own."""

    def __init__(self, folder: Path, *words: str, step: float = 0.0, fault: str = "") -> None:
        environment = {**os.environ, "STAND_IN_STEP": str(step), "STAND_IN_FAULT": fault, "OMP_NUM_THREADS": "1"}
        roots = [str(SCRIPT.parents[2]), str(SCRIPT.parents[1])]
        environment["PYTHONPATH"] = os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])
        self.log = folder / f"study-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *words], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )

    def wait(self, seconds: float = 120) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal to it alone."""
        self.process.send_signal(number)

    def __enter__(self) -> StudyProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(folder: Path, *words: str, step: float = 0.0, fault: str = "") -> tuple[int, str]:
    """`stagemix study WORDS…` to its end: (exit code, what it printed)."""
    with StudyProcess(folder, *words, step=step, fault=fault) as process:
        code = process.wait()
    return code, process.said


def train_here(study: Path, only: Collection[str] = (), seeds: Sequence[int] = ()) -> PlannedStudy:
    """Trains and averages a study, or what some arms need, in this process, by the same stand-ins; records it."""
    from study.stand_in_commands import main

    planned = plan_study(study, only, seeds)
    write_record(planned, read_record(planned))
    for name in planned.graph.nodes:
        if trained_checkpoint(planned, name) is None:
            write_node(planned, name)
            assert main(node_words(planned, name)) == 0, name
    return planned


def until(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.02)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Rows of a node's metrics, whole lines."""
    path = folder / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def all_rows(output: Path) -> int:
    """How many steps all nodes have in their metrics."""
    return sum(len(rows(node)) for node in nodes_in(output))


def nodes_in(output: Path) -> list[Path]:
    """Folders of nodes."""
    return sorted(path for path in (output / "nodes").glob("*") if len(path.name) == 16)


def children_of(pid: int) -> list[int]:
    """Processes that a process of this host has started and that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z" and int(words[1]) == pid:
            found.append(int(path.parent.name))
    return found


def state_at_end(planned: PlannedStudy, name: str) -> dict[str, Any]:
    """state.json of a node's last checkpoint."""
    state: dict[str, Any] = json.loads((end_checkpoint(planned, name) / "state.json").read_text())
    return state


def results_of(study: Path) -> dict[str, str]:
    """By node what its weights and its order of samples came to."""
    planned = plan_study(study)
    states = {name: state_at_end(planned, name) for name in planned.graph.nodes}
    return {name: f"{state['weights']} {state['data']['order']}" for name, state in states.items()}


def check_trained_once(study: Path) -> None:
    """Law: by their ledgers the nodes together were trained on as many tokens as the plan says, and every step of every
    node stands once in its metrics."""
    planned = plan_study(study)
    tokens = 0
    for name, node in planned.graph.nodes.items():
        if node.kind != "train":
            continue
        stages = state_at_end(planned, name)["data"]["stages"]
        folder = node_folder(planned, name).path
        steps = [row["step"] for row in rows(folder)]
        first, last = node.step.stage.start_step + 1, node.step.stage.end_step  # type: ignore[union-attr]
        assert steps == list(range(first, last + 1)), folder
        length = 16  # of every sample here
        tokens += stages[-1]["samples"] * length
        assert sum(row["tokens"] for row in rows(folder)) == stages[-1]["samples"] * length
    assert tokens == planned.graph.trained


def digest(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder, and when each was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in files
    }
