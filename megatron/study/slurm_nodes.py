"""The SLURM jobs of a study: which are needed, what each waits for, and which of them SLURM knows already.

A job trains a node, averages, evaluates a node, or makes the report; (node, task) is its key. It carries its key in its
comment, so that it is found again by whoever submits next, also where the one before was killed between two calls of
sbatch. `jobs.jsonl` in the study's folder is the record for people, and for `study status` when a job is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.config.errors import ConfigError
from megatron.launch.attempts import read_attempts
from megatron.launch.run_queue import ListedJob, my_jobs
from megatron.launch.slurm_control import ControlError, job_name
from megatron.launch.slurm_submit import submissions
from megatron.study.node_folder import StudyFolder

Task = Literal["train", "average", "evaluate", "report"]
TASKS: tuple[Task, ...] = ("train", "average", "evaluate", "report")
JobKey = tuple[str, Task]
"""A node's id, "" of the report, and what is done."""
REPORT: JobKey = ("", "report")
JOBS = "jobs.jsonl"
"""In the study's folder: a line a submission, {"time", "node", "task", "job", "after", "file"}."""
_MARK = "stagemix-study"
_COMMENT = re.compile(rf"{_MARK} (\w+|-) (\w+) (.+)$")


@dataclass(frozen=True)
class NodeJob:
    """What `study status` shows of a job. state: as squeue says it; "BLOCKED" of one that waits for what cannot come
    any more; "GONE" of one that SLURM does not know any more: it ended, failed or was cancelled; "UNKNOWN" where SLURM
    cannot be asked. reason: why it waits, in SLURM's word."""

    job: str
    task: Task
    state: str
    reason: str = ""

    @property
    def living(self) -> bool:
        """Whether it may still do something."""
        return self.state not in ("BLOCKED", "GONE")


def jobs_of(folder: Path) -> dict[str, list[NodeJob]]:
    """By node, "" for the report: the newest job of each of its tasks, in the order of TASKS; {} where nothing was ever
    submitted. folder: the study's. SLURM is asked once, and only where there are jobs; nothing is raised where it does
    not answer."""
    noted = noted_jobs(folder)
    if not noted:
        return {}
    try:
        living = living_jobs(folder, my_jobs(10.0))
    except ControlError:
        living = None
    found: dict[str, list[NodeJob]] = {}
    keys = sorted({*noted, *(living or {})}, key=lambda key: (key[0], TASKS.index(key[1])))
    for node, task in keys:
        if living is None:
            job = NodeJob(noted[(node, task)], task, "UNKNOWN", "SLURM does not answer")
        elif (listed := living.get((node, task))) is None:
            job = NodeJob(noted[(node, task)], task, "GONE")
        else:
            job = NodeJob(listed.id, task, "BLOCKED" if listed.never else listed.state, listed.why)
        found.setdefault(node, []).append(job)
    return found


def queued_words(jobs: Mapping[str, Sequence[NodeJob]]) -> list[str]:
    """A line on jobs that wait or run, for people; none where there are none."""
    shown: dict[str, int] = {}
    for job in (one for ones in jobs.values() for one in ones if one.state != "GONE"):
        why = f" ({job.reason})" if job.state == "PENDING" and job.reason else ""
        words = f"{job.task} {job.state.lower()}{why}"
        shown[words] = shown.get(words, 0) + 1
    return [f"jobs in SLURM: {', '.join(f'{count} {words}' for words, count in shown.items())}"] if shown else []


