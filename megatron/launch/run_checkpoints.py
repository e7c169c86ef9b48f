"""The checkpoints of a run as far as their manifests tell: no tensor is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import NAME, read_manifest
from megatron.config.errors import CheckpointError
from megatron.data.ledger import Ledger

_STEP = re.compile(r"step-(\d{9,})")


@dataclass(frozen=True)
class SeenCheckpoint:
    """A published checkpoint. time: when it was published, unix seconds. fault: why it is not whole, "" where its files
    are there in the sizes of its manifest. state: state.json; {} where it cannot be read."""

    path: Path
    step: int
    time: float
    bytes: int = 0
    fault: str = ""
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def ledger(self) -> Ledger | None:
        """What was trained on until then; None where it is not told."""
        try:
            return Ledger.from_json(self.state["data"])
        except (KeyError, TypeError, ValueError):
            return None


def newest_checkpoints(output: Path) -> tuple[list[SeenCheckpoint], int]:
    """The newest checkpoint and, where it is damaged, those before it up to the newest that is not; newest first. And
    how many there are."""
    folders = []
    try:
        for path in (output / "checkpoints").iterdir():
            if (match := _STEP.fullmatch(path.name)) and path.is_dir():
                folders.append((int(match.group(1)), path))
    except OSError:
        return [], 0
    found = []
    for step, path in sorted(folders, reverse=True):
        seen = _look_at(path, step)
        if seen is not None:
            found.append(seen)
            if not seen.fault:
                break
    return found, len(folders)


def checkpoint_at(path: Path) -> SeenCheckpoint | None:
    """The checkpoint in a folder, which is called by its step; None where there is none."""
    match = _STEP.fullmatch(path.name)
    return _look_at(path, int(match.group(1))) if match and path.is_dir() else None


def _look_at(path: Path, step: int) -> SeenCheckpoint | None:
    """None where it was retired while it was looked at."""
    try:
        when = (path / NAME).stat().st_mtime
    except OSError:
        if not path.is_dir():
            return None
        return SeenCheckpoint(path, step, path.stat().st_mtime, fault=f"it has no {NAME}")
    size, fault, state = 0, "", {}
    try:
        files = read_manifest(path)["files"]
        size = sum(int(seal["bytes"]) for seal in files.values())
        fault = next((words for name, seal in files.items() if (words := _fault_of(path / name, seal["bytes"]))), "")
        state = json.loads((path / "state.json").read_bytes())
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not path.is_dir():
            return None
        fault = f"{error}"
    return SeenCheckpoint(path, step, when, size, fault, state if isinstance(state, dict) else {})


def _fault_of(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError:
        return f"{path.name} is missing"
    return "" if found == size else f"{path.name} has {found} bytes, not {size}"
