"""How a study goes, on a terminal and elsewhere: lines as things happen, and what runs now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron.commands.status_words import span
from megatron.commands.tables import new_table
from megatron.config.quantities import format_count
from megatron.study.node_config import node_folder
from megatron.study.node_state import title
from megatron.study.plan import PlannedStudy
from megatron.study.run_nodes import Running

_LIVE_SECONDS = 0.5


class StudyProgress:
    """Shows lines with the time of day, and what runs: redrawn below them on a terminal; elsewhere a line now and then.

    every: seconds between such lines.
    """

    def __init__(self, planned: PlannedStudy, tasks: int, console: Console, every: float = 30.0) -> None:
        self._planned, self._tasks, self._console = planned, tasks, console
        self._every = _LIVE_SECONDS if console.is_terminal else every
        self._shown = time.monotonic()
        # drawn by hand: no thread beside the one that starts processes
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> StudyProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line."""
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", soft_wrap=True)
        if self._live is None:
            self._console.file.flush()

    def show(self, running: Sequence[Running], left: int, seconds: float | None) -> None:
        """What runs now. left: tasks that are not done; seconds: until all is trained, where that is known."""
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        done = f"{self._tasks - left} of {self._tasks} done"
        if seconds is not None:
            done += f", {span(seconds)} of training left"
        if self._live is not None:
            self._live.update(Group(self._table(running), Text(done)), refresh=True)
            return
        at_work = "; ".join(self._line(one) for one in running)
        self.say(f"{done}; {at_work}" if at_work else done)

    def _table(self, running: Sequence[Running]) -> Table:
        table = new_table("", "node", "task", "step", "done", "loss", "tokens/s", "since")
        for column in (0, 1):
            table.columns[column].justify = "left"
        for one in running:
            progress = one.progress
            cells = ["–"] * 4
            if progress is not None:
                cells = [
                    f"{progress.step:,} of {progress.steps:,}",
                    f"{progress.tokens / progress.total:.0%}" if progress.total else "–",
                    "–" if progress.loss is None else f"{progress.loss:.4f}",
                    "–" if progress.tokens_per_second is None else format_count(round(progress.tokens_per_second)),
                ]
            name = self._name(one)
            table.add_row(name, one.task.kind, *cells, span(time.time() - one.began))
        return table

    def _name(self, one: Running) -> str:
        more = len(one.tasks) - 1
        words = title(self._planned.graph, one.task.node) + (f" and {more} more" if more else "")
        return f"{words}, {self._evaluated(one)} of them done," if more else words

    def _evaluated(self, one: Running) -> int:
        """How many nodes of a process that evaluates several have their results from it."""
        files = [node_folder(self._planned, task.node).results for task in one.tasks]
        return sum(file.exists() and file.stat().st_mtime >= one.began for file in files)

    def _line(self, one: Running) -> str:
        name, progress = self._name(one), one.progress
        if progress is None:
            return f"{name} {one.task.kind}"
        loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
        rate = progress.tokens_per_second
        speed = "" if rate is None else f", {format_count(round(rate))} tokens/s"
        return f"{name} step {progress.step:,} of {progress.steps:,}{loss}{speed}"
