"""What a run's folder and its job tell of the last attempt and of those before it, for `requeue_decision.decide`; and
requeue.json, the last decision, in OUTPUT."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import EXIT_REQUEUE
from megatron.launch.attempts import Attempt, End, read_heartbeat
from megatron.launch.requeue_decision import Ended, Past
from megatron.launch.run_state import state_of
from megatron.launch.slurm_control import JobFacts, job_name

REQUEUE = "requeue.json"
_BEAT_SECONDS = 10.0
_NEAR_THE_END = 5.0
"""Seconds. SLURM looks at time limits now and then, and so ends a job at its limit or later; clocks are rounded."""


def how_it_ended(
    attempts: Sequence[Attempt], record: End | None, job: Mapping[str, Any], code: int | None
) -> tuple[Ended, Attempt | None]:
    """How the attempt of this job ended, and that attempt; None where it never opened the run's folder.

    attempts, record: of attempts.jsonl and exit.json. job: `allocation.job_of`. code: the launcher's. The attempt's own
    record is believed before the launcher, which may hide its code, or count processes that were killed afterwards. A
    record of another attempt, or of another job, says nothing about this one.
    """
    last = attempts[-1] if attempts else None
    mine = last if last is not None and _of_job(last.job, job) else None
    end = mine.end if mine else None
    if record is not None and _of_job(record.job, job) and (record.attempt == mine.number if mine else not attempts):
        end = record
    if end is None:
        return Ended(code, claimed=mine is not None), mine
    return Ended(end.code, end.reason, True, True, end.host or "", tuple(end.suspects)), mine


def trains_now(
    output: Path, attempts: Sequence[Attempt], record: End | None, job: Mapping[str, Any], code: int | None, now: float
) -> str:
    """Words on what trains in the folder at this moment; "" where nothing does.

    In the batch script of the very job that was heard of, the step has ended, and so it has outside SLURM where the
    launcher's code is known: a fresh heartbeat is then the last one of a process that was killed.
    """
    beat = read_heartbeat(output)
    if beat is None:
        return ""
    state = state_of(attempts, record, beat, {}, None, now, _heartbeat_seconds(output))
    heard = bool(attempts) and beat.attempt == attempts[-1].number
    if not state.live or not heard:
        return ""
    theirs = beat.job or state.job
    if (job or code is not None) and theirs.get("id") == job.get("id"):
        return ""
    where = f" on {beat.host or ', '.join(state.hosts)}" if beat.host or state.hosts else ""
    of = f" in job {job_name(theirs)}" if "id" in theirs else ""
    return f"attempt {beat.attempt} trains{where}{of}: its heartbeat is {max(0.0, now - beat.time):.0f} s old"


def _heartbeat_seconds(output: Path) -> float:
    """health.heartbeat_seconds of the run's config; the default where it cannot be read."""
    try:
        health = tomllib.loads((output / "config.toml").read_text(encoding="utf-8")).get("health", {})
    except (OSError, ValueError):
        return _BEAT_SECONDS
    seconds = health.get("heartbeat_seconds") if isinstance(health, dict) else None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
        return _BEAT_SECONDS
    return float(seconds)


def past_of(attempts: Sequence[Attempt], job: Mapping[str, Any], newest: int) -> Past:
    """The run's attempts, and the restarts of this job that left no trace in its folder. newest: step of the newest
    checkpoint; 0 where there is none."""
    restarts = int(job.get("restarts", 0))
    unseen = 0
    if "id" in job and (not attempts or attempts[-1].job):
        seen = [int(one.job.get("restarts", 0)) for one in attempts if one.job.get("id") == job["id"]]
        unseen = max(0, restarts - max(seen, default=-1))
    positions = [one.start.step if one.start else None for one in attempts]
    stops = [one.end is not None and one.end.code == EXIT_REQUEUE for one in attempts]
    return Past((*positions, *[None] * unseen), (*stops, *[False] * unseen), newest, restarts)


def newest_step(output: Path) -> int:
    """The step of the newest published checkpoint; 0 where there is none."""
    folders = (output / "checkpoints").glob("step-*/manifest.json")
    numbers = [path.parent.name.removeprefix("step-") for path in folders]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def obstacle(facts: JobFacts, restarts: int) -> tuple[bool, str]:
    """Whether SLURM has put the job back in the queue already, and why this job must not be put there; "": it may.

    restarts: as this job was started. A job that ends while its time is not over, and that nobody preempts, was
    cancelled.
    """
    if facts.restarts > restarts or facts.state == "PENDING":
        return True, ""
    if not facts.may_requeue:
        return (
            False,
            "it was submitted with --no-requeue (or slurm.conf has JobRequeue=0): submit it again, if no other waits",
        )
    if facts.state in ("", "RUNNING", "SUSPENDED", "PREEMPTED", "TIMEOUT", "NODE_FAIL") or facts.preempted:
        return False, ""
    if facts.state == "COMPLETING" and facts.limit is not None and (facts.seconds or 0.0) + _NEAR_THE_END > facts.limit:
        return False, ""
    return False, f"the job is {facts.state} before its time is over: somebody cancelled it; submit it again to go on"


def _of_job(theirs: Mapping[str, Any], job: Mapping[str, Any]) -> bool:
    """Whether an attempt was one of this very start of the job; where either side does not know, it is taken to be."""
    if "id" not in theirs or "id" not in job:
        return True
    return bool(theirs["id"] == job["id"] and theirs.get("restarts", 0) == job.get("restarts", 0))


def write_requeue(output: Path, record: Mapping[str, Any]) -> None:
    """Replaces requeue.json: "time", "attempt" (0: none began), "requeue", "cause", "why", "code", "job", "exclude".
    OSError."""
    write_whole(output / REQUEUE, (json.dumps(record, indent=1) + "\n").encode())


def read_requeue(output: Path) -> dict[str, Any]:
    """The last decision; {} where there is none."""
    try:
        record = json.loads((output / REQUEUE).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
