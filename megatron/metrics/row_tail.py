"""The end of metrics.jsonl: what a run does now, without reading what it did in its first million steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASIDE = ("validation", "checkpoint", "evaluation")
"""What a run spends time on between steps: rows have "NAME_seconds" of it, and "step_seconds" leaves it out."""
RECENT = 50
_AT_FIRST, _AT_MOST = 2 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class RowTail:
    """Rows at the end of a file, in its order. unread: bytes before them. modified: unix seconds; None: no file."""

    steps: Sequence[Mapping[str, Any]] = ()
    validation: Mapping[str, Any] | None = None
    unread: int = 0
    modified: float | None = None

    @property
    def last(self) -> Mapping[str, Any]:
        """The last row of a step; {} where there is none."""
        return self.steps[-1] if self.steps else {}

    def beyond(self, step: int) -> list[Mapping[str, Any]]:
        """Rows of later steps."""
        return [row for row in self.steps if row["step"] > step]

    def reaches(self, step: int) -> bool:
        """Whether no row of a later step is among what was not read."""
        return not self.unread or bool(self.steps and self.steps[0]["step"] <= step + 1)


@dataclass(frozen=True)
class Pace:
    """Means over recent rows. tokens: input positions, of which padding hold no token. seconds: of a step, without what
    is aside of it. aside: seconds a step of each of ASIDE. Losses are means of finite ones; None, or absent, where
    there is none."""

    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    aside: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    loss_by_source: Mapping[str, float] = field(default_factory=dict)
    mfu: float | None = None
    padding: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of steps alone, without padding."""
        return (self.tokens - self.padding) / self.seconds if self.seconds > 0 else None

    @property
    def padding_share(self) -> float:
        """Of the input positions."""
        return self.padding / self.tokens if self.tokens > 0 else 0.0

    @property
    def seconds_per_token(self) -> float | None:
        """An input position, padding or not, with all that is aside of steps."""
        return (self.seconds + sum(self.aside.values())) / self.tokens if self.tokens > 0 else None


def read_tail(path: Path, since: int | None = None, at_least: int = _AT_FIRST, at_most: int = _AT_MOST) -> RowTail:
    """The rows in the last `at_least` bytes of a file, or more where the rows of all steps after `since` need it, up to
    `at_most` bytes. What is no row, a torn line say, is left out. An empty tail where there is no file. OSError."""
    size = at_least
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            while True:
                begin = max(0, status.st_size - size)
                steps, validation = _rows_from(file.fileno(), begin, status.st_size)
                tail = RowTail(steps, validation, begin, status.st_mtime)
                if since is None or tail.reaches(since) or size >= at_most:
                    return tail
                size = min(4 * size, at_most)
    except FileNotFoundError:
        return RowTail()


def pace_of(rows: Sequence[Mapping[str, Any]], every: int | None = None, save_seconds: float | None = None) -> Pace:
    """Means over the last RECENT rows of steps that were trained on; of what is aside of steps over all rows.

    every, save_seconds: how often the run saves, and how long that takes, for where no save is among the rows.
    """
    trained = [row for row in rows if not row.get("passed_over")]
    recent = trained[-RECENT:]
    aside = {}
    for name in ASIDE:
        seconds = seconds_in(rows, f"{name}_seconds")
        if seconds:
            aside[name] = seconds / len(rows)
    if "checkpoint" not in aside and every and save_seconds:
        aside["checkpoint"] = save_seconds / every
    sources = sorted({name for row in recent for name in row.get("loss_by_source") or {}})
    losses = {name: _mean((row.get("loss_by_source") or {}).get(name) for row in recent) for name in sources}
    return Pace(
        len(recent),
        seconds_in(recent, "tokens") / max(1, len(recent)),
        seconds_in(recent, "step_seconds") / max(1, len(recent)),
        aside,
        _mean(row.get("loss") for row in recent),
        {name: loss for name, loss in losses.items() if loss is not None},
        _mean(row.get("mfu") for row in recent),
        seconds_in(recent, "padding") / max(1, len(recent)),
    )


def seconds_in(rows: Iterable[Mapping[str, Any]], key: str = "step_seconds") -> float:
    """The sum of one number over rows; rows without it count nothing."""
    return math.fsum(_numbers(row.get(key) for row in rows))


def without_repeats(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows but the second one of two that are the same: a resume that was killed sets rows aside twice."""
    found = {(row["step"], row.get("step_seconds"), row.get("loss"), row.get("batch_digest")): row for row in rows}
    return list(found.values())


def objects_in(content: bytes) -> Iterator[dict[str, Any]]:
    """JSON objects, a line each. What is none, a line that a kill tore say, is left out."""
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _rows_from(descriptor: int, begin: int, end: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    content = os.pread(descriptor, end - begin, begin)
    if begin:
        content = content[content.find(b"\n") + 1 :]  # the middle of a line, or a whole one too many
    steps, validation = [], None
    for row in objects_in(content):
        if not isinstance(row.get("step"), int) or "evaluation" in row:
            continue
        if "validation" in row:
            validation = row
        elif "consumed_tokens" in row:
            steps.append(row)
    return steps, validation


def _mean(values: Iterable[Any]) -> float | None:
    numbers = _numbers(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def _numbers(values: Iterable[Any]) -> list[float]:
    kinds = (int, float)
    return [value for value in values if isinstance(value, kinds) and value is not True and math.isfinite(value)]
