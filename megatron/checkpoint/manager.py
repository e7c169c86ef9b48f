"""Saving, finding, opening and retiring checkpoints under one folder (laws C1 and C2).

A checkpoint is a folder `step-000001000`:

    manifest.json               files with bytes and sha256, tensors with shape, dtype and file; written last
    state.json                  step, consumed samples and tokens, data position, precision, …: plain JSON
    model/*.safetensors         weights by global name, fp32 masters
    optimizer/*.safetensors     "<parameter>/exp_avg", "<parameter>/exp_avg_sq", "<parameter>/step"
    rng.safetensors             states of the random generators
    config.toml, tokenizer/…    copies of what the run was made with

Tensors are plain, whole safetensors files. torch.distributed.checkpoint's HuggingFaceStorageReader reads the same
files and reshards them, so that sharded layouts load what one process saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.manifest import NAME, build_manifest, manifest_bytes, read_manifest, verify
from megatron.checkpoint.storage import Storage, Tensors, read_tensors
from megatron.config.errors import CheckpointError, StorageError

ASIDE, RETIRED = ".tmp-", ".old-"
FILE_BYTES = 4 * 10**9
_STEP = re.compile(r"^step-(\d{9,})$")


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that was found whole."""

    path: Path
    step: int
    state: dict[str, Any]

    def model(self) -> dict[str, torch.Tensor]:
        """Weights by global name."""
        return self._part("model")

    def optimizer(self) -> dict[str, torch.Tensor]:
        """Optimizer state, flat, "<parameter>/<field>"."""
        return self._part("optimizer")

    def rng(self) -> dict[str, torch.Tensor]:
        """States of the random generators."""
        return read_tensors(self.path / "rng.safetensors")

    def _part(self, part: str) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted((self.path / part).glob("*.safetensors")):
            tensors.update(read_tensors(path))
        return tensors


