"""What SLURM's queue says of a run's job, for `stagemix status`: whether it waits or runs, and until when; and of all
jobs of a user, for studies.

Records in a folder cannot tell: SLURM itself requeues a job whose node was lost, and starts one when it likes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from megatron.config.errors import EXIT_LOST_PROCESS, EXIT_REQUEUE, EXIT_WATCHDOG
from megatron.launch.run_state import RunState
from megatron.launch.slurm_control import ControlError, asked, job_name

SECONDS = 5.0
_NAME = re.compile(r"\d+(_\d+)?")
_AFTER = re.compile(r":(\d+(?:_\d+)?)")
_ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
          "OUT_OF_MEMORY")  # fmt: skip
"""States of jobs that SLURM remembers for some minutes, and will not start again."""
_NOT_KNOWN = "whether SLURM started it again is not known here"


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue. state: PENDING, RUNNING, … why: what it waits for. start, end: unix seconds, where known."""

    state: str
    why: str = ""
    start: float | None = None
    end: float | None = None


class Queue:
    """squeue, as long as it answers in a moment; it is not asked again once it did not."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.answers = shutil.which("squeue") is not None

    def find(self, job: Mapping[str, Any]) -> QueuedJob | None:
        """What it knows of a job, `allocation.job_of`; None of one that it does not know, or where it cannot be asked:
        `answers` tells."""
        if not self.answers or "id" not in job or not _NAME.fullmatch(name := job_name(job)):
            return None
        words = ["squeue", "--noheader", f"--jobs={name}", "--format=%T|%S|%e|%r"]
        try:
            done = subprocess.run(
                words,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.seconds,
                check=False,
                env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
            )
        except (OSError, subprocess.TimeoutExpired):
            self.answers = False
            return None
        if done.returncode and "Invalid job id" not in done.stderr:
            self.answers = False
        lines = [line.strip().split("|", 3) for line in done.stdout.splitlines() if line.count("|") >= 3]
        found = [
            QueuedJob(state, why, _time(start), _time(end)) for state, start, end, why in lines if state not in _ENDED
        ]
        return next((one for one in found if one.state == "RUNNING"), found[0] if found else None)


@dataclass(frozen=True)
class ListedJob:
    """A job of this user that waits or runs. after: ids of jobs that it still waits for, or waits for in vain."""

    id: str
    state: str
    why: str = ""
    after: tuple[str, ...] = ()
    comment: str = ""

    @property
    def never(self) -> bool:
        """Whether it waits for what cannot come any more."""
        return self.state == "PENDING" and self.why == "DependencyNeverSatisfied"


def my_jobs(seconds: float = 60.0) -> list[ListedJob]:
    """Every job of this user that waits or runs, oldest first. Raises ControlError where SLURM does not answer: then
    nobody knows, and none must be taken to be gone."""
    words = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%T|%r|%E|%k"]
    done = asked(words, " ".join(words), seconds)
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix("squeue: ") or f"exit code {done.returncode}"
        raise ControlError(f"squeue: {said}")
    found = []
    for line in done.stdout.splitlines():
        if line.count("|") < 4:
            continue
        job, state, why, after, comment = line.strip().split("|", 4)
        if state not in _ENDED:
            # "afterok:12(unfulfilled),afterany:13_4(failed)"
            ids = tuple(_AFTER.findall(after))
            found.append(ListedJob(job, state, _said(why), ids, _said(comment)))
    return sorted(found, key=lambda one: int(re.split(r"\D", one.id, maxsplit=1)[0] or 0))


def with_queue(state: RunState, queue: Queue, decided: bool) -> RunState:
    """The state, corrected by the queue. decided: whether the run's batch script recorded what follows on its end."""
    if state.state in ("complete", "unknown") or "id" not in state.job:
        return state
    found = queue.find(state.job)
    name = f"job {job_name(state.job)}"
    if found is None:
        return _without(state, name, queue.answers, decided)
    ends = found.end if found.state == "RUNNING" else None
    if state.live:
        return replace(state, job_ends=ends)
    waits = f"{name} is {found.state.lower()}" + (f" ({found.why})" if found.why not in ("", "None") else "")
    if found.state == "PENDING":
        name_of = "submitted" if state.state == "submitted" else "waiting"
        return replace(state, state=name_of, code=None, reason=_joined(state.reason, waits))
    if found.state in ("RUNNING", "CONFIGURING"):
        if state.state == "submitted" or (found.start is not None and found.start > state.last_sign):
            words = f"{name} is {found.state.lower()}, and no attempt has begun in it yet"
            return replace(state, state="starting", since=found.start or state.since, code=None, reason=words,
                           job_ends=ends)  # fmt: skip
        waits = f"{name} still runs"
    return replace(state, reason=_joined(state.reason, waits), job_ends=ends)


def _without(state: RunState, name: str, answered: bool, decided: bool) -> RunState:
    """Of a job that the queue does not know, or that it cannot be asked about."""
    if state.live:
        return state
    if answered:
        gone = f"{name} is not in SLURM's queue any more"
        if state.state == "waiting":
            ended = "stopped" if state.code == EXIT_REQUEUE else "failed"
            return replace(state, state=ended, reason=_joined(state.reason, gone))
        return replace(state, reason=_joined(state.reason, gone)) if state.state in ("silent", "submitted") else state
    killed = state.code is None or state.code > 128 or state.code in (EXIT_WATCHDOG, EXIT_LOST_PROCESS)
    if state.state in ("failed", "silent") and killed and not decided:
        return replace(state, reason=_joined(state.reason, _NOT_KNOWN))
    return state


def _said(words: str) -> str:
    return "" if words in ("(null)", "None") else words


def _joined(*words: str) -> str:
    return "; ".join(filter(None, words))


def _time(words: str) -> float | None:
    """squeue writes local time; N/A where it knows none."""
    try:
        return datetime.fromisoformat(words).timestamp()
    except ValueError:
        return None
