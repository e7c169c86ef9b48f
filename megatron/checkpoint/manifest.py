"""The manifest of a checkpoint: every file with size and SHA-256, every tensor with shape, dtype and file.

It is written last, in one canonical spelling, and carries a checksum of itself: a checkpoint whose manifest agrees
with its files is whole, and every other one is damaged.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron.config.errors import CheckpointError

FORMAT = 1
NAME = "manifest.json"
PARTS = ("model", "optimizer", "rng")


def build_manifest(folder: Path, step: int, keep_forever: bool) -> dict[str, Any]:
    """The manifest of what lies in `folder` now."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(sha256_of, paths))
    files = {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for name, path, digest in zip(names, paths, digests, strict=True)
    }
    tensors: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name, path in zip(names, paths, strict=True):
        if name.endswith(".safetensors"):
            tensors[_part(name)].update(_tensors_of(path, name))
    return {"format": FORMAT, "step": step, "keep_forever": keep_forever, "files": files, "tensors": tensors}


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, with the checksum of everything else in it."""
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "manifest_sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, itself checked; its files are not. Raises CheckpointError."""
    path = folder / NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a manifest, found none: {error.strerror or error}") from None
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found damage: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path}: expected format {FORMAT}, found {found}")
    for key, kind in {"step": int, "keep_forever": bool, "files": dict, "tensors": dict}.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path}: expected {key} of type {kind.__name__}, found {manifest.get(key)!r:.60}")
    expected = json.loads(manifest_bytes(manifest))["manifest_sha256"]
    if manifest_bytes(manifest) != raw:
        raise CheckpointError(f"{path}: expected sha256 {manifest.get('manifest_sha256')} of itself, found {expected}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError with file, what was expected and what was found."""
    manifest = read_manifest(folder)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in files.items():
        _check_size(folder, name, entry)
    stale = [path for path in folder.rglob("*.safetensors") if path.relative_to(folder).as_posix() not in files]
    if stale:
        raise CheckpointError(f"{stale[0]}: expected only files that {NAME} lists, found one that it does not")
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(sha256_of, [folder / name for name in files]))
    for (name, entry), digest in zip(files.items(), digests, strict=True):
        if digest != entry["sha256"]:
            raise CheckpointError(f"{folder / name}: expected sha256 {entry['sha256']}, found {digest}")
    _check_tensors(folder, manifest)
    return manifest


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises CheckpointError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror or error}") from None


def _check_size(folder: Path, name: str, entry: dict[str, Any]) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder / NAME}: expected paths inside the checkpoint, found {name!r}")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file of {entry['bytes']} bytes, found none")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{path}: expected {entry['bytes']} bytes, found {path.stat().st_size}")


def _check_tensors(folder: Path, manifest: dict[str, Any]) -> None:
    found: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            found[_part(name)].update(_tensors_of(folder / name, name))
    for part in PARTS:
        expected = manifest["tensors"][part]
        for name in sorted({*expected, *found[part]}):
            if expected.get(name) != found[part].get(name):
                where = folder / (expected.get(name) or found[part][name])["file"]
                raise CheckpointError(
                    f"{where}: tensor {name}: expected {expected.get(name)}, found {found[part].get(name)}"
                )


def _tensors_of(path: Path, name: str) -> dict[str, dict[str, Any]]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return {
                key: {"shape": list(part.get_shape()), "dtype": part.get_dtype(), "file": name, "shards": 1}
                for key, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found: {error}") from None


def _part(name: str) -> str:
    part = PurePosixPath(name).parts[0].removesuffix(".safetensors")
    if part not in PARTS:
        raise CheckpointError(f"{name}: expected tensors under {', '.join(PARTS)}, found {part!r}")
    return part
