"""What `gpu.py` keeps: `<date>-gpu.json`, and the same as tables in `<date>-gpu.md`, written anew after every row.

A row belongs to a part and a job; a job that runs again replaces its own rows and leaves all others. Every row says
which run of the script it is from, and every run is there with its command, machine and versions.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_FEW = 3
"""Columns of a row that says hardly more than its job's name and its run."""

DRY = "DRY RUN: interpreted or on a CPU, at tiny shapes. These figures say nothing about any machine."


class Results:
    """The rows of one day's file, those of earlier runs among them."""

    def __init__(self, folder: Path, run: Mapping[str, str], dry: bool) -> None:
        """run: what `run_words` gives."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{time.strftime('%Y-%m-%d')}-gpu{'-dry' * dry}.json"
        self._dry = dry
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self._runs: list[dict[str, str]] = [*found.get("runs", []), dict(run)]
        self._parts: dict[str, dict[str, Any]] = found.get("parts", {})

    def rows(self, part: str) -> list[Row]:
        """All rows of a part, the newest runs' last."""
        return list(self._parts.get(part, {}).get("rows", []))

    def rows_here(self, part: str) -> list[Row]:
        """Those that were measured on the device that this run has."""
        device = self._runs[-1]["device"]
        return [row for row in self.rows(part) if self._runs[row["run"] - 1]["device"] == device]

    def begin(self, part: str, title: str, notes: str) -> None:
        """A part begins: what it is, and what its columns mean. That an earlier run could not import it is over."""
        held = self._part(part)
        held.update(title=title, notes=notes, left_out=[], rows=[row for row in held["rows"] if row["job"] != "import"])
        self._write()

    def add(self, part: str, job: str, rows: Sequence[Row]) -> None:
        """The rows of a job, in place of those that it had."""
        held = self._part(part)
        held["rows"] = [row for row in held["rows"] if row["job"] != job]
        held["rows"] += [{"job": job, **row, "run": len(self._runs)} for row in rows]
        self._write()

    def leave_out(self, part: str, jobs: Sequence[str], why: str) -> None:
        """Jobs that were not begun."""
        self._part(part)["left_out"] += [f"{job} ({why})" for job in jobs]
        self._write()

    def end(self, part: str, seconds: float) -> None:
        """A part is over."""
        self._part(part)["seconds"] = round(seconds, 1)
        self._write()

    def _part(self, part: str) -> dict[str, Any]:
        return self._parts.setdefault(part, {"rows": [], "left_out": []})

    def _write(self) -> None:
        tables = {"runs": self._runs, "parts": dict(sorted(self._parts.items()))}
        if self._dry:
            tables = {"dry_run": DRY, **tables}
        _replace(self.path, json.dumps(tables, indent=1) + "\n")
        _replace(self.path.with_suffix(".md"), self._words())

    def _words(self) -> str:
        title = f"# GPU figures, {self.path.name[:10]}"
        lines = [title, "", *([f"**{DRY}**", ""] if self._dry else [])]
        lines += ["Runs of `benchmarks/gpu.py`; the last column of every table says which one a row is from.", ""]
        lines += table([{"run": number, **run} for number, run in enumerate(self._runs, 1)])
        for part, held in sorted(self._parts.items()):
            lines += ["", f"## {part}: {held['title']}", "", held.get("notes", ""), ""]
            lines += _tables(held["rows"])
            if held["left_out"]:
                lines += ["", f"Left out: {'; '.join(held['left_out'])}."]
            if "seconds" in held:
                lines += ["", f"{held['seconds']} seconds."]
        return "\n".join(lines) + "\n"


def _tables(rows: Sequence[Row]) -> list[str]:
    """Rows with the same columns stand in one table, in the order in which such rows first came; jobs are named where
    the columns do not say as much."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        row = {key: value for key, value in row.items() if key != "job" or len(row) <= _FEW}
        kinds.setdefault(tuple(row), []).append(row)
    lines: list[str] = []
    for kind in kinds.values():
        lines += ["", *table(kind)] if lines else table(kind)
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines of rows with the same keys."""
    if not rows:
        return []
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return lines + [f"| {' | '.join(cell(value).replace('|', '/') for value in row.values())} |" for row in rows]


def cell(value: object) -> str:
    """A number with four figures, whole numbers with commas; anything else as it is."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def line_of(row: Row) -> str:
    """A row as a line for the terminal."""
    return ", ".join(f"{key} {cell(value)}" for key, value in row.items())


def _replace(path: Path, text: str) -> None:
    """Whole or as it was: who is killed while he writes loses nothing."""
    beside = path.with_suffix(path.suffix + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
