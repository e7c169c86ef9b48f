"""The private SLURM itself: several beside each other, a lost node, and nothing left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import SlurmCluster, skip_without_slurm

pytestmark = pytest.mark.long

SCRIPT = "#!/bin/sh\n#SBATCH --nodes=2 --ntasks-per-node=2 --requeue\nsrun sh -c 'echo $SLURM_PROCID; sleep 300'\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    skip_without_slurm()
    path = tmp_path / "job.sbatch"
    path.write_text(SCRIPT)
    return path


def with_variable(name: str, value: str) -> list[int]:
    """Processes of this machine that have it in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{name}={value}".encode() in variables and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.1)


def test_two_run_beside_each_other_and_leave_nothing(script: Path, tmp_path: Path) -> None:
    with SlurmCluster(tmp_path / "a") as first, SlurmCluster(tmp_path / "b", gpus_per_node=2) as second:
        words = ("--output=/dev/null",)
        jobs = [(first, first.sbatch(script, *words)), (second, second.sbatch(script, *words, "--gpus-per-node=2"))]
        for cluster, job in jobs:
            assert cluster.wait(job, 60, ("RUNNING",)) == "RUNNING"
        until(lambda: all(len(cluster.tasks(job)) == 4 for cluster, job in jobs))
        assert not set(first.processes()) & set(second.processes())
        assert set(first.tasks(jobs[0][1])) == {0, 1, 2, 3}
        assert sorted(first.processes()) == sorted([*first.processes("node1"), *first.processes("node2")])
    for cluster in (first, second):
        assert not cluster.processes() and not with_variable("SLURM_CONF", cluster.env["SLURM_CONF"])


@pytest.mark.soak
def test_a_lost_node_is_down_and_its_job_starts_again(script: Path, tmp_path: Path) -> None:
    with SlurmCluster(tmp_path / "a", nodes=3, node_timeout=6) as cluster:
        job = cluster.sbatch(script, "--output=/dev/null")
        cluster.wait(job, 60, ("RUNNING",))
        lost = cluster.job(job)["BatchHost"]
        cluster.lose_node(lost)
        assert not cluster.processes(lost)
        until(lambda: cluster.job(job)["Restarts"] == "1" and cluster.state(job) == "RUNNING")
        assert lost not in cluster.scontrol("show", "hostnames", cluster.job(job)["NodeList"]).split()


def test_without_its_programs_tests_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.cluster._program", lambda name: None if name == "munged" else f"/usr/bin/{name}")
    with pytest.raises(pytest.skip.Exception, match=r"no munged .*apt-get install slurm-wlm munge"):
        skip_without_slurm()
