"""A study's jobs in a real SLURM: nothing begins before what it goes on from is done, whatever happens to that; a
failure leaves other arms alone; nothing is submitted twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import ENDED, SlurmCluster, skip_without_slurm
from study.made_studies import stage, tables, write
from tiny_run import curve_of, rows_of, write_corpus

from megatron.study.plan import plan_study

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
LIMIT = 400
"""Seconds, for any wait: a machine with other work is slow, and nothing is asserted of times."""
PROGRAM = """#!/bin/bash
# evaluates and reports nothing, and leaves no results: writes down that it was asked to, and when
case "$1 $2" in
"study evaluate") date +%s.%N >> "$STUDY/evaluated-$5"; sleep 1 ;;
"study report") date +%s.%N >> "$STUDY/reported" ;;
*) exec stagemix "$@" ;;
esac
"""
TRUNK, BRANCH = 8, 6


@pytest.fixture(scope="module")
def cluster(warm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    skip_without_slurm()
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder, nodes=6, kill_wait=60, environment=warm) as running:
        yield running


@dataclass(frozen=True)
class StudyOnCluster:
    """A study of two arms that share a trunk, one of them a step longer, and an average of their ends."""

    cluster: SlurmCluster
    path: Path
    program: Path

    @property
    def output(self) -> Path:
        return self.path.parent / "runs" / self.path.stem

    def ids(self) -> dict[str, str]:
        """Ids of nodes by their label."""
        here = Path.cwd()
        os.chdir(self.path.parent)
        try:
            return {node.label: name for name, node in plan_study(self.path).graph.nodes.items()}
        finally:
            os.chdir(here)

    def submit(self, *words: str, pace: str = "0.1") -> str:
        """By the command line; what it said."""
        options = ("--nodes=1", "--tasks-per-node=2", "--cpu", "--time=60", "--lead=20", f"--program={self.program}")
        variables = (f"--env=TEST_STEP_SECONDS={pace}", f"--env=STUDY={self.output}")
        said = ("stagemix", "study", "run", str(self.path), "--slurm", *options, *variables, *words)
        return self.cluster.run("sh", "-c", f'cd {self.path.parent} && exec "$@"', "-", *said, seconds=240)

    def noted(self) -> list[dict[str, Any]]:
        """jobs.jsonl."""
        return [json.loads(line) for line in (self.output / "jobs.jsonl").read_text().splitlines()]

    def jobs(self) -> dict[tuple[str, str], str]:
        """The newest job of each node's label and task."""
        labels = {name: label for label, name in self.ids().items()}
        return {(labels.get(row["node"], ""), row["task"]): row["job"] for row in self.noted()}

    def folder(self, label: str) -> Path:
        return self.output / "nodes" / self.ids()[label]

    def states(self) -> dict[str, str]:
        """What `study status` says of nodes, by label."""
        said = ("stagemix", "study", "status", str(self.path), "--json")
        shown = self.cluster.run("sh", "-c", f'cd {self.path.parent} && exec "$@"', "-", *said, seconds=240)
        return {row["label"]: row["state"] for row in json.loads(shown)["nodes"]}

    def span(self, label: str) -> list[tuple[float, float]]:
        """From when to when each attempt of a node trained."""
        events = [json.loads(line) for line in (self.folder(label) / "attempts.jsonl").read_text().splitlines()]
        launches = [event["time"] for event in events if event["event"] == "launch"]
        ends = {event["attempt"]: event["time"] for event in events if event["event"] == "end"}
        return [(begin, ends.get(number, begin)) for number, begin in enumerate(launches, 1)]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {LIMIT} seconds\n{self.text()}"
            time.sleep(0.1)

    def ends(self) -> dict[tuple[str, str], str]:
        """Waits for the report, the last of all; states by label and task."""
        jobs = self.jobs()
        state = self.cluster.wait(jobs[("", "report")], LIMIT)
        assert state == "COMPLETED", self.text()
        states = {key: self.cluster.state(job) for key, job in jobs.items()}
        assert set(states.values()) <= set(ENDED), states
        return states

    def text(self) -> str:
        """All that helps to understand a failure."""
        logs = [*self.output.glob("nodes/*/slurm/*.log"), *self.output.glob("slurm/*.log")]
        parts = [f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs]
        return "\n".join([self.cluster.run("squeue", "--states=all", check=False), *parts])


