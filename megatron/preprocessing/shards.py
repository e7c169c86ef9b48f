"""What the processes that share a folder of parts tell each other through it: who works, who is done, which encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.preprocessing.options import Shard
from megatron.preprocessing.parts import PartKey, open_part
from megatron.preprocessing.quarantine import with_lines
from megatron.preprocessing.work_plan import WorkPlan

IN_USE = "in-use.lock"
_REFERENCE = "reference-encoder.json"


@dataclass(frozen=True)
class CurrentEncoder:
    """The encoder that all parts of a dataset must come from, and why it is not the fast one, if it is not."""

    backend: str
    note: str
    reference: bool


def current_encoder(folder: Path, plan: WorkPlan) -> CurrentEncoder:
    """The plan's encoder, or the tokenizer itself once any shard has found that the two differ."""
    if (folder / _REFERENCE).exists():
        note = f"{plan.content['encoder']['backend']} gave other ids than the tokenizer on a sample of this corpus"
        return CurrentEncoder(plan.content["tokenizer_library"], note, True)
    return CurrentEncoder(plan.content["encoder"]["backend"], plan.content["encoder"]["note"], False)


def switch_to_reference(folder: Path, why: str) -> None:
    """From now on no part of another encoder is taken, in any shard."""
    write_whole(folder / _REFERENCE, f"{json.dumps({'why': why})}\n".encode())


def shard_lock(folder: Path, shard: Shard) -> Path:
    """The lock file of the process that works on the shard."""
    return folder / f"{_stem(shard.number, shard.count)}.lock"


def quarantine_path(folder: Path, number: int, plan: WorkPlan) -> Path:
    """The bad records of a complete shard."""
    return folder / f"{_stem(number, plan.shards)}.quarantine.jsonl"


def mark_complete(folder: Path, shard: Shard, plan: WorkPlan, backend: str, keys: Sequence[PartKey]) -> None:
    """Say that all parts of the shard are there, and gather its bad records with the numbers of their lines."""
    parts = (open_part(folder, key) for key in keys)
    lines = (line for part in parts if part is not None for line in part.quarantine().splitlines(keepends=True))
    with quarantine_path(folder, shard.number, plan).open("wb") as file:
        file.writelines(with_lines(lines))
    marker = {"plan": plan.fingerprint, "backend": backend, "parts": [list(key) for key in keys]}
    write_whole(_marker(folder, shard.number, plan.shards), f"{json.dumps(marker)}\n".encode())


def read_shard_marker(folder: Path, number: int, plan: WorkPlan, backend: str) -> list[tuple[int, int]] | None:
    """The parts of a shard in order, or None where it is not complete."""
    try:
        marker: dict[str, Any] = json.loads(_marker(folder, number, plan.shards).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if (marker.get("plan"), marker.get("backend")) != (plan.fingerprint, backend):
        return None
    return [(int(file_number), int(block_number)) for file_number, block_number in marker["parts"]]


def any_complete(folder: Path) -> bool:
    """Whether any shard is, even one without documents."""
    return any(folder.glob("shard-*.json"))


def _marker(folder: Path, number: int, count: int) -> Path:
    return folder / f"{_stem(number, count)}.json"


def _stem(number: int, count: int) -> str:
    return f"shard-{number:06d}-of-{count:06d}"
