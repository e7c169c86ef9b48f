"""What a job asks of SLURM's controller about itself, by the program scontrol: its state, nodes, and to start it again;
and how jobs are cancelled.

`scontrol requeue` ends the job that calls it: SLURM sends SIGTERM to the batch script and all that it runs, KillWait
seconds later SIGKILL. So it does at the time limit, and for scancel. ExcNodeList can be changed only of a job that
waits, and so after the requeue: whoever calls it has said and written everything before, and calls `stand_fast` first.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.launch.allocation import job_of

SECONDS = 60
_UNUSABLE = ("DOWN", "DRAIN", "FAIL", "MAINT", "UNKNOWN", "FUTURE", "INVAL")
_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)$")
_OVER = re.compile(r"Invalid job id|already completing or completed", re.IGNORECASE)


class ControlError(Exception):
    """scontrol could not be asked, or refused; the message says what it said."""


def this_job() -> dict[str, Any]:
    """The job that this process runs in, as `allocation.job_of`; {} outside SLURM."""
    return job_of(os.environ)


def job_name(job: Mapping[str, Any]) -> str:
    """How scontrol names a job: its id; a task of an array by the array's id and its number in it."""
    if "array_job" in job and "array_task" in job:
        return f"{job['array_job']}_{job['array_task']}"
    return str(job["id"])


def stand_fast() -> None:
    """From now on this process, and what it starts, ignores the signals that SLURM sends to all of a job that is to
    end: a decision takes a moment, and is not to be cut short."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class JobFacts:
    """`scontrol show job`, field by field.

    state: RUNNING, COMPLETING, … seconds, limit: run so far, and allowed; None: unlimited, or not said. preempted: a
    preemption has begun.
    """

    state: str
    restarts: int
    nodes: int
    partitions: tuple[str, ...]
    excluded: str
    required: str
    seconds: float | None
    limit: float | None
    preempted: bool
    may_requeue: bool


class Controller:
    """scontrol for one job."""

    def __init__(self, name: str) -> None:
        self.name = name

    def facts(self) -> JobFacts:
        """Raises ControlError."""
        fields = _fields(self._ask("show", "job", "--oneliner", self.name))
        return JobFacts(
            state=fields.get("JobState", ""),
            restarts=_whole(fields.get("Restarts", "0")),
            nodes=max(1, _whole(fields.get("NumNodes", "1").partition("-")[0])),
            partitions=tuple(filter(None, _known(fields.get("Partition", "")).split(","))),
            excluded=_known(fields.get("ExcNodeList", "")),
            required=_known(fields.get("ReqNodeList", "")),
            seconds=_seconds(fields.get("RunTime", "")),
            limit=_seconds(fields.get("TimeLimit", "")),
            preempted=fields.get("PreemptTime", "None") not in ("None", "", "Unknown"),
            may_requeue=fields.get("Requeue", "1") != "0",
        )

    def expand(self, hosts: str) -> list[str]:
        """Names in SLURM's short spelling, "node[1-3]", one by one. Raises ControlError."""
        return self._ask("show", "hostnames", hosts).split() if hosts else []

    def usable_nodes(self, partitions: Sequence[str]) -> dict[str, str]:
        """Nodes of these partitions that can take jobs, sooner or later, with the host name of each.

        Raises ControlError.
        """
        found = {}
        for line in self._ask("show", "node", "--oneliner").splitlines():
            fields = _fields(line)
            states = re.split(r"[+*~#$@^!%-]", fields.get("State", "").upper())
            mine = not partitions or set(fields.get("Partitions", "").split(",")) & set(partitions)
            if mine and not any(state.startswith(_UNUSABLE) for state in states if state):
                found[fields["NodeName"]] = fields.get("NodeHostName", fields["NodeName"])
        return found

    def requeue(self) -> None:
        """Ends this job, and puts it back in the queue. Raises ControlError."""
        self._ask("requeue", self.name)

    def exclude(self, hosts: Iterable[str]) -> None:
        """Sets the nodes that a waiting job must not get. Raises ControlError."""
        self._ask("update", f"JobId={self.name}", f"ExcNodeList={','.join(hosts)}")

    def _ask(self, *words: str) -> str:
        said = f"scontrol {' '.join(words)}"
        done = asked(["scontrol", *words], said)
        if done.returncode:
            words_of = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
            raise ControlError(f"{said}: {words_of}")
        return done.stdout


def asked(words: Sequence[str], said: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """What a program of SLURM answered, whatever its exit code. Raises ControlError, which begins with `said`, where it
    is not there or does not answer in so many seconds."""
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except FileNotFoundError:
        raise ControlError(f"there is no program {words[0]} in PATH") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ControlError(f"{said}: {error}") from None


def cancel_jobs(jobs: Sequence[str], waiting_only: bool = False) -> None:
    """Cancels jobs by their ids; those that have ended meanwhile are passed over. waiting_only: none that runs.

    Raises ControlError.
    """
    if not jobs:
        return
    words = ["scancel", *(["--state=PENDING"] if waiting_only else []), *jobs]
    done = asked(words, "scancel")
    said = [line for line in done.stderr.splitlines() if line.strip() and not _OVER.search(line)]
    if done.returncode and said:
        raise ControlError(f"scancel: {' '.join(said)}")


def nodes_of_hosts(hosts: Iterable[str], nodes: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """SLURM's names of hosts, in their order, and hosts for which there is no one name.

    nodes: host name by node name. A host is known by the node's name or its host name, with or without its domain.
    """
    found, unknown = [], []
    for host in hosts:
        short = host.partition(".")[0]
        names = [host] if host in nodes else [short] if short in nodes else []
        names = names or [name for name, of in nodes.items() if of in (host, short) or of.partition(".")[0] == short]
        if len(names) == 1:
            found.append(names[0])
        else:
            unknown.append(host)
    return found, unknown


def _fields(line: str) -> dict[str, str]:
    """Key=value words; values with blanks, which only free text has, are cut."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _known(value: str) -> str:
    return "" if value in ("(null)", "None", "N/A") else value


def _whole(value: str) -> int:
    return int(value) if value.isdecimal() else 0


def _seconds(value: str) -> float | None:
    """A duration "1-02:03:04" in seconds; None for UNLIMITED and the like."""
    match = _TIME.match(value)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
