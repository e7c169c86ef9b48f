"""A run that is planned by sizes alone, with its weights once more as plain formulas: the oracle of the drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from made_runs import run_config

from megatron.config.schema import RunConfig

GROUPS = {"python": "code", "rust": "code", "web": "web", "books": "quality"}
SIZES = {"python": 40_000, "rust": 20_000, "web": 300_000, "books": 2_900}
LENGTHS = {"even": 64_000, "ramp": 96_000, "steps": 32_000, "tail": 1_600}
RATES = {"even": (0.0, 1e-3), "ramp": (1e-3, 1e-3), "steps": (5e-4, 5e-4), "tail": (5e-4, 0.0)}


def stages() -> list[dict[str, Any]]:
    """Constant by group, a ramp, two steps, and a stage of less than 1 % of the run."""
    return [
        {
            "name": "even",
            "tokens": LENGTHS["even"],
            "mixture": {"code": 0.3, "web": 0.7},
            "lr": {"warmup": "10%", "peak": 1e-3, "shape": "constant"},
        },
        {
            "name": "ramp",
            "tokens": LENGTHS["ramp"],
            "mixture": {"python": 0.1, "web": 0.9},
            "ramp_to": {"python": 0.7, "web": 0.3},
        },
        {
            "name": "steps",
            "tokens": LENGTHS["steps"],
            "phases": [
                {"share": 0.25, "mixture": {"web": 1.0}},
                {"share": 0.75, "mixture": {"web": 0.5, "books": 0.5}},
            ],
            "lr": {"peak": 5e-4},
        },
        {
            "name": "tail",
            "tokens": LENGTHS["tail"],
            "mixture": {"rust": 1.0},
            "lr": {"start": "current", "shape": "linear", "final": 0.0},
        },
    ]


def planned(folder: Path, sections: list[dict[str, Any]] | None = None, **over: Any) -> RunConfig:
    """The config; books is seen four times and a bit, python more than once."""
    sources = {
        name: {"tokens": size, "group": GROUPS[name], "max_epochs": 8, "dry": "repeat"} for name, size in SIZES.items()
    }
    return run_config(folder, sources, sections or stages(), **over)


def integral(stage: str, source: str, start: float, end: float) -> float:
    """Tokens of a source in the places start … end (0 … 1) of a stage: written out by hand, not by our code."""
    length = LENGTHS[stage]
    if stage == "even":
        # within a group by size: python 40 of 60, rust 20 of 60
        weight = {"python": 0.3 * 2 / 3, "rust": 0.3 / 3, "web": 0.7, "books": 0.0}[source]
        return weight * (end - start) * length
    if stage == "ramp":
        first, last = {"python": (0.1, 0.7), "web": (0.9, 0.3)}.get(source, (0.0, 0.0))
        return (first * (end - start) + (last - first) * (end**2 - start**2) / 2) * length
    if stage == "steps":
        early = max(0.0, min(end, 0.25) - start)
        late = max(0.0, end - max(start, 0.25))
        weights = {"web": (1.0, 0.5), "books": (0.0, 0.5)}.get(source, (0.0, 0.0))
        return (weights[0] * early + weights[1] * late) * length
    return (end - start) * length if source == "rust" else 0.0
