"""What a run does at this moment, from the records that it leaves: running, silent, stopped, failed, complete, …"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.errors import EXIT_DONE, EXIT_REQUEUE
from megatron.launch.attempts import Attempt, End, Heartbeat

STATES = {
    "submitted": "its job was submitted, and no attempt has begun",
    "running": "a process trains, and was heard of a moment ago",
    "starting": "a process was launched and has not begun its first step",
    "silent": "a process was started, left no record of its end, and is not heard of: killed, or its machine hangs",
    "waiting": "it ended, and its job was put back in the queue",
    "stopped": "it was asked to stop",
    "failed": "it ended with an error",
    "complete": "all steps are done",
    "unknown": "a folder of an older version, without records of starts",
}
_BEATS, _LEAST_SECONDS = 6, 60.0
"""A run is silent after so many intervals of its heartbeat, and after so many seconds at least: disks are slow at
times, and clocks of hosts differ."""


@dataclass(frozen=True)
class RunState:
    """state: a key of STATES. since: unix seconds. last_sign: when it was last heard of. live: it may still write.
    job_ends: when the time of its job is over, in unix seconds; None where nobody says so."""

    state: str
    since: float
    last_sign: float
    live: bool = False
    code: int | None = None
    reason: str = ""
    attempt: int = 0
    hosts: Sequence[str] = ()
    processes: int = 1
    job: Mapping[str, Any] = field(default_factory=dict)
    phase: str = ""
    phase_since: float | None = None
    job_ends: float | None = None


def state_of(
    attempts: Sequence[Attempt],
    record: End | None,
    beat: Heartbeat | None,
    requeue: Mapping[str, Any],
    modified: float | None,
    now: float,
    interval: float = 10.0,
    submitted: Mapping[str, Any] | None = None,
) -> RunState:
    """The state of a run.

    record: exit.json. beat: heartbeat.json. requeue: requeue.json. modified: when metrics.jsonl was last written.
    interval: seconds between two heartbeats. submitted: "time" and "job" of the last submission; {} or None: unknown.
    """
    last = attempts[-1] if attempts else None
    number = last.number if last else 0
    end = record if record is not None and (last is None or record.attempt in (0, number)) else None
    end = end or (last.end if last else None)
    beat = beat if beat is not None and (last is None or beat.attempt == number) else None
    decided = requeue if last is not None and requeue.get("attempt") == number else {}
    if end is not None:
        return _ended(end, last, decided)
    if last is None and beat is None and modified is None and (submitted or requeue):
        return _not_begun(submitted or {}, requeue)
    patience = max(_LEAST_SECONDS, _BEATS * interval)
    signs = [time for time in (beat.time if beat else None, last.began if last else None) if time is not None]
    if last is None or beat is None:
        signs += [modified] if modified is not None else []
    sign = max(signs, default=0.0)
    known: dict[str, Any] = {"attempt": number, "last_sign": sign, **_where(last)}
    if beat is not None:
        known |= {"phase": beat.phase, "phase_since": beat.phase_since or None}
    if now - sign <= patience and (beat is None or beat.phase != "ended"):
        began = last is None or last.start is not None
        since = (last.start.time if last.start else last.began) if last else sign
        return RunState("running" if began else "starting", since, live=True, **known)
    if decided.get("requeue"):
        return RunState("waiting", float(decided.get("time", sign)), reason=str(decided.get("why", "")), **known)
    if decided:
        code = decided.get("code")
        why = str(decided.get("why", "killed, without a record"))
        return RunState("failed", sign, code=code if isinstance(code, int) else None, reason=why, **known)
    if last is None:
        return RunState("unknown", sign, reason="no record of starts and ends", **known)
    return RunState("silent", sign, reason=_silence(beat, last), **known)


def _not_begun(submitted: Mapping[str, Any], requeue: Mapping[str, Any]) -> RunState:
    """Of a folder that no attempt has opened: what its batch script said, or that a job was submitted."""
    decided, sent = _seconds(requeue.get("time")), _seconds(submitted.get("time"))
    if not requeue or sent > decided:
        return RunState("submitted", sent, sent, job={"id": str(submitted.get("job", "?"))}, processes=0)
    job = requeue.get("job")
    code = requeue.get("code")
    return RunState(
        "waiting" if requeue.get("requeue") else "failed",
        decided,
        decided,
        code=code if isinstance(code, int) and not requeue.get("requeue") else None,
        reason=str(requeue.get("why", "")),
        job=job if isinstance(job, dict) else {},
    )


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _ended(end: End, last: Attempt | None, decided: Mapping[str, Any]) -> RunState:
    state = "complete" if end.code == EXIT_DONE else "stopped" if end.code == EXIT_REQUEUE else "failed"
    if decided.get("requeue") and state != "complete":
        state = "waiting"
    number = last.number if last else end.attempt
    return RunState(state, end.time, end.time, False, end.code, end.reason, number, **_where(last))


def _where(last: Attempt | None) -> dict[str, Any]:
    began = (last.start or last.launch) if last else None
    if last is None or began is None:
        return {}
    hosts = began.hosts or ([began.host] if began.host else [])
    return {"hosts": hosts, "processes": began.processes, "job": last.job}


def _silence(beat: Heartbeat | None, last: Attempt) -> str:
    if beat is None:
        return "launched, and never heard of since"
    where = f" in the phase {beat.phase!r}" if beat.phase else ""
    return f"the last heartbeat came at step {beat.step}{where}" + ("" if last.start else ", before the first step")