def refuse_living_jobs(folder: Path) -> None:
    """For who would train nodes of the study elsewhere. folder: the study's. Raises ConfigError where jobs of it still
    wait or run, as far as SLURM can be asked."""
    found = [job for jobs in jobs_of(folder).values() for job in jobs if job.living and job.state != "UNKNOWN"]
    if found:
        shown = ", ".join(f"{job.job} ({job.task}, {job.state.lower()})" for job in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigError(
            f"{folder}: jobs of the study are in SLURM's queue: {shown}{more}: let them end, or cancel them (stagemix "
            "study run STUDY --slurm --cancel)"
        )


# -- jobs that were submitted ------------------------------------------------------------------------------------------


def comment_of(key: JobKey, folder: Path, users: str | None = None) -> str:
    """What a job carries: the user's own words, and its key with the study's folder."""
    node, task = key
    return f"{f'{users} ' if users else ''}{_MARK} {node or '-'} {task} {_absolute(folder)}"


def living_jobs(folder: Path, jobs: Iterable[ListedJob]) -> dict[JobKey, ListedJob]:
    """The jobs among these that are of the study in a folder, by key; of several with one key the newest.

    By the comment, or where a site takes comments away, by the ids in jobs.jsonl.
    """
    by_id = {job: key for key, job in noted_jobs(folder).items()}
    found: dict[JobKey, ListedJob] = {}
    key: JobKey | None
    for job in jobs:
        match = _COMMENT.search(job.comment)
        key = by_id.get(job.id)
        if match is not None:
            said = _key("" if match[1] == "-" else match[1], match[2])
            key = said if match[3] == _absolute(folder) or said == key else None
        if key is not None:
            found[key] = job
    return found


def trainers_by_hand(folder: StudyFolder, nodes: Iterable[str], jobs: Iterable[ListedJob]) -> dict[JobKey, ListedJob]:
    """Jobs among these that train nodes without being the study's: launched by hand on a node's config."""
    by_id = {job.id: job for job in jobs if not _COMMENT.search(job.comment)}
    found: dict[JobKey, ListedJob] = {}
    for node in nodes if by_id else ():
        path = folder.node(node).path
        names = [str(one["job"]) for one in submissions(path / "slurm")]
        names += [job_name(one.job) for one in read_attempts(path)[-1:] if "id" in one.job]
        for name in names:
            if name in by_id:
                found[(node, "train")] = by_id[name]
    return found


def note_job(folder: Path, key: JobKey, job: str, after: Iterable[str], file: Path) -> None:
    """Adds a line to jobs.jsonl. OSError."""
    node, task = key
    row = {"time": time.time(), "node": node, "task": task, "job": job, "after": list(after), "file": str(file)}
    with (folder / JOBS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def noted_jobs(folder: Path) -> dict[JobKey, str]:
    """The newest job of each key, by jobs.jsonl; lines that cannot be read are passed over."""
    found: dict[JobKey, str] = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in (folder / JOBS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row: dict[str, Any] = json.loads(line)
                if (key := _key(str(row["node"]), row["task"])) is not None:
                    found[key] = str(row["job"])
    return found


def _key(node: str, word: str) -> JobKey | None:
    return next(((node, task) for task in TASKS if task == word), None)


def _absolute(folder: Path) -> str:
    return os.path.realpath(folder)


# -- jobs that are needed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A node of a study as far as jobs go. task: what makes it · tokens: how long that takes, to compare nodes by ·
    done: nothing is to be made · evaluate: it is to be evaluated, and is not yet · after_evaluation: nodes whose
    evaluation must have ended before its own begins."""

    id: str
    task: Task
    parents: tuple[str, ...]
    tokens: int
    done: bool
    evaluate: bool
    after_evaluation: tuple[str, ...] = ()


@dataclass(frozen=True)
class NeededJob:
    """A job to be submitted. ok: keys of jobs that must have ended well before it begins; ended: that must have ended,
    however. Each is submitted before it, or lives."""

    key: JobKey
    ok: tuple[JobKey, ...] = ()
    ended: tuple[JobKey, ...] = ()


@dataclass(frozen=True)
class JobPlan:
    """jobs: to be submitted, in this order · kept: of the study, which wait or run and will do their work · stale: of
    the study, which wait for what will not come: to be cancelled first."""

    jobs: tuple[NeededJob, ...]
    kept: Mapping[JobKey, ListedJob]
    stale: tuple[ListedJob, ...]


def plan_jobs(
    nodes: Mapping[str, Wanted], living: Mapping[JobKey, ListedJob], at_once: int | None = None, report: bool = True
) -> JobPlan:
    """What is to be submitted. nodes: by id, parents before children. living: jobs of the study that SLURM knows.

    A job waits for what makes the parents that are not done, and a failed one takes its descendants with it. at_once:
    so many nodes train at a time at most: jobs are put into so many rows, each waiting for the end, however it comes,
    of the one before it; a node goes into the row that is free first, those with the longest way to go behind them
    first. report: one job after all others, where there is anything else to wait for.
    """
    kept, stale = _sorted_out(nodes, living)
    rows = _Rows(at_once, nodes, kept)
    jobs: list[NeededJob] = []
    made: dict[JobKey, tuple[JobKey, ...]] = {}
    for name in _order(nodes):
        node = nodes[name]
        key: JobKey = (name, node.task)
        if not node.done and key not in kept:
            before = tuple((one, nodes[one].task) for one in node.parents if not nodes[one].done)
            ended = rows.place(key, before)
            jobs.append(NeededJob(key, before, tuple(one for one in ended if one not in before)))
            made[key] = (*before, *ended)
        if node.evaluate and (name, "evaluate") not in kept:
            before = () if node.done else (key,)
            others: list[JobKey] = [(other, "evaluate") for other in node.after_evaluation]
            ended = tuple(one for one in others if one in kept or one in made)
            jobs.append(NeededJob((name, "evaluate"), before, ended))
            made[(name, "evaluate")] = (*before, *ended)
    all_keys = [*(key for key in kept if key != REPORT), *made]
    if report and all_keys and (jobs or REPORT not in kept):
        if REPORT in kept:
            stale.append(kept.pop(REPORT))  # it would not wait for what is submitted now
        waited_for = {one for ones in made.values() for one in ones}
        jobs.append(NeededJob(REPORT, ended=tuple(key for key in all_keys if key not in waited_for)))
    return JobPlan(tuple(jobs), kept, tuple(stale))


def _sorted_out(
    nodes: Mapping[str, Wanted], living: Mapping[JobKey, ListedJob]
) -> tuple[dict[JobKey, ListedJob], list[ListedJob]]:
    """Living jobs that will do their work, and those that cannot: their parent's job is another one now, or none. Jobs
    of other nodes, which this time nobody asks about, are kept."""
    kept = dict(living)
    stale: list[ListedJob] = []

    def drop(key: JobKey) -> None:
        if key in kept:
            stale.append(kept.pop(key))

    for name, node in nodes.items():
        of_node: list[tuple[JobKey, tuple[str, ...]]] = [
            ((name, node.task), node.parents),
            ((name, "evaluate"), (name,)),
        ]
        for key, parents in of_node:
            job = kept.get(key)
            if job is None or job.state != "PENDING":
                continue
            needs = [kept.get((one, nodes[one].task)) for one in parents if not nodes[one].done]
            if job.never or any(parent is None or parent.id not in job.after for parent in needs):
                drop(key)
    if REPORT in kept and kept[REPORT].never:
        drop(REPORT)
    return kept, stale


def _order(nodes: Mapping[str, Wanted]) -> list[str]:
    """Parents before children; of those that may come next, the one with the longest way behind it to the end."""
    children: dict[str, list[str]] = {name: [] for name in nodes}
    for name, node in nodes.items():
        for parent in node.parents:
            children[parent].append(name)
    way: dict[str, int] = {}
    for name in reversed(list(nodes)):
        way[name] = nodes[name].tokens + max((way[child] for child in children[name]), default=0)
    place = {name: number for number, name in enumerate(nodes)}
    left = {name: len(node.parents) for name, node in nodes.items()}
    ready = [name for name, count in left.items() if not count]
    order: list[str] = []
    while ready:
        name = min(ready, key=lambda one: (-way[one], place[one]))
        ready.remove(name)
        order.append(name)
        for child in children[name]:
            left[child] -= 1
            if not left[child]:
                ready.append(child)
    return order


class _Rows:
    """So many rows of jobs that train, each job after the end of the one before it in its row."""

    def __init__(self, count: int | None, nodes: Mapping[str, Wanted], kept: Mapping[JobKey, ListedJob]) -> None:
        self._nodes = nodes
        self._free = [0] * (count or 0)
        self._ends: list[list[JobKey]] = [[] for _ in self._free]
        self._finish: dict[JobKey, int] = {}
        living = [(key, job) for key, job in kept.items() if key[1] == "train"]
        for key, job in living if self._free else ():
            # behind the one that it waits for itself, else in the emptiest
            before = [place for place, ends in enumerate(self._ends) if any(kept[e].id in job.after for e in ends)]
            place = before[0] if before else min(range(len(self._free)), key=self._free.__getitem__)
            self._ends[place] = [e for e in self._ends[place] if kept[e].id not in job.after] + [key]
            self._free[place] += nodes[key[0]].tokens if key[0] in nodes else 0
            self._finish[key] = self._free[place]

    def place(self, key: JobKey, before: tuple[JobKey, ...]) -> tuple[JobKey, ...]:
        """Puts a job that trains behind one of the rows; what it waits for there. before: jobs that it waits for
        anyhow."""
        ready = max((self._finish.get(one, 0) for one in before), default=0)
        if not self._free or key[1] != "train":
            self._finish[key] = ready
            return ()
        # the earliest start; of those the row that has waited least, so that others stay free for what could begin now
        row = min(range(len(self._free)), key=lambda one: (max(ready, self._free[one]), -self._free[one]))
        ended = tuple(self._ends[row])
        self._free[row] = max(ready, self._free[row]) + self._nodes[key[0]].tokens
        self._ends[row] = [key]
        self._finish[key] = self._free[row]
        return ended
