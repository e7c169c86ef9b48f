"""The files by which a run tells others how its starts went: attempts.jsonl, exit.json, heartbeat.json, switches.

A process that trains writes them; status, requeue and batch scripts read them, without torch, on any machine. Readers
take what is whole: a torn last line, a missing or foreign file is no error.

    attempts.jsonl    a line at each "launch" (the folder is claimed), "start" (the first step is about to begin) and
                      "end"; an attempt without an end was killed
    exit.json         the last end; absent while a process trains, and where it was killed
    heartbeat.json    replaced every few seconds while a process trains; the last one stays
    save-now          made by the user: a checkpoint is saved at the next step boundary, and the file removed
    stop-now          made by the user: the same, then the run stops with exit code 75, not to be requeued
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron.config.durable_files import sync_path

ATTEMPTS = "attempts.jsonl"
EXIT = "exit.json"
HEARTBEAT = "heartbeat.json"
SAVE_NOW = "save-now"
STOP_NOW = "stop-now"
WALL_TIME = "wall time"
"""How the reason of exit.json begins where the allocation's end stopped the run; STOP_NOW where that file did; else it
begins with the signal's name."""

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("attempt", "pid", "processes", "step", "steps", "code"), (int,)),
    **dict.fromkeys(("consumed_samples", "consumed_tokens", "tokens"), (int,)),
    **dict.fromkeys(("time", "phase_since"), (int, float)),
    **dict.fromkeys(("step_seconds", "save_seconds"), (int, float, type(None))),
    **dict.fromkeys(("reason", "layout", "engine", "training_stage", "phase"), (str,)),
    **dict.fromkeys(("hosts", "suspects"), (list,)),
    "host": (str, type(None)),
    "rank": (int, type(None)),
    "job": (dict,),
}


@dataclass(frozen=True)
class Launch:
    """The run's folder was claimed. time: unix seconds. host, pid: of the process that writes. hosts: of all ranks,
    sorted. job: `allocation.job_of`."""

    attempt: int
    time: float
    host: str | None = None
    hosts: list[str] = field(default_factory=list)
    pid: int = 0
    processes: int = 1
    job: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """The first step was about to begin, at this position. layout, engine: words."""

    attempt: int
    time: float
    host: str | None = None
    hosts: list[str] = field(default_factory=list)
    pid: int = 0
    processes: int = 1
    layout: str = ""
    engine: str = ""
    job: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass(frozen=True)
class End:
    """A process ended with a code and a reason, at this position. rank, host: whose failure it is; None of none.
    suspects: hosts of ranks that were lost without a word, or that a hang waits for; never by a guess."""

    attempt: int
    time: float
    code: int
    reason: str = ""
    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    training_stage: str = ""
    rank: int | None = None
    host: str | None = None
    suspects: list[str] = field(default_factory=list)
    pid: int = 0
    job: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heartbeat:
    """Where a run is. steps, tokens: of the whole schedule. phase, phase_since: what the process that writes does, and
    since when. step_seconds: median of recent steps. save_seconds: longest of recent saves; None before the first."""

    time: float
    attempt: int
    step: int
    steps: int = 0
    training_stage: str = ""
    phase: str = ""
    phase_since: float = 0.0
    host: str | None = None
    pid: int = 0
    job: dict[str, Any] = field(default_factory=dict)
    step_seconds: float | None = None
    save_seconds: float | None = None
    consumed_tokens: int = 0
    tokens: int = 0


@dataclass
class Attempt:
    """One start of the run, as far as it came. end is None while it runs, and where it was killed."""

    number: int
    launch: Launch | None = None
    start: Start | None = None
    end: End | None = None

    @property
    def began(self) -> float:
        """When it was first heard of, in unix seconds."""
        return min(one.time for one in (self.launch, self.start, self.end) if one is not None)

    @property
    def job(self) -> dict[str, Any]:
        """The SLURM job that it ran in; {} outside SLURM."""
        return next((one.job for one in (self.launch, self.start, self.end) if one is not None and one.job), {})


_EVENTS: dict[str, type[Launch] | type[Start] | type[End]] = {"launch": Launch, "start": Start, "end": End}
_CLASS = re.compile(r"^[A-Z]\w+(Error|Requested): ")
R = TypeVar("R")


def read_attempts(output: Path) -> list[Attempt]:
    """The attempts of the run in a folder, oldest first; [] where there is no record. Of two ends the last counts."""
    found: dict[int, Attempt] = {}
    for line in _bytes_of(output / ATTEMPTS).split(b"\n"):
        record = _object_of(line)
        event = str(record.get("event"))
        told = _made(_EVENTS[event], record) if event in _EVENTS else None
        if told is not None:
            setattr(found.setdefault(told.attempt, Attempt(told.attempt)), event, told)
    return [found[number] for number in sorted(found)]


def read_exit(output: Path) -> End | None:
    """exit.json; None where there is none. attempt is 0 in one that an older version wrote."""
    record = _object_of(_bytes_of(output / EXIT))
    return _made(End, {"attempt": 0, **record}) if record else None


def read_heartbeat(output: Path) -> Heartbeat | None:
    """heartbeat.json; None where there is none."""
    return _made(Heartbeat, _object_of(_bytes_of(output / HEARTBEAT)))


def append_event(output: Path, told: Launch | Start | End) -> None:
    """Adds a line to attempts.jsonl, fsynced; a line that a kill tore is ended first. OSError."""
    event = next(name for name, kind in _EVENTS.items() if isinstance(told, kind))
    line = json.dumps({"event": event, **_plain(told)}).encode() + b"\n"
    path = output / ATTEMPTS
    new = not path.exists()
    with open(path, "ab+", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())
    if new:
        sync_path(output)


def exit_words(end: End) -> str:
    """The content of exit.json."""
    return json.dumps(_plain(end), indent=1) + "\n"


def reason_words(reason: str, most: int) -> str:
    """A reason for people: on one line, without the name of an error's class before it; beyond `most` characters it is
    cut at the end of a word."""
    words = _CLASS.sub("", " ".join(reason.split()))
    if len(words) <= most:
        return words
    whole = words[:most].rpartition(" ")[0] if words[most - 1] != " " else words[: most - 1]
    return (whole or words[: most - 1]).rstrip(" ,;:") + "…"


def write_heartbeat(output: Path, beat: Heartbeat) -> None:
    """Replaces heartbeat.json: whole to whoever looks, without waiting for the disk. OSError."""
    aside = output / f".{HEARTBEAT}.tmp"
    aside.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
    os.replace(aside, output / HEARTBEAT)


def _plain(told: Launch | Start | End) -> dict[str, Any]:
    record = asdict(told)
    absent = [name for name in ("rank", "host") if record.get(name, 0) is None]
    return {name: value for name, value in record.items() if name not in absent}


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _object_of(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _made(kind: type[R], record: Mapping[str, Any]) -> R | None:
    """The dataclass of a record; None where a field is missing that has no default, or is of another type."""
    known = {one.name: record[one.name] for one in fields(kind) if one.name in record}  # type: ignore[arg-type]
    if any(isinstance(value, bool) or not isinstance(value, _KINDS[name]) for name, value in known.items()):
        return None
    try:
        return kind(**known)
    except TypeError:
        return None
