"""The results file of an evaluation: one JSON object, written whole, read in this format and the one before.

Format 2 keeps every item (harness_results.py, program_tasks.py), each model's group means, and what was not run.
Format 1 had figures and, for accuracies, which items were right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import ConfigError, DataError

FORMAT = 2
_READABLE = (1, 2)
_INNER_LEVELS = 7
_WANTED = "Give a file that stagemix evaluate --output wrote"


@dataclass
class Merged:
    """Models of one or more files. results: model to task to entry. groups: names of tasks by group. dtypes: model to
    those that it was computed in, as far as the files say."""

    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    dtypes: dict[str, list[str]] = field(default_factory=dict)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the file whole. What has no number in JSON, such as a perplexity that overflows, becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (_spelled(_finite(record), 0) + "\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """The record of a results file of either format. Raises DataError for anything else."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] not in _READABLE:
            raise DataError(f"{path}: format {record['format']}, and this version reads {_READABLE}: update stagemix")
        for model in record["models"]:
            _ = str(model["name"])
            for result in model["results"].values():
                _ = {name: (found["value"], found["stderr"]) for name, found in result["metrics"].items()}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: make it with stagemix evaluate --output {path}") from None
    except OSError as error:
        raise DataError(f"{path}: it cannot be read: {error.strerror}. {_WANTED}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a result of stagemix evaluate: not text in UTF-8. {_WANTED}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise DataError(
            f"{path}: not a result of stagemix evaluate: not one JSON object ({where}). {_WANTED}"
        ) from None
    except KeyError as error:
        raise DataError(f"{path}: not a result of stagemix evaluate: it has no field {error}. {_WANTED}") from None
    except (ValueError, TypeError, AttributeError):
        raise DataError(
            f"{path}: not a result of stagemix evaluate: its JSON has another form, such as that of another command's "
            f"output. {_WANTED}"
        ) from None
    return record


def merge_records(paths: Iterable[Path], names: Mapping[Path, str] | None = None) -> Merged:
    """The models of several files, those of one name together. names: what the one model of a file is to be called.

    Raises ConfigError where a model has a task twice, and for a name of a file with several models.
    """
    merged = Merged()
    for path in paths:
        record = read_record(path)
        renamed = (names or {}).get(path)
        if renamed and len(record["models"]) != 1:
            known = ", ".join(str(model["name"]) for model in record["models"])
            raise ConfigError(f"{renamed}={path}: a name is for a file of one model, and this has {known}")
        for model in record["models"]:
            name = renamed or str(model["name"])
            into = merged.results.setdefault(name, {})
            dtypes = merged.dtypes.setdefault(name, [])
            if record.get("dtype") and record["dtype"] not in dtypes:
                dtypes.append(record["dtype"])
            if twice := sorted(set(into) & set(model["results"])):
                raise ConfigError(
                    f"{path}: model {name} has task {', '.join(twice)} in an earlier file too: tell the files' models "
                    f"apart, stagemix compare first=FILE.json second={path}; or evaluate with --model NAME=PATH"
                )
            into.update(model["results"])
        for task, known in record.get("tasks", {}).items():
            group = known.get("group")
            if group and task not in merged.groups.setdefault(group, []):
                merged.groups[group].append(task)
    return merged


def group_means(
    results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{group: {"value", "stderr", "tasks", "of"}}: plain means of the tasks' own metrics, as the papers take them.

    tasks: what the record says of each, "group" and "metric" among it; `of` counts those that were not run too. The
    standard error is that of a mean of independent figures. A group whose tasks have unlike metrics has no mean.
    """
    groups: dict[str, list[str]] = {}
    for task, known in tasks.items():
        if known.get("group"):
            groups.setdefault(known["group"], []).append(task)
    means: dict[str, dict[str, Any]] = {}
    for group, names in groups.items():
        found = [results[name]["metrics"].get(tasks[name]["metric"]) for name in names if name in results]
        present = [one for one in found if one is not None]
        if len(names) < 2 or not present or any(one["value"] is None for one in present):
            continue
        if not alike(tasks[name]["metric"] for name in names):
            continue
        errors = [one["stderr"] for one in present]
        known_errors = [float(error) for error in errors if error is not None]
        whole = len(known_errors) == len(present)
        means[group] = {
            "value": sum(one["value"] for one in present) / len(present),
            "stderr": math.sqrt(sum(error**2 for error in known_errors)) / len(present) if whole else None,
            "tasks": len(present),
            "of": len(names),
        }
    return means


def alike(metrics: Iterable[str]) -> bool:
    """Whether a mean over these metrics is a figure: shares of items (accuracies, exact match, pass@k), or all BLEU."""
    return len({metric == "bleu" for metric in metrics}) == 1


def table(record: Mapping[str, Any]) -> list[str]:
    """The results for the terminal: one line a model, task and metric, then the group means; then what was not run."""
    lines = [f"{'model':<20} {'task':<28} {'metric':<16} {'value':>9}  {'± stderr':>9}  {'chance':>6}"]
    for model in record["models"]:
        for task, result in model["results"].items():
            chance = record["tasks"].get(task, {}).get("chance")
            for metric, found in result["metrics"].items():
                least = f"{chance:.2f}" if chance is not None and metric.startswith("acc") else ""
                lines.append(_line(model["name"], task, metric, found, least))
        for group, mean in model.get("groups", {}).items():
            count = f"mean of {mean['tasks']}" + ("" if mean["tasks"] == mean["of"] else f" of {mean['of']}")
            lines.append(_line(model["name"], f"[{group}]", count, mean, ""))
    return [*lines, *notes(record)]


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must know: tasks that were not run, items left out, contexts that were cut."""
    lines = []
    if missing := record.get("missing"):
        lines.append(f"NOT RUN, for want of data: {', '.join(missing)}. The suite {record['suite']} is not complete.")
    for why in record.get("left_out", {}).values():
        lines.append(f"NOT ASKED ABOUT: {why}")
    if limit := record.get("limit"):
        lines.append(f"At most {limit} items of each task (--limit): no figures to report.")
    for task, known in record.get("tasks", {}).items():
        if known.get("left_out"):
            lines.append(f"{task}: items left out, as the suite says: {known['left_out']}.")
    for model in record["models"]:
        for task, result in model["results"].items():
            records: Mapping[str, Any] = result.get("records", {})
            if cut := records.get("cut_items"):
                lines.append(
                    f"{model['name']}, {task}: of {cut} items the context was cut on the left to fit the model."
                )
            if uneven := records.get("uneven_items"):
                lines.append(
                    f"{model['name']}, {task}: of {uneven} items the fixed text has unlike token counts after unlike "
                    "choices, so acc_perplexity (by the token) and acc (by the text) may differ."
                )
    return lines


def _line(model: str, task: str, metric: str, found: Mapping[str, Any], chance: str) -> str:
    value = found["value"]
    words = "–" if value is None else f"{value:.4f}" if value < 1e5 else f"{value:.3g}"
    error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
    return f"{model:<20} {task:<28} {metric:<16} {words:>9}  {error:>9}  {chance:>6}".rstrip()


def _spelled(value: Any, level: int) -> str:
    """JSON that people can read: objects over several lines, lists of numbers and texts on one."""
    if isinstance(value, Mapping) and value and level < _INNER_LEVELS:
        parts = [f"{json.dumps(str(key))}: {_spelled(item, level + 1)}" for key, item in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        parts = [_spelled(item, level + 1) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    begin, end = "{}" if isinstance(value, Mapping) else "[]"
    return begin + "".join(f"\n{' ' * (level + 1)}{part}," for part in parts)[:-1] + f"\n{' ' * level}{end}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
