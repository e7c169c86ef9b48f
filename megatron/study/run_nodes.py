"""The nodes of a study made and evaluated on this machine: processes of our commands, several at a time.

A node is begun when what it goes on from is done; those that hold up most come first. A failure leaves the others: what
goes on from the failed one is blocked. Nothing here trains: each node is a run of `stagemix train`, which resumes by
itself, claims its folder, and saves and stops when it is asked.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from megatron.config.errors import EXIT_BUG, EXIT_CHECKPOINT, EXIT_DONE, EXIT_REQUEUE, StagemixError
from megatron.launch.attempts import read_exit, reason_words
from megatron.launch.child_process import ChildProcess, last_lines
from megatron.launch.living_run import is_claimed, living_process
from megatron.study.due_tasks import Task, Tasks, urgency
from megatron.study.node_config import node_folder, node_words, study_folder, write_node
from megatron.study.node_parts import EVALUATION_LOG, Evaluated
from megatron.study.node_progress import NodeProgress
from megatron.study.node_state import is_evaluated, title, trained_checkpoint
from megatron.study.plan import PlannedStudy
from megatron.study.run_options import RunOptions
from megatron.study.stop_asked import StopAsked
from megatron.study.study_lock import StudyLock

PAUSE = 0.2
_LAST_LINES = 8


@dataclass(frozen=True)
class Ended:
    """A task that ended otherwise than well. code: its process's · lines: the last of its log."""

    task: Task
    code: int
    reason: str
    log: Path
    lines: Sequence[str] = ()


@dataclass
class Outcome:
    """How a run of a study ended. blocked: tasks that could not begin, each with the failed or stopped one before
    it · left: tasks that were not begun because the study was stopped · signal: that stopped it; ""."""

    done: list[Task] = field(default_factory=list)
    failed: list[Ended] = field(default_factory=list)
    stopped: list[Ended] = field(default_factory=list)
    blocked: dict[Task, Task] = field(default_factory=dict)
    left: list[Task] = field(default_factory=list)
    signal: str = ""

    @property
    def code(self) -> int:
        """The exit code: 75 of a study that was asked to stop, else that of the first failure, else 75 where a node was
        asked to stop by itself."""
        if self.signal:
            return EXIT_REQUEUE
        if self.failed:
            return self.failed[0].code
        return EXIT_REQUEUE if self.stopped else EXIT_DONE


@dataclass
class Running:
    """Tasks at work in one process: one, or several nodes to evaluate, since loading what that needs takes longer than
    many an evaluation. child: None where the process is not ours: `where` tells of it."""

    tasks: tuple[Task, ...]
    slot: int
    child: ChildProcess | None
    where: str
    began: float
    progress: NodeProgress | None = None

    @property
    def task(self) -> Task:
        """The first."""
        return self.tasks[0]


class Watcher(Protocol):
    """Who shows how a study goes."""

    def say(self, text: str) -> None:
        """A line."""

    def show(self, running: Sequence[Running], left: int, seconds: float | None) -> None:
        """Several times a second. left: tasks that are not done; seconds: until all is trained, where that is known."""


