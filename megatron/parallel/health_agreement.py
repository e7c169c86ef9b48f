"""What must be the same on every rank, compared before anything is trained: a rank that differs is refused by name."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.config.errors import StagemixError
from megatron.config.version import VERSION
from megatron.parallel.health_board import Board
from megatron.parallel.mesh import host_name

_SHOWN = 5


def agree(board: Board, name: str, facts: Mapping[str, Any], kind: type[StagemixError]) -> None:
    """Returns when every rank has found its facts, JSON values by name, equal to rank 0's.

    Raises `kind` on a rank that differs, with each fact's two values; the others then end with the same words.
    """
    mine = _plain(facts)
    if board.rank == 0:
        board.post(f"facts/{name}", mine)
    theirs = board.wait(lambda: board.read(f"facts/{name}"))
    keys = sorted(mine.keys() | theirs.keys())
    different = [
        f"{key} is {_shown(mine, key)}, rank 0 has {_shown(theirs, key)}" for key in keys if _differs(mine, theirs, key)
    ]
    if different:
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise kind(
            f"rank {board.rank} ({host_name()}): {'; '.join(different[:_SHOWN])}{more}: start every process of the "
            "job with the same command, files and versions"
        )
    board.count(f"agreed/{name}")
    board.wait(lambda: board.count(f"agreed/{name}", 0) >= board.world_size)


def program_facts() -> dict[str, str]:
    """Which program runs: versions, and a hash of the package's source files."""
    return {
        "the version of Stagemix": VERSION,
        "the hash of Stagemix's source files": source_hash(Path(__file__).resolve().parents[1]),
        "the version of Python": platform.python_version(),
        "the version of torch": torch.__version__,
    }


def source_hash(package: Path) -> str:
    """One hash over names and bytes of the Python files below a folder."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(package).as_posix()} {content}\n".encode())
    return total.hexdigest()


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted key, as users write them: {"train.micro_batch_size": 4, "stages.cooldown.steps": 10}."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
            for item in value:
                found.update(flat(item, f"{prefix}{key}.{item['name']}."))
            found[f"{prefix}{key} (their order)"] = [item["name"] for item in value]
        else:
            found[f"{prefix}{key}"] = value
    return found


def _plain(facts: Mapping[str, Any]) -> dict[str, str]:
    return {key: f"{value}" for key, value in facts.items()}


def _differs(mine: Mapping[str, str], theirs: Mapping[str, str], key: str) -> bool:
    return mine.get(key) != theirs.get(key)


def _shown(facts: Mapping[str, str], key: str) -> str:
    if key not in facts:
        return "not set"
    return facts[key] if len(facts[key]) <= 80 else f"{facts[key][:77]}..."
