"""A tiny run as SLURM jobs, by our launcher or our example of a batch script: its config, waiting for events, and what
must hold at its end: the curve of a run that nothing happened to."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.cluster import ENDED, SlurmCluster
from tiny_run import CONFIG, ROOT, curve_of, make_run, rows_of

STEPS = 24
TEXT = (
    CONFIG
    + """
[parallel]
tensor = 2

[kernels]
product = "torch"
"""
)
"""tiny_run's at tensor 2. The product is named, since each run would choose it by a measurement."""
EXAMPLE = ROOT / "examples" / "slurm" / "pretrain.sbatch"


@dataclass(frozen=True)
class TrainingJob:
    """One run in one job of a cluster."""

    cluster: SlurmCluster
    config: Path
    id: str

    @property
    def output(self) -> Path:
        """The run's folder."""
        return self.config.with_suffix("")

    @property
    def log(self) -> Path:
        """What the job printed, over all its starts."""
        return self.output / "slurm" / f"{self.id}.log"

    def text(self) -> str:
        """All that helps to understand a failure."""
        job = self.cluster.job(self.id)
        log = self.log.read_text() if self.log.exists() else ""
        shown = [line for line in log.splitlines() if not line.startswith(("  ", "#"))]
        files = [self.output / name for name in ("exit.json", "attempts.jsonl", "bad_nodes.json")]
        records = [path.read_text() for path in files if path.exists()]
        return "\n".join([str(job), *shown[-150:], *records, self.cluster.log(self.id)])

    def step(self) -> int:
        """The last step in metrics.jsonl; 0 where there is none."""
        path = self.output / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return max((row["step"] for row in whole if "loss" in row), default=0)

    def until_step(self, step: int, seconds: float = 120) -> None:
        """Waits for a step. It must be running, or about to, and not yet done."""
        end = time.monotonic() + seconds
        while self.step() < step:
            assert self.cluster.state(self.id) not in ENDED, self.text()
            assert time.monotonic() < end, f"step {step} did not come within {seconds} seconds\n{self.text()}"
            time.sleep(0.05)
        assert self.step() < STEPS, f"the run was over before anything could happen to it\n{self.text()}"

    def attempts(self) -> list[dict[str, Any]]:
        """Events of attempts.jsonl."""
        return [json.loads(line) for line in (self.output / "attempts.jsonl").read_text().splitlines()]

    def ends(self) -> list[tuple[int | None, str]]:
        """(exit code, reason) of each attempt; (None, "") of one that left no record of its end."""
        found: dict[int, tuple[int | None, str]] = {}
        for event in self.attempts():
            end = (event["code"], event["reason"]) if event["event"] == "end" else (None, "")
            found[event["attempt"]] = end
        return [found[attempt] for attempt in sorted(found)]

    def until_start(self, restarts: int, seconds: float = 120) -> None:
        """Waits for the job to run for the so-many-th time, counted from 0."""
        end = time.monotonic() + seconds
        while (job := self.cluster.job(self.id))["JobState"] != "RUNNING" or int(job["Restarts"]) < restarts:
            assert time.monotonic() < end, f"no restart {restarts} within {seconds} seconds\n{self.text()}"
            time.sleep(0.1)

    def completes(self, seconds: float = 120) -> None:
        """Waits for the end, which must be a good one."""
        state = self.cluster.wait(self.id, seconds)
        assert state == "COMPLETED", self.text()


def write_config(folder: Path, name: str, text: str = TEXT) -> Path:
    """The config of a run `name` under `folder`, whose runs share corpora."""
    return make_run(folder, name, text)


def submit_example(cluster: SlurmCluster, config: Path, *options: str, pace: str = "0.2") -> TrainingJob:
    """The run by the batch script that people adapt who want no launcher: adapted by sbatch's options."""
    output = config.with_suffix("")
    log = output / "slurm" / "%j.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sizes = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--time=60")
    words = [*sizes, f"--output={log}", f"--export=ALL,TEST_STEP_SECONDS={pace}", *options]
    return TrainingJob(cluster, config, cluster.sbatch(EXAMPLE, *words, arguments=(str(config), str(output))))


def launch(
    cluster: SlurmCluster,
    config: Path,
    *options: str,
    pace: str = "0.2",
    fault: str = "",
    program: Sequence[str] = ("--program=stagemix",),
) -> TrainingJob:
    """The run by `stagemix launch_slurm`. options: the launcher's, besides two nodes, two processes and an hour."""
    sizes = ("--nodes=2", "--tasks-per-node=2", "--cpu", "--time=60", "--lead=20", *program)
    variables = (f"--env=TEST_STEP_SECONDS={pace}", f"--env=TEST_FAULT={fault}")
    said = cluster.run("stagemix", "launch_slurm", str(config), *sizes, *variables, *options, seconds=240)
    found = re.search(r"submitted (\d+)", said)
    assert found, said
    return TrainingJob(cluster, config, found[1])


# What must hold


def data_position(output: Path) -> dict[str, Any]:
    """The ledger's state in the last checkpoint: it says which samples were taken, and in which order."""
    newest = max((output / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == STEPS
    position: dict[str, Any] = state["data"]
    return position


def run_ids(output: Path) -> set[str]:
    """Run ids of all checkpoints."""
    return {json.loads((path / "state.json").read_text())["run_id"] for path in (output / "checkpoints").glob("step-*")}


def assert_whole(output: Path) -> None:
    """Every step once, in order; samples and tokens count up; one run id."""
    rows = rows_of(output)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["consumed_samples"] for row in rows] == [8 * step for step in range(1, STEPS + 1)]
    assert len(run_ids(output)) == 1


def assert_same(output: Path, undisturbed: Path) -> None:
    """Bit for bit the same losses, gradient norms, rates and batches, and the same position in the data."""
    assert_whole(output)
    assert curve_of(output) == curve_of(undisturbed)
    assert data_position(output) == data_position(undisturbed)


def assert_close(output: Path, undisturbed: Path, tolerance: float = 1e-5) -> float:
    """The same batches, and losses within a tolerance, as on other layouts; the largest relative difference."""
    assert_whole(output)
    ours, theirs = rows_of(output), rows_of(undisturbed)
    for name in ("batch_digest", "samples_by_source", "valid_targets", "training_stage", "lr"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    assert data_position(output) == data_position(undisturbed)
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in ("loss", "grad_norm")]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    assert math.isfinite(worst) and worst <= tolerance, worst
    return worst