def study_on(cluster: SlurmCluster, folder: Path, name: str) -> StudyOnCluster:
    for number, source in enumerate(("web", "python")):
        if not (folder / f"{source}.bin").exists():
            write_corpus(folder / source, number)
    base = {
        "tokenizer": {"path": "bytes"},
        "model": {"seq_length": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "intermediate_size": 32},
        "sources": {
            "web": {"data": [str(folder / "web")], "group": "text", "max_epochs": 9},
            "python": {"data": [str(folder / "python")], "group": "code", "max_epochs": 9},
        },
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"},
        "kernels": {"product": "torch"},
        "checkpoint": {"every": 3, "keep": 2},
    }  # fmt: skip
    rate = {"peak": 0.01, "horizon": "30 steps"}
    stages = {
        "init": stage(steps=TRUNK, lr=rate, mixture={"web": 0.5, "python": 0.5}),
        "text": stage(steps=BRANCH, mixture={"web": 1}, lr={"start": "current", "shape": "linear", "final": 0.001}),
        "code": stage(steps=BRANCH, mixture={"python": 1}, lr={"start": "current", "shape": "linear", "final": 0.001}),
        "on": stage(steps=3, mixture={"python": 1}, lr={"start": "current", "shape": "linear", "final": 0.0001}),
    }
    arms = {
        "text": {"stages": ["init", "text"]},
        "code": {"stages": ["init", "code", "on"]},
        "soup": {"stages": [{"name": "soup", "average": ["text/text", "code/code"]}]},
    }
    head = {"name": name, "output": f"runs/{name}", "baseline": "text"}
    path = write(folder, tables(arms, stages, base=base, study=head, results={"loss": False}), f"{name}.toml")
    program = folder / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return StudyOnCluster(cluster, path, program)


def job_ids(cluster: SlurmCluster) -> set[str]:
    return set(cluster.run("squeue", "--states=all", "--noheader", "--format=%i").split())


def assert_disjoint(spans: Sequence[tuple[float, float]]) -> None:
    ordered = sorted(spans)
    assert all(one[1] <= two[0] for one, two in zip(ordered, ordered[1:], strict=False)), ordered


