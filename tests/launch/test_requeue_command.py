"""`stagemix requeue` as a batch script runs it, over a scontrol that notes what it is asked, in words of the real one.

What a real SLURM does with it: test_requeue_slurm.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.launch.attempts import End, Heartbeat, Launch, Start, append_event, exit_words, write_heartbeat
from megatron.launch.bad_nodes import excluded_hosts, read_bad_nodes

ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
SCONTROL = """#!{python}
import json, os, signal, sys
from pathlib import Path

here = Path(__file__).parent
words = sys.argv[1:]
ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
with (here / "asked").open("a") as file:
    file.write(" ".join(words) + (" (SIGTERM ignored)" if ignored else "") + "\\n")
said = json.loads((here / "said.json").read_text())
if words[:2] == ["show", "hostnames"]:
    print("\\n".join(words[2].split(",")))
elif words[0] == "show":
    sys.stdout.write(said[words[1]])
elif words[0] in said:
    sys.exit(said[words[0]])
if words[0] == "requeue":
    # what is on record when SLURM ends the job
    (here / "then").write_text((Path(said["output"]) / "requeue.json").read_text())
"""
JOB = (
    "JobId={id} JobName=a job UserId=me(1) JobState=RUNNING Reason=None Requeue=1 Restarts={restarts} "
    "RunTime=00:10:00 TimeLimit=1-00:00:00 PreemptTime=None Partition=gpu ReqNodeList=(null) "
    "ExcNodeList={excluded} NodeList=n[1-2] NumNodes=2 NumCPUs=8\n"
)
NODE = "NodeName={0} NodeAddr={0} NodeHostName={0} OS=Linux 6 #1 SMP State={1} Partitions=gpu,all BootTime=x\n"


class Job:
    """A run's folder, and a job of SLURM over it."""

    def __init__(self, folder: Path) -> None:
        self.output, self.bin = folder / "run", folder / "bin"
        self.output.mkdir()
        self.bin.mkdir()
        program = self.bin / "scontrol"
        program.write_text(SCONTROL.format(python=sys.executable))
        program.chmod(0o755)
        self.job: dict[str, Any] = {"id": "77"}
        self.said: dict[str, Any] = {"output": str(self.output)}
        self.shows()

    def shows(self, excluded: str = "(null)", nodes: str = "n1 n2 n3 n4 n5", down: str = "") -> None:
        self.said["job"] = JOB.format(id=77, restarts=self.job.get("restarts", 0), excluded=excluded)
        lines = [NODE.format(name, "IDLE") for name in nodes.split()]
        self.said["node"] = "".join(lines + [NODE.format(name, "DOWN*+DRAIN") for name in down.split()])

    def attempt(self, code: int | None, reason: str = "", step: int = 0, **more: Any) -> None:
        """One more attempt, from `step` on; code None: killed."""
        known = self.output / "attempts.jsonl"
        number = known.read_text().count('"launch"') + 1 if known.exists() else 1
        (self.output / "exit.json").unlink(missing_ok=True)
        append_event(self.output, Launch(number, 1000.0, "n1", ["n1", "n2"], job=self.job))
        append_event(self.output, Start(number, 1001.0, "n1", ["n1", "n2"], job=self.job, step=step))
        if code is not None:
            end = End(number, 1002.0, code, reason, step, job=self.job, **more)
            append_event(self.output, end)
            (self.output / "exit.json").write_text(exit_words(end))

    def saved(self, step: int) -> None:
        folder = self.output / "checkpoints" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    def again(self) -> None:
        self.job = {**self.job, "restarts": self.job.get("restarts", 0) + 1}
        self.shows()

    def requeue(self, *words: str, inside: bool = True) -> subprocess.CompletedProcess[str]:
        (self.bin / "said.json").write_text(json.dumps(self.said))
        (self.bin / "asked").unlink(missing_ok=True)
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        variables["PATH"] = f"{self.bin}:{variables['PATH']}"
        names = {"id": "SLURM_JOB_ID", "restarts": "SLURM_RESTART_COUNT"}
        names |= {"array_job": "SLURM_ARRAY_JOB_ID", "array_task": "SLURM_ARRAY_TASK_ID"}
        if inside:
            variables |= {names[key]: str(value) for key, value in self.job.items()}
        command = [sys.executable, "-m", "megatron.commands.cli", "requeue", str(self.output), *words]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)

    @property
    def asked(self) -> list[str]:
        """What scontrol was asked to change."""
        path = self.bin / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("show ")]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_stop_is_requeued_and_all_is_said_before(job: Job) -> None:
    job.attempt(75, "SIGUSR1")
    job.saved(10)
    done = job.requeue("--code", "0")
    assert done.returncode == 0, done
    assert done.stdout.startswith("job 77 requeued: it was asked to stop, and saved (exit code 75): SIGUSR1")
    assert job.asked == ["requeue 77 (SIGTERM ignored)"]
    then = json.loads((job.bin / "then").read_text())
    assert (then["requeue"], then["attempt"], then["cause"]) == (True, 1, "asked to stop")


