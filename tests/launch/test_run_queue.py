"""A run's state as SLURM's queue corrects it, over a squeue that writes the words of the real one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from megatron.launch.run_queue import Queue, with_queue
from megatron.launch.run_state import RunState

ENDED = datetime(2026, 5, 4, 12, 0, 0).timestamp()
JOB = {"id": "77"}
LATER, EARLIER, END = "2026-05-04T12:05:00", "2026-05-04T09:00:00", "2026-05-05T09:00:00"
INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


def state(name: str, code: int | None = None) -> RunState:
    return RunState(name, ENDED, ENDED, name in ("running", "starting"), code, "words", 3, job=JOB)


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "squeue"


def says(program: Path, words: str) -> Queue:
    program.write_text(f'#!/bin/sh\n[ "$2" = --jobs=77 ] || exit 9\n{words}\n')
    program.chmod(0o755)
    return Queue(20)


@pytest.mark.parametrize(
    "before, code, line, after, words",
    [
        ("failed", 10, f"PENDING|{LATER}|{END}|BeginTime", "waiting", "words; job 77 is pending (BeginTime)"),
        ("failed", 10, f"RUNNING|{LATER}|{END}|None", "starting", "no attempt has begun in it yet"),
        ("waiting", 75, f"RUNNING|{LATER}|{END}|None", "starting", "no attempt has begun in it yet"),
        ("failed", 10, f"RUNNING|{EARLIER}|{END}|None", "failed", "words; job 77 still runs"),
        ("silent", None, "PENDING|N/A|N/A|Priority", "waiting", "job 77 is pending (Priority)"),
        ("submitted", None, "PENDING|N/A|N/A|Priority", "submitted", "job 77 is pending (Priority)"),
        ("submitted", None, f"RUNNING|{EARLIER}|{END}|None", "starting", "no attempt has begun"),
        ("failed", 10, f"COMPLETING|{EARLIER}|{END}|None", "failed", "job 77 is completing"),
        ("complete", 0, "PENDING|N/A|N/A|Priority", "complete", "words"),
        ("running", None, f"RUNNING|{EARLIER}|{END}|None", "running", "words"),
    ],
)
def test_what_the_queue_says(squeue: Path, before: str, code: int, line: str, after: str, words: str) -> None:
    found = with_queue(state(before, code), says(squeue, f"echo '{line}'"), False)
    assert found.state == after and words in found.reason
    ends = datetime.fromisoformat(END).timestamp() if "RUNNING" in line else None
    assert found.job_ends == ends
    assert found.code == (code if after in ("failed", "complete") else None)


def test_a_job_that_the_queue_does_not_know(squeue: Path) -> None:
    queue = says(squeue, INVALID)
    for before, code, after in (("waiting", 75, "stopped"), ("waiting", 10, "failed"), ("failed", 10, "failed")):
        found = with_queue(state(before, code), queue, False)
        assert found.state == after and "not known here" not in found.reason
    for ended in ("NODE_FAIL", "CANCELLED"):  # remembered for some minutes
        assert says(squeue, f"echo '{ended}|{EARLIER}|{END}|None'").find(JOB) is None
    assert "is not in SLURM's queue any more" in with_queue(state("silent"), queue, False).reason
    assert with_queue(state("running"), queue, False) == state("running")


def test_where_slurm_cannot_be_asked(squeue: Path) -> None:
    for queue in (says(squeue, "echo 'Unable to contact slurm controller' >&2; exit 1"), says(squeue, "exit 3")):
        for code in (9, 10, None, 137):
            assert "is not known here" in with_queue(state("failed", code), queue, False).reason
            assert with_queue(state("failed", code), queue, True) == state("failed", code)
        assert with_queue(state("failed", 2), queue, False) == state("failed", 2)
        assert with_queue(state("waiting", 75), queue, True) == state("waiting", 75)
    squeue.write_text("#!/bin/sh\nexec sleep 60\n")
    queue = Queue(0.2)
    assert queue.find(JOB) is None and not queue.answers


def test_a_run_of_no_job_is_not_asked_about(squeue: Path) -> None:
    queue = says(squeue, "exit 3")
    for job in ({}, {"id": "--all"}):
        assert queue.find(job) is None and queue.answers
