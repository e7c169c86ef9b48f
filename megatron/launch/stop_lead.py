"""How long before its time is over a job is asked to stop, so that its last step and its checkpoint still fit.

lead = 2 x the longest recent step + the longest validation and evaluation that training waited for + 2 x the longest
recent save + MARGIN. Two steps: one is under way, and all ranks agree at the next boundary. Twice the save: a shared
disk is slower when many jobs end together. The longest of the last rows, not a mean: the one stop must fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.launch.attempts import read_heartbeat
from megatron.launch.slurm_words import time_words
from megatron.metrics.row_tail import objects_in

MARGIN = 60
"""Seconds for processes to leave, and for the batch script to put the job back in the queue."""
LEAST, MOST, WHOLE = 120, 65_535, 10
"""SLURM takes at most 65535 seconds, and may send the signal up to 60 seconds early, never late (man sbatch)."""
ASSUMED_STEP = 30.0
ASSUMED_BYTES_A_SECOND = 0.5e9
"""Of a first start, for which nothing is measured: a step at most so long, and files written so fast by each node."""
_TAIL = 1 << 20
_ROWS = 500


@dataclass(frozen=True)
class StopLead:
    """seconds: before the end. why: how they come about, for a comment."""

    seconds: int
    why: str


def stop_lead(output: Path, nodes: int = 1, checkpoint_bytes: int | None = None) -> StopLead:
    """The lead of the run in a folder: from what its earlier attempts measured, or else from the assumptions above.

    checkpoint_bytes: of a whole checkpoint; None where the model is not known yet.
    """
    steps, aside, saves = _measured(output)
    if steps:
        step, save, other = max(steps), max(saves, default=0.0), sum(aside)
        parts = [f"2 steps of {_seconds(step)}"] + ([f"validation {_seconds(other)}"] if other else [])
        parts.append(
            f"2 saves of {_seconds(save)}"
            if saves
            else f"2 saves of {_seconds(_assumed(nodes, checkpoint_bytes))} (assumed)"
        )
        save = save if saves else _assumed(nodes, checkpoint_bytes)
        seconds = 2 * step + other + 2 * save + MARGIN
        return StopLead(_whole(seconds), f"{' + '.join(parts)} + {MARGIN} s, as this run measured")
    save = _assumed(nodes, checkpoint_bytes)
    return StopLead(
        _whole(max(300.0, 2 * ASSUMED_STEP + 2 * save + MARGIN)),
        f"nothing is measured yet: assumes steps up to {_seconds(ASSUMED_STEP)} and "
        + (f"{checkpoint_bytes / 1e9:.1f} GB" if checkpoint_bytes else "a checkpoint")
        + f" written at {ASSUMED_BYTES_A_SECOND / 1e9:g} GB/s a node, at least 300 s; the next launch knows better",
    )


def _assumed(nodes: int, checkpoint_bytes: int | None) -> float:
    return (checkpoint_bytes or 0) / (ASSUMED_BYTES_A_SECOND * nodes)


def _whole(seconds: float) -> int:
    return min(MOST, max(LEAST, WHOLE * math.ceil(seconds / WHOLE)))


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else time_words(value)


def _measured(output: Path) -> tuple[list[float], list[float], list[float]]:
    """Seconds of recent steps; the longest of each thing that training waits for between steps; seconds of saves."""
    steps: list[float] = []
    aside: dict[str, float] = {}
    saves: list[float] = []
    for row in _rows(output / "metrics.jsonl")[-_ROWS:]:
        steps += _figures(row, "step_seconds")
        saves += _figures(row, "checkpoint_seconds")
        for name in ("validation_seconds", "evaluation_seconds"):
            # a row with "evaluation" tells how long another process took, which training did not wait for
            if "step_seconds" in row:
                aside[name] = max([aside.get(name, 0.0), *_figures(row, name)])
    beat = read_heartbeat(output)
    if beat is not None:
        steps += [beat.step_seconds] if beat.step_seconds else []
        saves += [beat.save_seconds] if beat.save_seconds else []
    return steps, list(aside.values()), saves


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            content = file.read()
    except OSError:
        return []
    return list(objects_in(content))


def _figures(row: dict[str, Any], name: str) -> list[float]:
    value = row.get(name)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return [float(value)] if good and value is not None else []