class NodeRunner:
    """Carries tasks out. `run` gives the outcome."""

    def __init__(
        self, planned: PlannedStudy, tasks: Tasks, options: RunOptions, watcher: Watcher, lock: StudyLock
    ) -> None:
        self._planned, self._tasks, self._options = planned, tasks, options
        self._watcher, self._lock = watcher, lock
        self._urgency = urgency(planned, tasks)
        self._running: list[Running] = []
        self._outcome = Outcome()
        self._asked = 0
        self._progress = {task.node: NodeProgress(planned, task.node) for task in tasks if task.kind == "train"}
        self._began = time.monotonic()
        self._tokens_then = sum(one.tokens for one in self._progress.values())

    def run(self) -> Outcome:
        """Until nothing can be done any more, or all is stopped. OSError, StagemixError of the study's own folder, once
        everything that was started has been stopped."""
        with StopAsked() as stop:
            try:
                while True:
                    self._end_ended()
                    self._pass_on(stop)
                    if not stop.count:
                        self._begin_ready()
                    if not self._running or (stop.count and all(one.child is None for one in self._running)):
                        break
                    self._lock.beat()
                    self._show()
                    time.sleep(PAUSE)
            finally:
                self._stop_all(stop)
        outcome = self._outcome
        outcome.signal = stop.name
        known = {*outcome.done, *outcome.blocked, *(one.task for one in (*outcome.failed, *outcome.stopped))}
        outcome.left = [task for task in self._tasks if task not in known]
        return outcome

    # -- begin ---------------------------------------------------------------------------------------------------------

    def _begin_ready(self) -> None:
        if self._outcome.failed and not self._options.keep_going:
            return
        ready = sorted(self._ready(), key=lambda task: self._urgency[task], reverse=True)
        while ready and (free := self._free()):
            # what is evaluated at once shares a process; the share of a slot that still trains waits for it
            count = 1 if ready[0].kind != "evaluate" else -(-len(ready) // self._options.at_once)
            self._begin(tuple(ready[:count]), free[0])
            del ready[:count]

    def _free(self) -> list[int]:
        taken = {one.slot for one in self._running}
        return [slot for slot in range(self._options.at_once) if slot not in taken]

    def _ready(self) -> list[Task]:
        outcome = self._outcome
        begun = {*outcome.done, *(task for one in self._running for task in one.tasks)}
        begun |= {one.task for one in (*outcome.failed, *outcome.stopped)}
        open_tasks = [task for task in self._tasks if task not in begun and task not in outcome.blocked]
        return [task for task in open_tasks if all(one in outcome.done for one in self._tasks[task])]

    def _begin(self, tasks: tuple[Task, ...], slot: int) -> None:
        task, name = tasks[0], ", ".join(title(self._planned.graph, one.node) for one in tasks)
        progress = self._progress.get(task.node) if task.kind == "train" else None
        if task.kind == "train" and (where := self._other(task)):
            self._watcher.say(f"{name}: {where} is training it: waiting for that")
            self._running.append(Running(tasks, slot, None, where, time.time(), progress))
            return
        log = study_folder(self._planned).logs / f"{task.node}-{task.kind}.log"
        try:
            words = self._words(tasks)
        except StagemixError as error:
            self._fail(Ended(task, error.exit_code, str(error), log))
            return
        processes = self._options.processes if task.kind == "train" else 1
        child = ChildProcess(words, log, self._options.threads, processes, self._options.device(slot))
        at = f", from step {progress.step:,} of {progress.steps:,}" if progress and progress.step else ""
        self._watcher.say(f"{name}: {task.kind} begins{at} (pid {child.pid}, {log})")
        self._running.append(Running(tasks, slot, child, f"pid {child.pid}", child.started, progress))

    def _words(self, tasks: tuple[Task, ...]) -> list[str]:
        """The command of tasks, whose files are written."""
        task = tasks[0]
        if task.kind != "evaluate":
            write_node(self._planned, task.node)
            return node_words(self._planned, task.node)
        words = ["study", "evaluate", str(self._planned.study.path), "--threads", str(self._options.threads)]
        words += [word for one in tasks for word in ("--node", one.node)]
        if self._options.seeds:
            words += ["--seeds", ",".join(map(str, self._options.seeds))]
        return words

    def _other(self, task: Task) -> str:
        """Words for a process that trains the node already: one that outlived who started it, or a user's."""
        folder = node_folder(self._planned, task.node).path
        return living_process(folder, time.time()) or ("another process" if is_claimed(folder) else "")

    # -- end -----------------------------------------------------------------------------------------------------------

    def _end_ended(self) -> None:
        for one in list(self._running):
            if one.child is None:
                if not self._other(one.task):
                    self._running.remove(one)  # what it left decides what is next
                    if self._is_done(one.task):
                        self._well(one)
            elif (code := one.child.poll()) is not None:
                self._running.remove(one)
                for task in one.tasks:
                    self._ended(replace(one, tasks=(task,)), one.child, code)

    def _ended(self, one: Running, child: ChildProcess, code: int) -> None:
        task, name = one.task, title(self._planned.graph, one.task.node)
        if self._is_done(task) and (code == EXIT_DONE or self._ended_well(task, child, code)):
            self._well(one)
            return
        if code and task.kind == "train" and not self._asked and (where := self._foreign(task, child)):
            self._watcher.say(f"{name}: {where} has been quicker: waiting for that")
            self._running.append(Running((task,), one.slot, None, where, time.time(), one.progress))
            return
        ended = self._why(task, child, code)
        if ended.code == EXIT_REQUEUE or (self._asked and code > 128):
            self._outcome.stopped.append(ended)
            self._watcher.say(f"{name}: {task.kind} stopped: {reason_words(ended.reason, 200)}")
            if not self._asked:
                self._block(task)
        else:
            self._fail(ended)

    def _fail(self, ended: Ended) -> None:
        self._outcome.failed.append(ended)
        name, why = title(self._planned.graph, ended.task.node), reason_words(ended.reason, 200)
        self._watcher.say(f"{name}: {ended.task.kind} failed, exit code {ended.code}: {why}")
        if not self._asked:
            self._block(ended.task)

    def _well(self, one: Running) -> None:
        self._outcome.done.append(one.task)
        if one.progress is not None:
            one.progress.read()
            one.progress.done = True
        what = {"train": "trained", "average": "averaged", "evaluate": "evaluated"}[one.task.kind]
        loss = one.progress.words() if one.progress is not None else ""
        seconds = time.time() - one.began
        if one.task.kind == "evaluate":  # of the node alone: its process may have been at others, too
            folder = node_folder(self._planned, one.task.node)
            seconds = Evaluated(folder).seconds_since(one.began - 1) or seconds
        self._watcher.say(f"{title(self._planned.graph, one.task.node)}: {what} in {seconds:.0f} s{loss}")

    def _is_done(self, task: Task) -> bool:
        if task.kind == "evaluate":
            return is_evaluated(self._planned, task.node)
        return trained_checkpoint(self._planned, task.node) is not None

    def _ended_well(self, task: Task, child: ChildProcess, code: int) -> bool:
        """Whether a done task's process ended well, whatever its exit code: it failed over another node when it had
        evaluated this one, or was asked to stop as it had just trained all."""
        folder = node_folder(self._planned, task.node)
        if task.kind == "evaluate":
            failed = Evaluated(folder).failures_since(child.started - 1)
            return not failed and folder.results.stat().st_mtime >= child.started - 1
        record = read_exit(folder.path) if task.kind == "train" else None
        if record is not None and record.time >= child.started - 1 and record.code == EXIT_DONE:
            return True
        return code == EXIT_REQUEUE or bool(self._asked and code > 128)

    def _foreign(self, task: Task, child: ChildProcess) -> str:
        where = self._other(task)
        return "" if where.startswith(f"pid {child.pid} ") else where

    def _why(self, task: Task, child: ChildProcess, code: int) -> Ended:
        if task.kind == "evaluate" and (own := self._of_its_parts(task, child)) is not None:
            return own
        lines = child.last_lines(_LAST_LINES)
        said = [line.partition("error: ")[2] for line in lines if "error: " in line]
        reason = said[-1] if said else lines[-1] if lines else "it said nothing"
        record = read_exit(node_folder(self._planned, task.node).path) if task.kind == "train" else None
        if record is not None and record.time >= child.started - 1:
            code, reason = record.code or code, record.reason
        elif code > 128:
            with contextlib.suppress(ValueError):
                by = signal.Signals(code - 128).name
                reason = f"killed by {by}" + (": was there too little memory?" if by == "SIGKILL" else "")
        elif code == EXIT_DONE:
            code = EXIT_CHECKPOINT if task.kind != "evaluate" else EXIT_BUG
            left = "results.json" if task.kind == "evaluate" else "a whole checkpoint at its end"
            reason = f"it ended well, and left no {left}"
        return Ended(task, code, reason, child.log, lines)

    def _of_its_parts(self, task: Task, child: ChildProcess) -> Ended | None:
        """Why a node's evaluation failed, by the node's own record and log: the process' log is of several nodes."""
        folder = node_folder(self._planned, task.node)
        failed = Evaluated(folder).failures_since(child.started - 1)
        if not failed:
            return None
        log = folder.path / EVALUATION_LOG
        words = [f"{part}: {reason}" for part, (_, reason) in failed.items()]
        return Ended(task, next(iter(failed.values()))[0], "; ".join(words), log, last_lines(log, _LAST_LINES))

    def _block(self, task: Task) -> None:
        """Everything that needs a task, over others, too; tasks come after those that they need."""
        blocked = self._outcome.blocked
        for other, before in self._tasks.items():
            held = [blocked.get(one, one) for one in before if one == task or one in blocked]
            if held and other not in blocked:
                blocked[other] = held[0]

    # -- stop ----------------------------------------------------------------------------------------------------------

    def _pass_on(self, stop: StopAsked) -> None:
        """A stop, and each further one, to every process: a run saves and stops at the first, ends at the second."""
        if stop.count <= self._asked:
            return
        self._asked = stop.count
        children = [one for one in self._running if one.child is not None]
        again = "" if stop.count == 1 else " again: ending at once"
        self._watcher.say(f"{stop.name}{again}: {len(children)} running: they save and stop")
        for one in children:
            assert one.child is not None
            one.child.send(signal.SIGTERM)

    def _stop_all(self, stop: StopAsked) -> None:
        """Nothing that was started is left behind, whatever happened here."""
        children = [one.child for one in self._running if one.child is not None]
        for child in children:
            child.send(signal.SIGTERM)
        for child in children:
            while child.wait(PAUSE) is None:
                self._lock.beat()
                self._pass_on(stop)

    # -- show ----------------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        for one in self._running:
            if one.progress is not None:
                one.progress.read()
        ended = (*self._outcome.done, *self._outcome.blocked, *(one.task for one in self._outcome.failed))
        self._watcher.show(self._running, len(self._tasks) - len(ended), self._seconds_left())

    def _seconds_left(self) -> float | None:
        """At the pace of this run of the study so far, with all that is beside of steps."""
        tokens = sum(one.tokens for one in self._progress.values()) - self._tokens_then
        if tokens <= 0:
            return None
        blocked = {task.node for task in self._outcome.blocked} | {one.task.node for one in self._outcome.failed}
        left = sum(one.left for name, one in self._progress.items() if name not in blocked)
        if not left:
            return None
        return left * (time.monotonic() - self._began) / tokens
