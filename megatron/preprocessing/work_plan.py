"""The work plan: everything that decides the output, written into the folder of parts before the first of them.

A run that finds a plan goes on with it if it is its own plan too; else it says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import ConfigError, DataError
from megatron.config.version import VERSION
from megatron.corpora.read_options import InputFile
from megatron.preprocessing.options import Shard
from megatron.preprocessing.parts import PartKey

PLAN_NAME, FILES_NAME = "plan.json", "files.jsonl"
PARTS_FORMAT = 1
_LISTED_FILES = 1000

MIB = 1 << 20


def parts_folder(prefix: str | Path) -> Path:
    """The folder `P.parts` of the output prefix P."""
    return Path(f"{prefix}.parts")


def block_bytes_for(input_bytes: int) -> int:
    """Bytes of input for each part: a 64th of the corpus between 4 and 64 MiB, more from 1 TiB on (16,384 parts)."""
    return max(4 * MIB, min(input_bytes // 64, 64 * MIB), -(-input_bytes // 16384))


def shard_bounds(files: Sequence[InputFile], block_bytes: int, shard: Shard) -> tuple[PartKey, PartKey]:
    """The first block of the shard and the first behind it. All shards together are the corpus, in order.

    Shards are cut by bytes on the disk. A file that blocks can be cut from anywhere is shared out; any other belongs to
    one shard, that in which its middle lies.
    """
    total = sum(file.size for file in files)
    return (
        _bound(files, block_bytes, total * (shard.number - 1), shard.count),
        PartKey(len(files), 0)
        if shard.number == shard.count
        else _bound(files, block_bytes, total * shard.number, shard.count),
    )


def _bound(files: Sequence[InputFile], block_bytes: int, numerator: int, count: int) -> PartKey:
    place, start = numerator // count, 0
    for number, file in enumerate(files):
        if place < start + file.size or (place == start and numerator == 0):
            inside = place - start
            if _can_be_shared(file, block_bytes):
                return PartKey(number, -(-inside // block_bytes))
            return PartKey(number + (inside > file.size // 2), 0)
        start += file.size
    return PartKey(len(files), 0)


def _can_be_shared(file: InputFile, block_bytes: int) -> bool:
    plain = file.kind == "json-lines" and file.path.endswith((".jsonl", ".ndjson"))
    return plain and file.size > block_bytes


@dataclass(frozen=True)
class FileList:
    """The files of a corpus as they are now: what tells whether an input was changed."""

    rows: tuple[tuple[str, int, int, str], ...]  # path, bytes, time of change in ns, object id

    @classmethod
    def of(cls, files: Sequence[InputFile]) -> FileList:
        """Raises DataError where a file is gone."""
        return cls(tuple((file.path, file.size, _changed_at(file), file.object_id) for file in files))

    @property
    def total_bytes(self) -> int:
        return sum(row[1] for row in self.rows)

    def lines(self) -> Iterator[str]:
        return (json.dumps(row) + "\n" for row in self.rows)

    @cached_property
    def digest(self) -> str:
        return _digest(self.lines())

    def for_manifest(self) -> dict[str, Any]:
        """Number, bytes and checksum; the paths, up to a thousand. The same wherever the same files lie."""
        stable = [[path, size, *([blob] if blob else [])] for path, size, _, blob in self.rows]
        digest = _digest(json.dumps(row) + "\n" for row in stable)
        listed = {"list": stable} if len(stable) <= _LISTED_FILES else {}
        return {"files": len(stable), "bytes": self.total_bytes, "sha256": digest, **listed}


def _changed_at(file: InputFile) -> int:
    if file.object_id:  # a git object never changes
        return 0
    try:
        return os.stat(file.path).st_mtime_ns
    except OSError as error:
        raise DataError(f"{file.path}: it was there when the input was listed, and is gone: {error.strerror}") from None


def _digest(lines: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(frozen=True)
class WorkPlan:
    """A plan as JSON keeps it. `content` is not changed after."""

    content: dict[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        return int(self.content["shards"])

    def differences(self, other: WorkPlan) -> list[str]:
        """What is not the same in another plan, in words: `options.read.text_field: "text" became "body"`."""
        return list(_differences("", self.content, other.content))


def make_plan(
    inputs: Sequence[str],
    files: FileList,
    options: dict[str, Any],
    tokenizer: dict[str, Any],
    tokenizer_library: str,
    encoder: dict[str, str],
    dtype: str,
    block_bytes: int,
    shards: int,
    selection_skipped: dict[str, int],
) -> WorkPlan:
    """The plan of a run. `tokenizer` and `encoder` go into the manifest as they are."""
    return WorkPlan(
        {
            "parts_format": PARTS_FORMAT,
            "stagemix": VERSION,
            "inputs": list(inputs),
            "files": {"count": len(files.rows), "bytes": files.total_bytes, "digest": files.digest},
            "input_files": files.for_manifest(),
            "options": options,
            "tokenizer": tokenizer,
            "tokenizer_library": tokenizer_library,
            "encoder": encoder,
            "dtype": dtype,
            "block_bytes": block_bytes,
            "shards": shards,
            "skipped": selection_skipped,
        }
    )


def read_plan(folder: Path) -> WorkPlan | None:
    """The plan in the folder of parts, or None where there is none. Raises DataError for one that cannot be read."""
    path = folder / PLAN_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}): run again with --restart, which throws the parts away") from None
    if not isinstance(content, dict) or content.get("parts_format") != PARTS_FORMAT:
        raise DataError(f"{path}: parts of another version: run again with --restart, which throws them away")
    return WorkPlan(content)


def write_plan(folder: Path, plan: WorkPlan, files: FileList) -> None:
    """Write plan and list of files, the plan last."""
    write_whole(folder / FILES_NAME, "".join(files.lines()).encode())
    write_whole(folder / PLAN_NAME, f"{json.dumps(plan.content, indent=1)}\n".encode())


def refuse_other_plan(folder: Path, plan: WorkPlan, found: WorkPlan, files: FileList, kept: int) -> None:
    """Raise ConfigError, naming what differs, unless both plans are the same."""
    if plan.fingerprint == found.fingerprint:
        return
    words = [word for word in found.differences(plan) if not word.startswith(("files.", "input_files"))]
    if found.content["files"]["digest"] != plan.content["files"]["digest"]:
        words.insert(0, _changed_file(folder, files))
    raise ConfigError(
        f"{folder}: {kept} finished parts of an earlier run lie here, which was not the same work: "
        f"{'; '.join(words[:4])}. Undo that to go on with them, or give --restart to throw them away and begin anew"
    )


def _changed_file(folder: Path, files: FileList) -> str:
    try:
        before = (folder / FILES_NAME).read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        before = []
    now = [line.rstrip("\n") for line in files.lines()]
    for old_line, new_line in zip(before, now, strict=False):
        if old_line != new_line:
            old, new = json.loads(old_line), json.loads(new_line)
            if old[0] != new[0]:
                return f"input files: {old[0]} was in the place where now is {new[0]}"
            if old[1] != new[1]:
                return f"{new[0]}: {old[1]} bytes became {new[1]}"
            return f"{new[0]}: it was written to since (its time of change is another)"
    return f"input files: {len(before)} became {len(now)}"


def _differences(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif old != new:
        yield f"{name}: {json.dumps(old)} became {json.dumps(new, ensure_ascii=False)}"
