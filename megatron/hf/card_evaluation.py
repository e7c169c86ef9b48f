"""Results that `stagemix evaluate` wrote, as a passage of a model card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError


def read_evaluation(path: Path) -> dict[str, Any]:
    """A file that `stagemix evaluate --output` wrote. Raises ConfigError where it is no such file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = list(_rows(record))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--evaluation {path}: not a file that `stagemix evaluate --output` wrote: {error!r}"
        ) from None
    if not rows:
        raise ConfigError(f"--evaluation {path}: holds no results")
    return dict(record)


def evaluation_lines(record: Mapping[str, Any] | None) -> list[str]:
    """The passage: a row for each model, task and metric, with its standard error."""
    lines = ["## Evaluation", ""]
    if record is None:
        return [*lines, "None yet: run `stagemix evaluate --model` on this folder.", ""]
    head = ("model", "task", "metric", "value", "± stderr", "chance")
    words = [word for word in (record.get("harness"), record.get("dtype") and f"in {record['dtype']}") if word]
    source = f"By `stagemix evaluate`{' (' + ', '.join(words) + ')' if words else ''}."
    return [*lines, *markdown_table(head, list(_rows(record))), "", source, ""]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for model in record["models"]:
        for task, result in model["results"].items():
            chance = (record.get("tasks", {}).get(task) or {}).get("chance")
            for metric, found in result["metrics"].items():
                least = f"{chance:.2f}" if chance is not None and metric.startswith("acc") else ""
                yield model["name"], task, metric, _number(found["value"]), _number(found.get("stderr")), least


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) >= 1e4 else f"{value:.4f}"
