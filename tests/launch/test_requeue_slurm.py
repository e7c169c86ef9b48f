"""`stagemix requeue` inside real batch jobs of a private SLURM: scontrol requeue ends the very script that calls it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import SlurmCluster, skip_without_slurm

pytestmark = pytest.mark.long

skip_without_slurm()

ROOT = Path(__file__).resolve().parents[2]
# What a run leaves behind, at each of its attempts: a GPU of the node breaks; a stop; the end.
ATTEMPT = """
import json, os, sys, time
from pathlib import Path
from megatron.launch.allocation import job_of
from megatron.launch.attempts import End, Launch, Start, append_event, exit_words

output, job, node = Path(sys.argv[1]), job_of(os.environ), os.environ["SLURMD_NODENAME"]
number = job.get("restarts", 0) + 1
(output / "exit.json").unlink(missing_ok=True)
append_event(output, Launch(number, time.time(), node, [node], job=job))
append_event(output, Start(number, time.time(), node, [node], job=job, step=10 * (number - 1)))
folder = output / "checkpoints" / f"step-{10 * number:09d}"
folder.mkdir(parents=True)
(folder / "manifest.json").write_text("{}")
code, reason = json.loads(sys.argv[2])[number - 1]
if code == 137:
    os.kill(os.getpid(), 9)
end = End(number, time.time(), code, reason, 10 * number, rank=0, host=node, job=job)
append_event(output, end)
(output / "exit.json").write_text(exit_words(end))
sys.exit(code)
"""
SCRIPT = """#!/bin/bash
#SBATCH --nodes=1 --requeue --open-mode=append --output={output}/job-%j.log
echo "on $SLURMD_NODENAME, restart ${{SLURM_RESTART_COUNT:-0}}"
export PYTHONPATH={root}
srun {python} {folder}/attempt.py {output} '{ends}' & wait $!
code=$?
{before}
{python} -m megatron.commands.cli requeue {output} --code $code
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=3, kill_wait=30) as running:
        yield running


def submit(cluster: SlurmCluster, folder: Path, ends: list[tuple[int, str]], *words: str, before: str = "") -> str:
    output = folder / "run"
    output.mkdir()
    (folder / "attempt.py").write_text(ATTEMPT)
    script = folder / "job.sh"
    values = {"output": output, "root": ROOT, "python": sys.executable, "folder": folder, "before": before}
    script.write_text(SCRIPT.format(ends=json.dumps(ends), **values))
    return cluster.sbatch(script, *words)


def log_of(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted((folder / "run").glob("job-*.log")))


def nodes_in(log: str) -> list[str]:
    return [line.split()[1].rstrip(",") for line in log.splitlines() if line.startswith("on ")]


@pytest.mark.soak
def test_a_job_is_requeued_again_and_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    broken = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    job = submit(cluster, tmp_path, [(1, broken), (75, "SIGUSR1"), (137, ""), (0, "complete")], "--exclude=node3")
    assert cluster.wait(job, 200) == "COMPLETED", log_of(tmp_path)
    log = log_of(tmp_path)
    first, *others = nodes_in(log)
    assert others == [{"node1": "node2", "node2": "node1"}[first]] * 3, log
    assert log.count(f"job {job} requeued: ") == 3, log
    assert cluster.job(job)["Restarts"] == "3"


def test_a_job_is_requeued_without_its_broken_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A node that the user left out stays so. What is said, and on record, is so before SLURM ends the script."""
    broken = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    job = submit(cluster, tmp_path, [(1, broken), (2, "ConfigError: no such key")], "--exclude=node3")
    assert cluster.wait(job, 100) == "FAILED", log_of(tmp_path)
    log = log_of(tmp_path)
    first, second = nodes_in(log)
    assert {first, second} == {"node1", "node2"}, log
    assert set(cluster.job(job)["ExcNodeList"].split(",")) == {first, "node3"}
    assert f"job {job} requeued: a machine failed (exit code 1): {broken.removeprefix('RuntimeError: ')}" in log
    assert f"nodes that it will not get: node3, {first}" in log
    assert f"job {job} not requeued: command line or config cannot be carried out (exit code 2)" in log
    record = json.loads((tmp_path / "run" / "bad_nodes.json").read_text())
    assert list(record["excluded"]) == [first]
    assert cluster.job(job)["ExitCode"] == "2:0"


@pytest.mark.soak
def test_a_task_of_an_array_is_requeued_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, [(75, "SIGTERM"), (2, "ConfigError: no such key")], "--array=7")
    assert cluster.wait(f"{job}_7", 100) == "FAILED", log_of(tmp_path)
    log = log_of(tmp_path)
    assert f"job {job}_7 requeued: " in log and f"job {job}_7 not requeued: " in log, log
    assert cluster.job(f"{job}_7")["ExitCode"] == "2:0"


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The run saves at scancel's SIGTERM and ends with 75, as at any other, and the script goes on to its last line."""
    job = submit(cluster, tmp_path, [(75, "SIGTERM")] * 5, before="trap : TERM; sleep 100 & wait $!")
    cluster.wait(job, 30, ("RUNNING",))
    for _ in range(200):
        if "step-000000010" in str(list((tmp_path / "run").glob("checkpoints/*"))):
            break
        cluster.run("sleep", "0.1")
    cluster.run("sleep", "1")
    cluster.run("scancel", "--full", job)
    assert cluster.wait(job, 60) == "CANCELLED", log_of(tmp_path)
    assert "somebody cancelled it" in log_of(tmp_path)


def test_a_job_that_must_not_be_requeued_says_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, [(75, "SIGTERM")], "--no-requeue")
    assert cluster.wait(job, 60) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert "--no-requeue" in log_of(tmp_path)


@pytest.mark.soak
def test_a_job_that_ran_out_of_time_is_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    """SLURM ends it at its limit of a minute: SIGTERM to all of it, and the script goes on to its last line."""
    first = 'if [ -z "$SLURM_RESTART_COUNT" ]; then trap : TERM; sleep 200 & wait $!; fi'
    job = submit(cluster, tmp_path, [(75, "SIGTERM"), (0, "complete")], "--time=1", before=first)
    assert cluster.wait(job, 240, ("COMPLETED",)) == "COMPLETED", log_of(tmp_path)
    assert cluster.job(job)["Restarts"] == "1", log_of(tmp_path)