class CheckpointManager:
    """The checkpoints of one run. `keep` newest ones stay, and besides them those saved with `keep_forever`."""

    def __init__(self, folder: Path, keep: int = 3, storage: Storage | None = None) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.storage = storage or Storage()
        self._damaged: set[Path] = set()

    def save(
        self,
        step: int,
        model: Tensors,
        optimizer: Tensors,
        rng: Tensors,
        state: dict[str, Any],
        extra_files: Mapping[str, bytes | Path] | None = None,
        keep_forever: bool = False,
        retire: bool = True,
    ) -> CheckpointRef:
        """Writes a checkpoint aside, makes it durable, publishes it by one rename; then retires surplus old ones.

        `extra_files` maps a path inside the checkpoint to its bytes, or to a file to copy. With `retire=False` no
        older checkpoint is deleted. Raises StorageError; whatever was saved before is then still there, untouched.
        """
        self._sweep()
        final = self.folder / f"step-{step:09d}"
        aside = self.folder / f"{ASIDE}{final.name}-{os.getpid()}"
        try:
            self._write(aside, {"model": model, "optimizer": optimizer}, rng, state, extra_files or {})
            manifest = build_manifest(aside, step, keep_forever)
            self.storage.write_bytes(aside / NAME, manifest_bytes(manifest))
            for path in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
                self.storage.sync_folder(path)
            if final.exists():
                self.set_aside(final)
            self.storage.rename(aside, final)
        except Exception:
            if aside.exists():
                self._remove_quietly(aside)
            raise
        self._damaged.discard(final)
        if retire:
            self._retire()
        return CheckpointRef(final, step, state)

    def steps(self) -> list[tuple[int, Path]]:
        """Every published checkpoint, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = [(_STEP.match(path.name), path) for path in self.folder.iterdir() if path.is_dir()]
        return sorted((int(match.group(1)), path) for match, path in matches if match)

    def newest_name(self) -> str:
        """The newest checkpoint's path, for messages."""
        steps = self.steps()
        return str(steps[-1][1]) if steps else "not yet written"

    def newest_whole(self, report: Callable[[str], None]) -> CheckpointRef | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Each damaged one is named to `report` and passed over. Raises CheckpointError where all are damaged.
        """
        problems: list[str] = []
        for _, path in reversed(self.steps()):
            try:
                found = open_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                self._damaged.add(path)
                report(f"damaged checkpoint passed over: {error}")
                continue
            return found
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of its {len(problems)} checkpoints is whole; the newest: {problems[0]}. "
                "Restore one from a copy, or set run.output to another folder to begin again"
            )
        return None

    def is_whole_as_far_as_known(self, path: Path) -> bool:
        """False for a checkpoint that this manager has found damaged. Nothing is read."""
        return path not in self._damaged

    def set_aside(self, path: Path) -> Path:
        """Moves a checkpoint out of the run's sight without deleting it: to `discarded/` beside the others."""
        place = self.folder / "discarded"
        self.storage.make_folder(place)
        number = sum(1 for _ in place.iterdir())
        target = place / f"{path.name}-{number:03d}"
        self.storage.rename(path, target)
        return target

    def _write(
        self,
        aside: Path,
        parts: dict[str, Tensors],
        rng: Tensors,
        state: dict[str, Any],
        extra_files: Mapping[str, bytes | Path],
    ) -> None:
        self.storage.make_folder(aside)
        for part, tensors in parts.items():
            self.storage.make_folder(aside / part)
            files = _split(tensors)
            for index, names in enumerate(files, start=1):
                path = aside / part / f"{part}-{index:05d}-of-{len(files):05d}.safetensors"
                self.storage.write_tensors(path, {name: tensors[name] for name in names})
        self.storage.write_tensors(aside / "rng.safetensors", rng)
        self.storage.write_bytes(aside / "state.json", (json.dumps(state, indent=1, allow_nan=False) + "\n").encode())
        for name, content in extra_files.items():
            self.storage.make_folder((aside / name).parent)
            if isinstance(content, bytes):
                self.storage.write_bytes(aside / name, content)
            else:
                self.storage.copy_file(content, aside / name)

    def _sweep(self) -> None:
        """Removes what killed saves and killed deletions left behind."""
        self.storage.make_folder(self.folder)
        for path in list(self.folder.iterdir()):
            if path.name.startswith((ASIDE, RETIRED)):
                self.storage.remove_folder(path)

    def _retire(self) -> None:
        passing = [path for _, path in self.steps() if path not in self._damaged and not _keeps_forever(path)]
        for path in passing[: -self.keep]:
            # Renamed first: a half-deleted folder must never look like a checkpoint.
            retired = path.with_name(f"{RETIRED}{path.name}-{os.getpid()}")
            self.storage.rename(path, retired)
            self.storage.remove_folder(retired)

    def _remove_quietly(self, path: Path) -> None:
        # The error that stopped the save is the one to show; the next save sweeps what stays here.
        with contextlib.suppress(StorageError):
            self.storage.remove_folder(path)


def open_checkpoint(path: Path) -> CheckpointRef:
    """The checkpoint at `path`, every byte of it verified. Raises CheckpointError where it is absent or damaged."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    manifest = verify(path)
    for name in ("state.json", "rng.safetensors"):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path / name}: expected in {NAME}, found no entry")
    state = json.loads((path / "state.json").read_bytes())
    return CheckpointRef(path, manifest["step"], state)


def _keeps_forever(path: Path) -> bool:
    try:
        return bool(read_manifest(path)["keep_forever"])
    except CheckpointError:
        return True  # not ours to delete: its damage is named when the run looks for a checkpoint


def _split(tensors: Tensors) -> list[list[str]]:
    """Names by file: sorted, at most FILE_BYTES a file (one tensor may be larger), never no file."""
    files: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        bytes_here = tensors[name].numel() * tensors[name].element_size()
        if files[-1] and size + bytes_here > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += bytes_here
    return files
