"""Small studies for tests: TOML written to a folder, and planned."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron.study.plan import PlannedStudy, plan_study

BASE: dict[str, Any] = {
    "tokenizer": {"path": "bytes"},
    "model": {
        "seq_length": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "sources": {
        "web": {"tokens": 100_000, "max_epochs": 9},
        "python": {"tokens": 40_000, "group": "code", "max_epochs": 9},
        "rust": {"tokens": 20_000, "group": "code", "max_epochs": 9},
    },
    "train": {"global_batch_size": 4, "precision": "fp32"},
    "validation": {"fraction": Decimal("0")},
    "checkpoint": {"every": 2, "keep": 4},
}
LR = {"peak": Decimal("0.001")}


def stage(**over: Any) -> dict[str, Any]:
    """A stage of the library with defaults."""
    return {"steps": 4, "mixture": {"web": 1}, "lr": LR} | over


def tables(arms: dict[str, Any], stages: dict[str, Any], **over: Any) -> dict[str, Any]:
    """The tables of a study; `over` replaces whole tables."""
    head = {"name": "made", "output": "runs/made", "baseline": next(iter(arms))}
    return {"study": head, "base": BASE, "stages": stages, "arms": arms} | over


def write(folder: Path, words: dict[str, Any], name: str = "study.toml") -> Path:
    """The tables as a TOML file."""
    path = folder / name
    lines: list[str] = []
    _tables(words, "", lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def planned(folder: Path, words: dict[str, Any], *only: str) -> PlannedStudy:
    """The study of these tables, planned."""
    return plan_study(write(folder, words), only)


def _tables(words: dict[str, Any], place: str, lines: list[str]) -> None:
    if place:
        lines.append(f"[{place}]")
    lines += [f"{json.dumps(key)} = {_value(value)}" for key, value in words.items() if not _is_table(value, place)]
    for key, value in words.items():
        if _is_table(value, place):
            _tables(value, f"{place}.{json.dumps(key)}" if place else key, lines)


def _is_table(value: Any, place: str) -> bool:
    return isinstance(value, dict) and place.count(".") < 1 + place.startswith("base")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(inner) for inner in value) + "]"
    return json.dumps(value) if isinstance(value, str) else str(value)
