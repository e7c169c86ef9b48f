"""Reads the ledger of a checkpoint without reading its tensors, and so without torch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from megatron.checkpoint.manifest import NAME, read_manifest, sha256_of
from megatron.config.errors import CheckpointError
from megatron.data.ledger import Ledger

_STEP = re.compile(r"step-\d+")
_STATE = "state.json"


class NoLedgerError(CheckpointError):
    """A whole checkpoint that no training wrote."""


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, whole or not."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if _STEP.fullmatch(path.name))


def read_ledger(path: Path) -> Ledger:
    """The ledger of a checkpoint folder, or of a run folder's newest checkpoint whose ledger is whole.

    Manifest and state.json are verified by their checksums; tensors are not read. A damaged checkpoint of a run folder
    is named on stderr and passed over. Raises CheckpointError, as NoLedgerError for an imported model.
    """
    folders = checkpoint_folders(path)
    if not folders:
        return _read(path)
    problems = []
    for folder in reversed(folders):
        try:
            return _read(folder)
        except CheckpointError as error:
            print(f"damaged checkpoint passed over: {error}", file=sys.stderr)
            problems.append(str(error))
    raise CheckpointError(f"{path}: none of its {len(problems)} checkpoints is whole; the newest: {problems[0]}")


def _read(folder: Path) -> Ledger:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name a checkpoint folder or a run folder")
    if not _STEP.fullmatch(folder.name) and not (folder / NAME).exists():
        raise CheckpointError(f"{folder}: holds no checkpoint yet, nor is it one (no {NAME})")
    expected = read_manifest(folder)["files"].get(_STATE, {}).get("sha256")
    found = sha256_of(folder / _STATE)
    if found != expected:
        raise CheckpointError(f"{folder / _STATE}: expected sha256 {expected}, found {found}")
    try:
        state = json.loads((folder / _STATE).read_bytes())
        if "data" not in state:
            raise NoLedgerError(f"{folder}: an imported model: it has not been trained here, so it has no ledger")
        return Ledger.from_json(state["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _STATE}: holds no ledger: {error!r}") from None
