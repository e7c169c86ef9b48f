"""Where a run's rows go. metrics.jsonl is always written; the other sinks are optional."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron.config.errors import IO_REMEDIES, StorageError

Row = Mapping[str, Any]


class Sink(Protocol):
    """Takes one row a step; a row is a flat mapping with "step", or a validation row with "validation", or a row with
    "evaluation", which comes when that is done: "step" is then that of the run, "evaluated_step" the model's.

    The first row of steps after each start of the run also has "start": words on what runs since then, label by label.
    """

    def write(self, row: Row) -> None:
        """Takes a row."""

    def sync(self) -> None:
        """Makes every row so far durable."""

    def close(self) -> None:
        """No more rows."""


class JsonlSink:
    """One JSON object a line, in one write each, so that a killed process leaves whole lines. NaN becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the sink)

    def write(self, row: Row) -> None:
        """Appends the row. Raises StorageError."""
        line = json.dumps(_finite(row), allow_nan=False, ensure_ascii=False) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            raise _told(error, self.path, "append a row") from error

    def _append(self, line: bytes) -> None:
        """All of the line or nothing: a disk that becomes full takes a part without a word, and the next row, once
        there is room again, would be glued to it."""
        done = 0
        try:
            while done < len(line):
                done += self._file.write(line[done:]) or 0
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - done)
            raise

    def sync(self) -> None:
        """fsyncs the file. Raises StorageError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _told(error, self.path, "fsync") from error

    def cut_after(self, step: int) -> int:
        """`cut_after` of its file, and goes on behind what is left."""
        self._file.close()
        try:
            return cut_after(self.path, step)
        finally:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def cut_after(path: Path, step: int) -> int:
    """Moves the rows of `path` past `step`, and lines torn by a kill, to NAME.discarded.jsonl; gives how many.

    They are appended there and made durable before the shortened file replaces the old one in one rename: a kill
    between the two loses nothing (at worst a row is set aside twice). Raises StorageError; `path` is then as it was.
    """
    if not path.exists():
        return 0
    aside = path.with_name(f"{path.stem}.discarded.jsonl")
    kept_path = path.with_name(f".{path.name}.tmp")
    try:
        return _cut(path, step, kept_path, aside)
    except OSError as error:
        with contextlib.suppress(OSError):
            kept_path.unlink(missing_ok=True)  # on a full disk, room for nothing
        raise _told(error, path, f"set its rows beyond step {step} aside") from error


def _cut(path: Path, step: int, kept_path: Path, aside: Path) -> int:
    count = 0
    with open(path, "rb") as rows, open(kept_path, "wb") as kept, open(aside, "ab") as discarded:
        for line in rows:
            if _step_of(line) <= step:
                kept.write(line)
            else:
                discarded.write(line if line.endswith(b"\n") else line + b"\n")
                count += 1
        for file in (discarded, kept):
            file.flush()
            os.fsync(file.fileno())
    if count:
        os.replace(kept_path, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    else:
        kept_path.unlink()
        if not aside.stat().st_size:
            aside.unlink()
    return count


def _told(error: OSError, path: Path, action: str) -> StorageError:
    remedy = IO_REMEDIES.get(error.errno or 0, "see to the disk")
    return StorageError(f"{path}: cannot {action}: {error.strerror}: {remedy}, then start the run again")


def _step_of(line: bytes) -> float:
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def flat_numbers(row: Row) -> dict[str, float]:
    """The row's numbers under dotted names, as dashboards want them: {"loss_by_source/code": 1.5, …}."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers.update({f"{key}/{name}": number for name, number in flat_numbers(value).items()})
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers[key] = float(value)
    return numbers
