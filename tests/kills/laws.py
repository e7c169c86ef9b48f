"""What must hold of a run's folder whenever its processes are gone, by independent readings: JSON, sizes, hashes."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOWED = {".lock"}
"""Hidden files that may stay in a run's folder."""


@dataclass(frozen=True)
class Truth:
    """The undisturbed run, by step: the digest of its batch with the samples consumed after it, the order hash of all
    samples up to there, and its whole rows."""

    batches: dict[int, tuple[Any, ...]]
    orders: dict[int, str]
    rows: dict[int, dict[str, Any]]
    validations: dict[int, dict[str, float]]

    @classmethod
    def of(cls, output: Path) -> Truth:
        """Of a finished run that saved every step and kept all."""
        rows = {row["step"]: row for row in rows_in(output / "metrics.jsonl") if "loss" in row}
        states = [json.loads(path.read_text()) for path in output.glob("checkpoints/step-*/state.json")]
        return cls(
            {step: batch_of(row) for step, row in rows.items()},
            {state["step"]: state["data"]["order"] for state in states},
            rows,
            validations_in(output),
        )


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows; a last line without an end was torn by a kill and is left out. Raises ValueError for another one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def validations_in(output: Path) -> dict[int, dict[str, float]]:
    """Losses of held-out samples by step."""
    return {row["step"]: row["validation"] for row in rows_in(output / "metrics.jsonl") if "validation" in row}


def batch_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Which samples a step consumed."""
    keys = ("training_stage", "consumed_samples", "consumed_tokens", "tokens", "batch_digest")
    return (*(row[key] for key in keys), tuple(sorted(row["samples_by_source"].items())))


def whole_steps(output: Path) -> list[int]:
    """Steps of the checkpoints whose files are all there, with the sizes and hashes that their manifests name."""
    found = []
    for folder in output.glob("checkpoints/step-*"):
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            files = manifest["files"]
            if files and all(_seal(folder / name) == (seal["bytes"], seal["sha256"]) for name, seal in files.items()):
                found.append(int(manifest["step"]))
        except (OSError, ValueError):
            continue
    return sorted(found)


def _seal(path: Path) -> tuple[int, str]:
    content = path.read_bytes()
    return len(content), hashlib.sha256(content).hexdigest()


def faults_in(output: Path, truth: Truth, whole_before: int, steps: int) -> list[str]:
    """What is wrong in a run's folder after an end, in words; empty where all holds."""
    faults = []
    whole = whole_steps(output)
    if max(whole, default=0) < whole_before:
        faults.append(f"the newest whole checkpoint went back from step {whole_before} to {max(whole, default=0)}")
    for step in whole:
        state = json.loads((output / f"checkpoints/step-{step:09d}/state.json").read_text())
        if (state["step"], state["data"]["order"]) != (step, truth.orders[step]):
            faults.append(f"checkpoint of step {step}: order hash {state['data']['order']}, not {truth.orders[step]}")
    rows = [row for row in rows_in(output / "metrics.jsonl") if "loss" in row]
    numbers = [row["step"] for row in rows]
    if numbers != list(range(1, len(numbers) + 1)):
        faults.append(f"steps of metrics.jsonl: {numbers}")
    if len(numbers) < max(whole, default=0) or len(numbers) > steps:
        faults.append(f"{len(numbers)} rows, the newest checkpoint is of step {max(whole, default=0)}")
    faults += [f"step {row['step']}: other samples" for row in rows if batch_of(row) != truth.batches[row["step"]]]
    return faults


def discarded_in(output: Path, truth: Truth) -> tuple[int, list[str]]:
    """Rows of steps that were taken again, and which of them had other samples than the undisturbed run."""
    count, faults = 0, []
    path = output / "metrics.discarded.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if "loss" in row:
            count += 1
            if batch_of(row) != truth.batches[row["step"]]:
                faults.append(f"step {row['step']}, taken again later: other samples")
    return count, faults


def remains_of(output: Path, stage_ends: set[int], keep: int) -> list[str]:
    """What a finished run leaves that it should not: temporary files, and checkpoints beyond those that stay."""
    faults = [str(path) for path in output.rglob(".*") if path.name not in ALLOWED]
    faults += [str(path) for path in output.rglob("*.partial")]
    passing = [step for step in whole_steps(output) if step not in stage_ends]
    if len(passing) > keep:
        faults.append(f"checkpoints of steps {passing}, and keep = {keep}")
    if missing := stage_ends - set(whole_steps(output)):
        faults.append(f"no checkpoint of the stage ends {sorted(missing)}")
    if (output / "checkpoints" / "discarded").exists():
        faults.append("checkpoints were set aside as if damaged")
    return faults


def bytes_in(folder: Path) -> int:
    """Of all files, as they are just now."""
    return sum(size for _, size in files_now(folder))


def files_now(folder: Path) -> list[tuple[Path, int]]:
    """Files below a folder that somebody changes meanwhile, with their sizes."""
    found = []
    for parent, _, names in os.walk(folder):  # which passes over what has gone
        for name in names:
            path = Path(parent) / name
            try:
                found.append((path, path.stat().st_size))
            except OSError:
                continue
    return found