def test_branches_begin_when_a_trunk_that_was_requeued_is_done(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The trunk is put back in the queue twice; the curves are those of a study that nothing happened to."""
    quiet, disturbed = (study_on(cluster, tmp_path, name) for name in ("quiet", "disturbed"))
    quiet.submit(pace="0")
    disturbed.submit(pace="0.5")
    jobs, before = disturbed.jobs(), job_ids(cluster)
    trunk = jobs[("init", "train")]
    for restart, step in enumerate((2, 5), 1):
        metrics = disturbed.folder("init") / "metrics.jsonl"
        disturbed.wait(lambda: metrics.exists() and len(rows_of(metrics.parent)) >= step, f"step {step}")  # noqa: B023
        cluster.scontrol("requeue", trunk)
        disturbed.wait(lambda: int(cluster.job(trunk)["Restarts"]) >= restart, f"restart {restart}")  # noqa: B023
        # submitted again while it waits: nothing is, with the record of jobs or without it
        record = (disturbed.output / "jobs.jsonl").rename(tmp_path / f"record-{restart}")
        assert "submitted" not in disturbed.submit(pace="0.5") and job_ids(cluster) == before
        assert cluster.state(jobs[("text", "train")]) == "PENDING" and not (disturbed.output / "jobs.jsonl").exists()
        record.rename(disturbed.output / "jobs.jsonl")
    states = disturbed.ends()
    assert set(states.values()) == {"COMPLETED"}, (states, disturbed.text())
    assert set(quiet.ends().values()) == {"COMPLETED"}, quiet.text()
    done = disturbed.span("init")
    assert len(done) == 3, done
    for label in ("text", "code"):
        assert disturbed.span(label)[0][0] >= done[-1][1]
    for label in ("init", "text", "code", "on"):
        assert curve_of(disturbed.folder(label)) == curve_of(quiet.folder(label))
    steps = [row["step"] for row in rows_of(disturbed.folder("on"))]
    assert steps == list(range(TRUNK + BRANCH + 1, TRUNK + BRANCH + 4))
    (average,) = (disturbed.folder("soup") / "checkpoints").glob("step-*")
    assert average.name == f"step-{TRUNK + BRANCH:09d}"
    reported = float((disturbed.output / "reported").read_text())
    for label in ("text", "on", "soup"):
        (evaluated,) = (disturbed.output / f"evaluated-{disturbed.ids()[label]}").read_text().split()
        assert float(evaluated) + 1 <= reported
    # all is trained: nothing is submitted any more
    assert "nothing is left to do" in disturbed.submit("--no-evaluation")


def test_a_failed_node_takes_its_descendants_alone_and_is_tried_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    study = study_on(cluster, tmp_path, "failing")
    study.submit("--at-once=1")
    first, config = study.jobs(), study.folder("code") / "node.toml"
    config.write_text(config.read_text() + "\nnonsense = [\n")
    states = study.ends()
    assert states[("code", "train")] == "FAILED" and "exit code 2" in study.text()
    assert {key for key, state in states.items() if state == "CANCELLED"} == {
        ("on", "train"), ("on", "evaluate"), ("soup", "average"), ("soup", "evaluate")
    }  # fmt: skip
    for key in (("init", "train"), ("text", "train"), ("text", "evaluate")):
        assert states[key] == "COMPLETED", study.text()
    assert study.states() == {
        "init": "trained", "text": "trained", "code": "failed", "on": "blocked", "soup": "blocked"
    }  # fmt: skip
    kept = curve_of(study.folder("text"))
    study.submit("--at-once=1")
    second = study.jobs()
    again = {key for key in second if second[key] != first[key]}
    left = {key for key, state in states.items() if state != "COMPLETED"}
    assert again == left | {("", "report"), ("text", "evaluate")}  # of which there are no results
    assert set(study.ends().values()) == {"COMPLETED"}, study.text()
    assert curve_of(study.folder("text")) == kept and len(study.span("text")) == 1
    assert_disjoint([span for label in ("init", "text", "code", "on") for span in study.span(label)])


def test_cancelled_and_submitted_again_it_goes_on(cluster: SlurmCluster, tmp_path: Path) -> None:
    study = study_on(cluster, tmp_path, "cancelled")
    study.submit(pace="0.5")
    metrics = study.folder("init") / "metrics.jsonl"
    study.wait(lambda: metrics.exists() and len(rows_of(metrics.parent)) >= 3, "step 3")
    study.submit("--cancel")
    jobs = study.jobs()
    for job in jobs.values():
        cluster.wait(job, LIMIT)
    assert {cluster.state(job) for job in jobs.values()} == {"CANCELLED"}, study.text()
    assert not (study.output / "reported").exists()
    study.submit(pace="0")
    assert set(study.ends().values()) == {"COMPLETED"}, study.text()
    first, second = study.span("init")
    assert first[1] <= second[0]
    rows = rows_of(study.folder("init"))
    assert [row["step"] for row in rows] == list(range(1, TRUNK + 1))


@pytest.mark.soak
def test_a_trunk_that_loses_its_node_is_waited_for(warm: dict[str, str], tmp_path: Path) -> None:
    """SLURM itself puts its job back in the queue; for a moment it has failed, and nobody must take it to be over."""
    with SlurmCluster(tmp_path / "slurm", nodes=3, node_timeout=6, kill_wait=60, environment=warm) as cluster:
        study = study_on(cluster, tmp_path, "lost")
        study.submit(pace="0.5")
        jobs, metrics = study.jobs(), study.folder("init") / "metrics.jsonl"
        trunk = jobs[("init", "train")]
        study.wait(lambda: metrics.exists() and len(rows_of(metrics.parent)) >= 4, "step 4")
        cluster.lose_node(cluster.job(trunk)["BatchHost"])
        study.wait(lambda: cluster.job(trunk)["Restarts"] == "1", "restart 1")
        assert set(study.ends().values()) == {"COMPLETED"}, study.text()
        spans = {label: study.span(label) for label in ("init", "text", "code")}
        assert [len(span) for span in spans.values()] == [2, 1, 1]
        assert all(spans[label][0][0] >= spans["init"][-1][1] for label in ("text", "code"))


@pytest.mark.soak
def test_with_real_evaluations_it_ends_in_the_report(cluster: SlurmCluster, tmp_path: Path) -> None:
    study = study_on(cluster, tmp_path, "whole")
    study.path.write_text(study.path.read_text().replace('"loss" = false', '"loss" = true'))
    study.submit("--program=stagemix", pace="0")
    assert set(study.ends().values()) == {"COMPLETED"}, study.text()
    assert (study.output / "report" / "index.html").is_file()
    assert {label for label, state in study.states().items() if state == "evaluated"} == {"text", "on", "soup"}
    assert "nothing is left to do" in study.submit()