def test_what_would_come_again_is_not_requeued(job: Job) -> None:
    for code, reason in (
        (2, "ConfigError: no key"),
        (75, "stop-now: the file"),
        (74, "StorageError: x: No space left on device"),
    ):
        job.attempt(code, reason)
        done = job.requeue("--code", "1")
        assert (done.returncode, job.asked) == (code, []), done
        assert done.stdout.startswith("job 77 not requeued: ") and reason.partition(": ")[2] in done.stdout
        assert "Error:" not in done.stdout
        job.again()


def test_failures_without_progress_come_to_an_end(job: Job) -> None:
    job.saved(10)
    codes = []
    for _ in range(3):
        job.attempt(None, step=10)
        codes.append(job.requeue("--code", "137").returncode)
        job.again()
    assert codes == [0, 0, 137]
    job.saved(20)
    job.attempt(None, step=10)
    assert job.requeue("--code", "137").returncode == 0


def test_a_broken_node_is_left_out_at_once_and_the_users_exclusions_stay(job: Job) -> None:
    job.shows("n5")
    job.attempt(1, ECC, host="n2", rank=3)
    done = job.requeue("--code", "1")
    assert done.returncode == 0, done
    assert job.asked == ["requeue 77 (SIGTERM ignored)", "update JobId=77 ExcNodeList=n5,n2 (SIGTERM ignored)"]
    assert excluded_hosts(job.output) == ["n2"]
    # forgiven, it is used again, and n5, which the user excluded, is not
    assert job.requeue("--forgive", "n2").returncode == 0
    job.again()
    job.shows("n2,n5")
    job.attempt(75, "SIGTERM")
    assert job.requeue().returncode == 0
    assert job.asked[1:] == ["update JobId=77 ExcNodeList=n5 (SIGTERM ignored)"]


def test_suspects_are_left_out_after_two_failures(job: Job) -> None:
    job.attempt(10, "lost", suspects=["n2"], rank=0, host="n1")
    assert job.requeue().returncode == 0
    assert job.asked == ["requeue 77 (SIGTERM ignored)"]
    assert len(read_bad_nodes(job.output).suspected["n2"]) == 1
    assert job.requeue().returncode == 0  # asked twice about one attempt
    assert len(read_bad_nodes(job.output).suspected["n2"]) == 1
    job.again()
    job.saved(10)
    job.attempt(9, "watchdog", suspects=["n2"])
    job.saved(20)
    assert job.requeue().returncode == 0
    assert job.asked[1:] == ["update JobId=77 ExcNodeList=n2 (SIGTERM ignored)"]


def test_never_so_many_that_too_few_are_left(job: Job) -> None:
    job.shows(nodes="n1 n2", down="n3 n4")
    job.attempt(1, ECC, host="n2")
    done = job.requeue()
    assert done.returncode == 0 and job.asked == ["requeue 77 (SIGTERM ignored)"]
    assert "n2 is not excluded: the job needs 2 nodes and too few others are left" in done.stderr


