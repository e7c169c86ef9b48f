"""The data of a suite's tasks: JSON lines from a local folder, each field checked, or rows that the harness fetched.

Every complaint names file, line and field. Nothing in the folder but the files named by the suite is opened, and
nothing in them is ever executed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import DataError
from megatron.evaluation.suite import FieldKind, SuiteTask

Row = dict[str, Any]

_FORMAT_FIELDS: dict[str, dict[str, FieldKind]] = {
    "humaneval": {"task_id": "text", "prompt": "text", "entry_point": "text", "test": "text"},
    "mbpp": {"code": "text", "test_list": "texts"},
}


@dataclass(frozen=True)
class TaskData:
    """Rows that were read and found right. `left_out`: of them, how many the suite leaves out. `origin`: for people."""

    rows: list[Row]
    left_out: int
    origin: str


def fields_of(task: SuiteTask) -> dict[str, FieldKind]:
    """What every line of the task's data file must hold."""
    return {**_FORMAT_FIELDS.get(task.format, {}), **task.fields}


def find_file(task: SuiteTask, folder: Path | None) -> Path | None:
    """The task's file in `folder`, gzip-compressed or not, or None."""
    if folder is None:
        return None
    candidates = (folder / task.data_file, folder / f"{task.data_file}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_data(task: SuiteTask, path: Path) -> TaskData:
    """All rows of a local file. Raises DataError with file, line and field."""
    rows = []
    for number, row in _lines(path):
        check_row(task, row, f"{path}, line {number}")
        rows.append(row)
    return _kept(task, rows, str(path))


def check_fetched(task: SuiteTask, rows: Iterable[Row], origin: str) -> TaskData:
    """Rows that were fetched, held to the same rules as a local file's."""
    found = list(rows)
    for number, row in enumerate(found, start=1):
        check_row(task, row, f"{origin}, row {number}")
    return _kept(task, found, origin)


def _kept(task: SuiteTask, rows: list[Row], origin: str) -> TaskData:
    kept = [row for row in rows if all(row[field] for field in task.only_with)]
    if not kept:
        why = f"none of its {len(rows)} items has {' and '.join(task.only_with)}" if rows else "no items"
        raise DataError(f"{origin}: {why}: nothing to ask for task {task.name}")
    return TaskData(kept, len(rows) - len(kept), origin)


def _lines(path: Path) -> Iterator[tuple[int, Row]]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a gzip file: {error}") from None
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8: {error}") from None
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {type(row).__name__}, and an object with fields is needed")
        yield number, row


def check_row(task: SuiteTask, row: Mapping[str, Any], where: str) -> None:
    """Raises DataError for a field that is missing or holds what it may not. `where`: file and line."""
    fields = fields_of(task)
    if task.format == "mbpp":
        fields["prompt" if "prompt" in row else "text"] = "text"
        _check_number(row.get("task_id"), f"{where}: field task_id")
    for name, kind in fields.items():
        if name not in row:
            raise DataError(f"{where}: field {name} is missing; task {task.name} needs {', '.join(fields)}")
        _check_field(row, name, kind, f"{where}: field {name}")


def _check_field(row: Mapping[str, Any], name: str, kind: FieldKind, where: str) -> None:
    value = row[name]
    if isinstance(kind, list):
        if not any(value == one and type(value) is type(one) for one in kind):
            raise DataError(f"{where} is {_short(value)}, and may be {' or '.join(map(repr, kind))}")
    elif kind.startswith("index of "):
        _check_number(value, where)
        _check_field(row, kind[9:], "texts", f"{where} (which counts in {kind[9:]})")
        if not 0 <= value < len(row[kind[9:]]):
            raise DataError(f"{where} is {value}, and there are {len(row[kind[9:]])} {kind[9:]}, counted from 0")
    elif kind.startswith("text") and kind != "texts":
        if not isinstance(value, str):
            raise DataError(f"{where} is {_short(value)}, and a text is needed")
        if not value.strip() and kind != "text?":
            raise DataError(f"{where} is empty")
        if kind == "text with _" and value.count("_") != 1:
            raise DataError(f"{where} is {_short(value)}, and exactly one _ must mark the gap")
    elif kind == "texts":
        _check_texts(value, where)
    elif kind == "aliases":
        _check_texts(value.get("aliases") if isinstance(value, dict) else None, f"{where}.aliases")
    else:
        _check_labelled(row, value, where)


def _check_labelled(row: Mapping[str, Any], value: Any, where: str) -> None:
    """{"text": […], "label": […]}, and answerKey among the labels."""
    parts = value if isinstance(value, dict) else {}
    for part in ("text", "label"):
        _check_texts(parts.get(part), f"{where}.{part}")
    if len(parts["text"]) != len(parts["label"]):
        raise DataError(f"{where} has {len(parts['text'])} texts and {len(parts['label'])} labels")
    if "answerKey" in row and row["answerKey"] not in parts["label"]:
        raise DataError(
            f"{where}.label is {_short(parts['label'])}, and answerKey {_short(row['answerKey'])} is not in it"
        )


def _check_texts(value: Any, where: str) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise DataError(f"{where} is {_short(value)}, and a list of texts is needed, none of them empty")


def _check_number(value: Any, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where} is {_short(value)}, and a whole number is needed")


def _short(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False, default=str)
    return words if len(words) <= 60 else f"{words[:57]}…"


def missing_words(suite: str, tasks: Sequence[SuiteTask], folder: Path | None) -> str:
    """What to say where data are missing: each task, the file to put, what it holds, where it is had."""
    where = folder or Path("DIR")
    lines = [f"suite {suite}: no data for {len(tasks)} task{'s' if len(tasks) > 1 else ''}:"]
    for task in tasks:
        fields = ", ".join(fields_of(task)) + (", text or prompt, task_id" if task.format == "mbpp" else "")
        lines.append(f"  {task.name}: put {where / task.data_file} there, JSON lines with {fields}")
        lines.append(f"      from {task.source}")
    lines.append("Give the folder with --data DIR; with network, --online lets the harness fetch what it can; with")
    lines.append("--skip-missing only the tasks that have data are run. docs/evaluation.md describes every file.")
    return "\n".join(lines)
