"""Whatever SLURM does to a run, it ends with the curve and the order of samples of one that was left alone.

All scenarios are played at the same time, each on nodes of its own: they mostly wait.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm.cluster import ENDED, SlurmCluster, skip_without_slurm
from slurm.jobs import TEXT, TrainingJob, assert_close, assert_same, assert_whole, launch, submit_example, write_config

pytestmark = pytest.mark.long

NODES = 22
LIMIT = 600
"""Seconds, for any wait of any scenario: a machine with other work is slow, and nothing is asserted of times."""


@pytest.fixture(
    params=[
        pytest.param(("warm", False), marks=pytest.mark.timeout(900)),
        pytest.param(("python_of_jobs", True), marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
    ids=["forked", "started"],
)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    skip_without_slurm()
    python, slow = request.param
    environment = request.getfixturevalue(python)
    with SlurmCluster(tmp_path / "slurm", nodes=NODES, kill_wait=60, environment=environment) as cluster:
        yield Stage(cluster, tmp_path, slow)


class Stage:
    """Where scenarios are played. folder: of their runs, which share corpora. slow: starts of jobs take their time, so
    that what needs wall time is given more."""

    def __init__(self, cluster: SlurmCluster, folder: Path, slow: bool = False) -> None:
        self.cluster, self.folder, self.slow = cluster, folder, slow

    def only(self, *numbers: int) -> str:
        """The option, sbatch's and the launcher's, that keeps a job on these nodes. They are not asked for by name, so
        that bad ones among them may be left out."""
        others = [f"node{number}" for number in range(1, NODES + 1) if number not in numbers]
        return f"--exclude={','.join(others)}"

    def config(self, name: str, health: str = "") -> Path:
        """The config of a run, with this line in [health]; the one that is there already, where it is."""
        path = self.folder / f"{name}.toml"
        return path if path.exists() else write_config(self.folder, name, f"{TEXT}\n[health]\n{health}\n")


def undisturbed(stage: Stage) -> TrainingJob:
    job = submit_example(stage.cluster, stage.config("undisturbed"), stage.only(1, 2), pace="0")
    job.completes(LIMIT)
    assert_whole(job.output)
    return job


def requeued_killed_and_preempted(stage: Stage) -> TrainingJob:
    """One run suffers four ends in a row."""
    cluster, job = stage.cluster, launch(stage.cluster, stage.config("events"), stage.only(3, 4))
    job.until_step(3, LIMIT)
    cluster.scontrol("requeue", job.id)
    job.until_start(1, LIMIT)
    job.until_step(8, LIMIT)
    cluster.run("scancel", "--signal=KILL", f"{job.id}.0")  # the step, not the job
    job.until_start(2, LIMIT)
    job.until_step(13, LIMIT)
    os.kill(cluster.tasks(job.id)[3], signal.SIGKILL)
    job.until_start(3, LIMIT)
    job.until_step(17, LIMIT)
    urgent = stage.folder / "urgent.sbatch"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    both = ("--nodelist=node3,node4", "--ntasks-per-node=2", "--output=/dev/null")
    other = cluster.sbatch(urgent, "--partition=urgent", *both)
    job.until_start(4, LIMIT)
    assert cluster.state(other) == "COMPLETED"
    job.completes(LIMIT)
    requeued, killed, lost, preempted, done = job.ends()
    assert (requeued[0], killed[0], preempted[0], done[0]) == (75, None, 75, 0), job.text()
    assert lost[0] == 10 and "node4" in lost[1], job.text()  # the kill of one process, told by another
    return job


def warned_before_the_time_is_over(stage: Stage) -> TrainingJob:
    """By --signal, and by nothing else: the run itself looks at the end that the limit had when it began."""
    cluster, config = stage.cluster, stage.config("warned", "end_margin_seconds = 5")
    pace = "5:0" if stage.slow else "1.6:0"
    job = submit_example(cluster, config, stage.only(5, 6), "--signal=B:USR1@25", pace=pace)
    job.until_step(2, LIMIT)
    while int((hms := cluster.job(job.id)["RunTime"])[-2:]) > 20:  # the new limit is a minute of which 40 s are left
        time.sleep(1)
    hours, minutes, _ = hms.split(":")
    # SLURM looks at limits twice a minute.
    cluster.scontrol("update", f"JobId={job.id}", f"TimeLimit={60 * int(hours) + int(minutes) + 1}")
    job.until_start(1, LIMIT)
    cluster.scontrol("update", f"JobId={job.id}", "TimeLimit=60")
    job.completes(LIMIT)
    assert job.ends() == [(75, "SIGUSR1"), (0, "complete")], job.text()
    return job


def stops_by_itself_in_time(stage: Stage) -> TrainingJob:
    """No signal comes: the lead is shorter than the margin that the run keeps free."""
    config, minutes, pace = stage.config("in-time", "end_margin_seconds = 60"), 2, "2.4:0"
    if stage.slow:
        minutes, pace = 4, "8:0"
    job = launch(stage.cluster, config, stage.only(7, 8), f"--time={minutes}", "--lead=1", pace=pace)
    job.completes(LIMIT)
    assert [code for code, _ in job.ends()] == [75, 0], job.text()
    assert job.ends()[0][1] == "wall time", job.text()
    return job


def at_two_one_and_two_nodes(stage: Stage) -> TrainingJob:
    """And at other layouts: tensor 2 x data 2, data 2, tensor 2 x data 2."""
    one = ("--nodes=1", "--set=parallel.tensor=1")
    for options, step in (((), 5), (one, 13)):
        job = launch(stage.cluster, stage.config("sizes"), stage.only(9, 10), *options)
        job.until_step(step, LIMIT)
        (job.output / "stop-now").touch()
        assert stage.cluster.wait(job.id, LIMIT) == "FAILED", job.text()
        assert stage.cluster.job(job.id)["ExitCode"] == "75:0"
    job = launch(stage.cluster, stage.config("sizes"), stage.only(9, 10))
    job.completes(LIMIT)
    assert [code for code, _ in job.ends()] == [75, 75, 0], job.text()
    return job


def loses_the_node_of_its_script(stage: Stage) -> TrainingJob:
    """Nobody is left to requeue it but SLURM, once it takes the node for down."""
    cluster, job = stage.cluster, launch(stage.cluster, stage.config("node-lost"), stage.only(11, 12))
    job.until_step(7, LIMIT)
    lost = cluster.job(job.id)["BatchHost"]
    cluster.lose_node(lost)
    end = time.monotonic() + LIMIT
    while "DOWN" not in cluster.scontrol("show", "node", lost):
        assert cluster.state(job.id) not in ENDED and time.monotonic() < end, job.text()
        time.sleep(0.5)
    cluster.start_node(lost)
    job.completes(LIMIT)
    assert int(cluster.job(job.id)["Restarts"]) >= 1
    assert job.ends()[-1] == (0, "complete")
    return job


def leaves_out_a_bad_node(stage: Stage) -> TrainingJob:
    """One of three nodes kills a process whenever it is used, some steps after the start."""
    job = launch(stage.cluster, stage.config("bad-node"), stage.only(13, 14, 15), fault="node13:5:kill")
    job.completes(LIMIT)
    shown = stage.cluster.job(job.id)
    assert "node13" in expanded(stage.cluster, shown["ExcNodeList"]), job.text()
    assert set(expanded(stage.cluster, shown["NodeList"])) == {"node14", "node15"}
    assert shown["Restarts"] == "2", job.text()  # it is left out after a second failure
    return job


def fails_and_is_cancelled(stage: Stage) -> TrainingJob:
    """What would come again, and what a user ends, is not started again by itself; by hand it goes on."""
    cluster, config, nodes = stage.cluster, stage.config("ended"), stage.only(16, 17)
    job = launch(cluster, config, nodes, fault="node17:7:raise")
    assert cluster.wait(job.id, LIMIT) == "FAILED", job.text()
    shown = cluster.job(job.id)
    assert (shown["ExitCode"], shown["Restarts"]) == ("1:0", "0"), job.text()
    assert (
        job.log.read_text().count("[rank 3 on node17] ValueError: planted in one rank") == 1
    )  # and nobody else shows it
    assert "[rank 3 on node17] Traceback" in job.log.read_text()
    job = launch(cluster, config, nodes)
    job.until_step(14, LIMIT)
    cluster.run("scancel", job.id)
    assert cluster.wait(job.id, LIMIT) == "CANCELLED", job.text()
    assert cluster.job(job.id)["Restarts"] == "0"
    job = launch(cluster, config, nodes)
    job.completes(LIMIT)
    assert [code for code, _ in job.ends()] == [1, 75, 0], job.text()
    return job


def loses_another_node(stage: Stage) -> TrainingJob:
    """Its own script is left, and does not wait for SLURM to find out."""
    cluster, job = stage.cluster, launch(stage.cluster, stage.config("other-lost"), stage.only(18, 19, 20))
    job.until_step(7, LIMIT)
    shown = cluster.job(job.id)
    (lost,) = set(expanded(cluster, shown["NodeList"])) - {shown["BatchHost"]}
    cluster.lose_node(lost)
    job.completes(LIMIT)
    assert lost not in expanded(cluster, cluster.job(job.id)["NodeList"])
    assert [code for code, _ in job.ends()] == [10, 0], job.text()
    return job


def under_torchrun(stage: Stage) -> TrainingJob:
    """A task is a torchrun, which starts the processes of its node."""
    cluster, config = stage.cluster, stage.config("torchrun")
    job = launch(cluster, config, stage.only(21, 22), "--launcher=torchrun", program=())
    job.until_step(3, LIMIT)
    cluster.scontrol("requeue", job.id)
    job.until_start(1, LIMIT)
    job.until_step(9, LIMIT)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.until_start(2, LIMIT)
    job.until_step(14, LIMIT)
    os.kill(cluster.ranks(job.id)[1], signal.SIGKILL)
    job.until_start(3, LIMIT)
    job.completes(LIMIT)
    ends = job.ends()
    assert ends[:2] == [(75, "SIGTERM"), (75, "SIGUSR1")] and ends[3:] == [(0, "complete")], job.text()
    return job


def expanded(cluster: SlurmCluster, nodes: str) -> list[str]:
    return cluster.scontrol("show", "hostnames", nodes).split()


SCENARIOS: tuple[tuple[Callable[[Stage], TrainingJob], bool], ...] = (
    (requeued_killed_and_preempted, True),
    (warned_before_the_time_is_over, True),
    (stops_by_itself_in_time, True),
    (loses_the_node_of_its_script, True),
    (leaves_out_a_bad_node, True),
    (fails_and_is_cancelled, True),
    (at_two_one_and_two_nodes, False),
)
"""Each with whether it stays at the layout of the undisturbed run."""
LONGER = ((loses_another_node, True), (under_torchrun, True))


def test_a_run_ends_as_if_nothing_had_happened(stage: Stage) -> None:
    reference = undisturbed(stage)
    scenarios = SCENARIOS + (LONGER if stage.slow else ())
    failures = {}
    with ThreadPoolExecutor(2 if stage.slow else len(scenarios)) as players:
        futures = {players.submit(scenario, stage): (scenario, same) for scenario, same in scenarios}
        for future, (scenario, same) in futures.items():
            try:
                job = future.result()
                print(f"{scenario.__name__}: {job.ends()}")
                if same:
                    assert_same(job.output, reference.output)
                else:
                    print(f"  largest relative difference {assert_close(job.output, reference.output):.1e}")
            except Exception:
                failures[scenario.__name__] = traceback.format_exc()
    assert not failures, "\n\n".join(f"=== {name}\n{text}" for name, text in failures.items())
