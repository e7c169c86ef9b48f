"""Measurements in processes of their own, taken in turns, and the tables of what they gave. Standard library only.

The benchmark's own process stays small: Linux counts what a process had resident before `exec` into its child's peak.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """One measurement. seconds: wall clock of the whole process. peak_mb: resident memory of the largest process of
    its tree, in 1e6 bytes. values: what it printed after `RESULT`. load: load average (1 minute) as it began."""

    seconds: float
    peak_mb: float
    values: dict[str, Any]
    load: float


class MeasurementFailed(Exception):
    """A measured process failed or ran past its limit; the message holds the end of its output."""


def measure(command: Sequence[str | Path], limit: float = 600.0, folder: Path | None = None) -> Outcome:
    """Runs a command to its end. Raises MeasurementFailed.

    Args:
        limit: seconds after which the process and its children are killed.
        folder: working folder.
    """
    os.sync()  # what an earlier measurement left to be written does not fall into this one
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
        )
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        seconds = time.perf_counter() - began
        process.returncode = code = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    if code != 0:
        why = f"ended by its limit of {limit:.0f} s" if seconds >= limit else f"exit code {code}"
        raise MeasurementFailed(f"{why}: {' '.join(map(str, command))[:300]}\n" + "\n".join(lines[-12:]))
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    values = json.loads(results[-1]) if results else {}
    return Outcome(seconds, usage.ru_maxrss * 1024 / 1e6, values, load)


def in_turns(sides: dict[str, Callable[[int], Outcome]], rounds: int) -> dict[str, list[Outcome]]:
    """So many measurements of each side, one of each a round, the order turned round each time."""
    taken: dict[str, list[Outcome]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=number % 2 == 1):
            taken[name].append(sides[name](number))
    return taken


@dataclass(frozen=True)
class Figure:
    """One line of a table: all values of each side. higher: more is better. The ratio is of the medians, above 1
    where ours is the better one."""

    what: str
    unit: str
    peer: Sequence[float] = ()
    ours: Sequence[float] = ()
    goal: str = ""
    higher: bool = False

    def ratio(self) -> float | None:
        """How many times better ours is; None where a side is missing or nothing."""
        if not self.peer or not self.ours:
            return None
        peer, ours = statistics.median(self.peer), statistics.median(self.ours)
        above, below = (ours, peer) if self.higher else (peer, ours)
        return above / below if below > 0 else None

    def cells(self) -> list[str]:
        """The cells of its row."""
        ratio = self.ratio()
        shown = "" if ratio is None else f"{ratio:.1f}x" if ratio < 1000 else f"{ratio:,.0f}x"
        return [self.what, _shown(self.peer, self.unit), _shown(self.ours, self.unit), shown, self.goal]


@dataclass
class Row:
    """A row of the issue's table: its figures, what was checked (each raised if it did not hold), and remarks."""

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    failed: str = ""

    def note_loads(self, taken: dict[str, list[Outcome]]) -> None:
        """Keeps the load averages of measurements."""
        self.loads += [outcome.load for outcomes in taken.values() for outcome in outcomes]

    def markdown(self) -> str:
        """The row as a section."""
        lines = [f"## {self.name}: {self.title}", ""]
        if self.figures:
            lines += ["| | Megatron-LM | ours | better by | goal |", "|---|---|---|---|---|"]
            lines += ["| " + " | ".join(figure.cells()) + " |" for figure in self.figures]
            lines.append("")
        lines += [f"- checked: {text}" for text in self.checks] + [f"- {text}" for text in self.remarks]
        if self.loads:
            lines.append(
                f"- load average (1 min) as measurements began: {min(self.loads):.1f} to {max(self.loads):.1f}"
            )
        if self.failed:
            lines += ["- FAILED:", "", "```", self.failed, "```"]
        return "\n".join(lines) + "\n"


def _shown(values: Sequence[float], unit: str) -> str:
    if not values:
        return ""
    middle = statistics.median(values)
    spread = f" ({_number(min(values))}–{_number(max(values))})" if len(values) > 1 and min(values) != middle else ""
    return f"{_number(middle)} {unit}{spread}".strip()


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def machine() -> list[str]:
    """This machine in a few lines."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    cores = len(os.sched_getaffinity(0))
    return [
        f"machine: {cores} cores of {model}, {memory:.0f} GB of memory, Linux {platform.release()}",
        f"Python {platform.python_version()}, {_versions(PACKAGES)}",
    ]


PACKAGES = ("numpy", "tokenizers", "gigatoken", "sentencepiece", "orjson", "torch", "transformers", "awkward")


def _versions(names: Sequence[str]) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def commit_of(tree: Path) -> str:
    """The commit that a tree is at, and whether its tracked files were changed."""
    command = ["git", "-C", str(tree)]
    try:
        run = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=60)
        dirty = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"
    return run.stdout.strip() + (" with changed files" if dirty.stdout.strip() else "")
