"""The parts of a node's evaluation: export, losses by source, each suite, samples, answers for a judge.

A part is known by a key, the hash of everything that its figures depend on: the weights, what was asked, the content of
data and prompts. What has been done stands in evaluated.json of the node's folder, part by part; a part is done where
its key stands there and its file is still the one that was written. So nothing is evaluated twice, and what is asked
differently, or of other weights, is evaluated again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron.checkpoint.manifest import read_manifest, sha256_of
from megatron.config.durable_files import write_whole
from megatron.config.errors import CheckpointError, DataError
from megatron.study.node_folder import NodeFolder

FORMAT = 1
EXPORT, SAMPLES, ANSWERS, WIN_RATE = "export", "samples", "answers", "win-rate"
REQUEST, DUEL = "evaluation-request.json", "win-rate-request.json"
"""In a node's folder: what was asked of the last process; `stagemix evaluate_node FILE` does it again by hand. What it
said lies beside it, in a file that ends with .log instead of -request.json."""
EVALUATION_LOG = "evaluation.log"
Kind = Literal["export", "loss", "suite", "generate", "judge"]


@dataclass(frozen=True)
class Part:
    """One thing to do. name: unique in the node · key: hash of what it depends on · file: what it leaves, relative to
    the node's folder · words: of the command that does it, without the command · settings: of losses, and of
    generated texts their prompts."""

    name: str
    kind: Kind
    key: str
    file: str
    words: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a process is asked to do for a node, in this order. folder: the node's · checkpoint: the one at its end ·
    name: what the node is called in results files."""

    node: str
    name: str
    folder: str
    checkpoint: str
    parts: tuple[Part, ...]


def write_request(path: Path, request: Request) -> None:
    """Writes it whole, for a process or a person. OSError."""
    write_whole(path, (json.dumps({"format": FORMAT, **asdict(request)}, indent=1) + "\n").encode())


def read_request(path: Path) -> Request:
    """The request in a file. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise DataError(f"{path}: a request of another version: stagemix study evaluate writes it again")
        parts = tuple(Part(**{**row, "words": tuple(row["words"])}) for row in content.pop("parts"))
        return Request(**content, parts=parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a request of stagemix study evaluate ({error})") from None


class Evaluated:
    """evaluated.json of a node: which parts are done, and which failed last."""

    def __init__(self, folder: NodeFolder) -> None:
        self.folder = folder.path
        self.path = folder.path / "evaluated.json"
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self._parts = dict(content["parts"]) if content["format"] == FORMAT else {}
        except (OSError, ValueError, TypeError, KeyError):
            self._parts = {}  # then everything is done again, which costs time and nothing else

    def holds(self, part: Part) -> bool:
        """Whether the part is done, and its file as it was written."""
        row = self._parts.get(part.name, {})
        if row.get("key") != part.key or row.get("file") != part.file:
            return False
        return bool(row.get("sha256") == _seal(self.folder / part.file) != "")

    def stamp(self) -> float:
        """When the record was written last, in seconds; 0.0 where there is none."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    def done(self, part: Part, seconds: float) -> None:
        """Puts it on record. OSError."""
        seal = _seal(self.folder / part.file)
        self._put(
            part.name, {"key": part.key, "file": part.file, "sha256": seal, "seconds": round(seconds, 3), **_now()}
        )

    def failed(self, part: Part, code: int, reason: str) -> None:
        """Puts on record why it is not done. OSError."""
        self._put(part.name, {"code": code, "reason": reason, **_now()})

    def forget(self, part: Part) -> None:
        """Before its file is replaced. OSError."""
        if self._parts.pop(part.name, None) is not None:
            self._write()

    def failure(self, part: Part) -> str:
        """Why it failed when it was last tried; "" where it did not."""
        row = self._parts.get(part.name, {})
        return str(row["reason"]) if "reason" in row else ""

    def failures_since(self, since: float) -> dict[str, tuple[int, str]]:
        """(exit code, reason) of the parts that failed from then on, in unix seconds, by part, in order."""
        rows = {name: row for name, row in self._parts.items() if "reason" in row and row.get("time", 0.0) >= since}
        return {name: (int(row["code"]), str(row["reason"])) for name, row in rows.items()}

    def seconds_since(self, since: float) -> float:
        """Seconds that the parts took which were done from then on."""
        return sum(float(row.get("seconds", 0)) for row in self._parts.values() if row.get("time", 0.0) >= since)

    def seal(self, part: Part) -> str:
        """SHA-256 of the part's file as it was written."""
        return str(self._parts[part.name]["sha256"])

    def _put(self, name: str, row: Mapping[str, Any]) -> None:
        self._parts[name] = dict(row)
        self._write()

    def _write(self) -> None:
        write_whole(self.path, (json.dumps({"format": FORMAT, "parts": self._parts}, indent=1) + "\n").encode())


def _now() -> dict[str, float]:
    return {"time": round(time.time(), 3)}


def _seal(path: Path) -> str:
    """Of a file its SHA-256, of an exported folder that of its proof; "" where there is none."""
    try:
        return sha256_of(path / "proof.json" if path.is_dir() else path)
    except CheckpointError:
        return ""


def key_of(**facts: Any) -> str:
    """The hash of some JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_of(checkpoint: Path) -> str:
    """Fingerprint of a checkpoint's weights: of the SHA-256 of every file of them. Raises CheckpointError."""
    files = read_manifest(checkpoint)["files"]
    seals = {name: seal["sha256"] for name, seal in files.items() if name.startswith("model/")}
    return hashlib.sha256(json.dumps(seals, sort_keys=True).encode()).hexdigest()


def content_of(path: Path) -> str:
    """SHA-256 of a file, or of all files below a folder with their names. Raises DataError where it is not there."""
    try:
        if path.is_dir():
            names = sorted(one for one in path.rglob("*") if one.is_file() and ".cache" not in one.parts)
            rows = [f"{one.relative_to(path).as_posix()} {sha256_of(one)}" for one in names]
            return hashlib.sha256("\n".join(rows).encode()).hexdigest()
        return sha256_of(path)
    except CheckpointError as error:
        raise DataError(f"{error}") from None