def test_where_all_hosts_look_bad_none_is_blamed(job: Job) -> None:
    job.attempt(10, "lost", suspects=["n1", "n2"])
    done = job.requeue()
    assert done.returncode == 0 and "none of them is counted" in done.stderr
    assert not (job.output / "bad_nodes.json").exists()


def test_a_task_of_an_array(job: Job) -> None:
    job.job |= {"array_job": "70", "array_task": "7"}
    job.attempt(75, "SIGTERM")
    assert job.requeue().returncode == 0
    assert job.asked == ["requeue 70_7 (SIGTERM ignored)"]


def test_slurm_refuses(job: Job) -> None:
    job.said["requeue"] = "Requested operation is presently disabled for job 77"
    job.attempt(75, "SIGTERM")
    done = job.requeue()
    assert done.returncode == 75 and "SLURM refused to requeue it" in done.stdout
    assert not json.loads((job.output / "requeue.json").read_text())["requeue"]


def test_a_dry_run_and_one_outside_slurm_change_nothing(job: Job) -> None:
    job.attempt(1, ECC, host="n2")
    before = sorted(path.name for path in job.output.iterdir())
    done = job.requeue("--dry-run")
    assert done.returncode == 0 and "would be requeued" in done.stdout and "would not get: n2" in done.stdout
    outside = job.requeue(inside=False)
    assert outside.returncode == 1 and "not in a SLURM job, in which it would be requeued" in outside.stdout
    assert not job.asked and sorted(path.name for path in job.output.iterdir()) == before


def test_damaged_records_do_not_keep_a_job_from_going_on(job: Job) -> None:
    job.attempt(75, "SIGTERM")
    (job.output / "exit.json").write_text('{"code": 7')
    (job.output / "bad_nodes.json").write_text("{")
    with (job.output / "attempts.jsonl").open("a") as file:
        file.write('{"event": "en')
    done = job.requeue()
    assert done.returncode == 0 and job.asked == ["requeue 77 (SIGTERM ignored)"]
    assert "bad_nodes.json.damaged" in done.stderr


def test_B1_the_wrong_folder(job: Job, tmp_path: Path) -> None:
    job.output = tmp_path / "nowhere"
    done = job.requeue()
    assert done.returncode == 2 and "holds no record of an attempt" in done.stderr
    assert job.requeue("--code", "3").returncode == 3
    assert job.requeue("--code", "x").returncode == 2
    assert job.requeue("--days", "0").returncode == 2
    assert job.requeue("--without-progress", "0").returncode == 2


def test_nothing_is_decided_about_a_run_that_trains(job: Job) -> None:
    """A fresh heartbeat without a record of an end: only that job's own batch script knows that it was killed."""
    job.attempt(None)
    write_heartbeat(job.output, Heartbeat(time.time(), 1, 3, host="n1", job=job.job))
    before = sorted(path.name for path in job.output.iterdir())
    for words in ([], ["--dry-run"], ["--code", "137"]):
        outside = job.requeue(*words, inside=False)
        assert outside.returncode == 2 and "attempt 1 trains on n1 in job 77: its heartbeat is" in outside.stderr
        assert not job.asked and sorted(path.name for path in job.output.iterdir()) == before
    inside = job.requeue("--code", "137", "--dry-run")
    assert inside.returncode == 0 and "it was killed" in inside.stdout
    write_heartbeat(job.output, Heartbeat(time.time() - 300, 1, 3, host="n1", job=job.job))
    assert "it was killed" in job.requeue(inside=False).stdout


def test_a_stop_that_saved_nothing_is_not_said_to_have_saved(job: Job) -> None:
    job.attempt(75, "StopRequested: SIGUSR1 " + "word " * 100)
    said = job.requeue("--dry-run").stdout
    assert "it was asked to stop (exit code 75): SIGUSR1 word" in said and " word…;" in said
