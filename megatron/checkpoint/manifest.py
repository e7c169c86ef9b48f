"""The manifest of a checkpoint: every file with size and SHA-256, every tensor with shape, dtype and all its shards.

It is written last, in one canonical spelling, and carries a checksum of itself: a checkpoint whose manifest agrees
with its files, and whose shards cover every tensor exactly once, is whole; every other one is damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron.checkpoint.coverage import fault_in_cover
from megatron.config.errors import CheckpointError

FORMAT = 2
NAME = "manifest.json"
PARTS = ("model", "optimizer", "rng")
OFFSETS, OFFSET = "DCP_SHARDING_INFO", "saved_offsets"
"""Where torch.distributed.checkpoint looks for the offsets of cut tensors in a file's metadata."""
SHAPES = "whole_shapes"
"""Where we keep the shapes of the tensors that a file holds parts of: a missing last shard must not go unnoticed."""

Seal = dict[str, Any]
"""bytes and sha256 of a file, as it was written."""


def build_manifest(
    folder: Path, step: int, keep_forever: bool, seals: Mapping[str, Seal] | None = None
) -> dict[str, Any]:
    """The manifest of `folder`: of the files in `seals`, by their path in it, or of all that lie there now.

    Raises CheckpointError where shards contradict each other or do not cover a tensor exactly once.
    """
    if seals is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
        with ThreadPoolExecutor(max_workers=8) as pool:
            digests = list(pool.map(sha256_of, paths))
        seals = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    names = [name for name in sorted(seals) if name.endswith(".safetensors")]
    tensors: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    with ThreadPoolExecutor(max_workers=8) as pool:
        boxes = list(pool.map(lambda name: _boxes_in(folder / name), names))
    for file, found in zip(names, boxes, strict=True):
        for name, box in found.items():
            _add_shard(tensors[_part(file)], folder, name, file, box)
    files = {name: dict(seal) for name, seal in seals.items()}
    manifest = {"format": FORMAT, "step": step, "keep_forever": keep_forever, "files": files, "tensors": tensors}
    _check_coverage(folder, manifest, 0, 1)
    return manifest


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, a line for each tensor, with the checksum of everything else in it."""
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (_spelled({**body, "manifest_sha256": digest}, 0) + "\n").encode()


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
    spelled = manifest_bytes(manifest)
    if spelled != raw:
        expected = json.loads(spelled)["manifest_sha256"]
        raise CheckpointError(f"{path}: expected sha256 {manifest.get('manifest_sha256')} of itself, found {expected}")
    return manifest


def verify(folder: Path, rank: int = 0, ranks: int = 1, unread: Collection[str] = ()) -> dict[str, Any]:
    """The manifest of a whole checkpoint, or of one whose share for `rank` of `ranks` is whole.

    unread: names of PARTS of which only sizes and headers are looked at now; `check_bytes` is for what is used of them.
    Raises CheckpointError with file or tensor, what was expected and what was found.
    """
    manifest = read_manifest(folder)
    files: dict[str, Seal] = manifest["files"]
    share = sorted(files)[rank::ranks]
    for name in share:
        _check_size(folder, name, files[name])
    stray = [path for path in folder.rglob("*.safetensors") if path.relative_to(folder).as_posix() not in files]
    if stray:
        raise CheckpointError(f"{stray[0]}: expected only files that {NAME} lists, found one that it does not")
    check_bytes(folder, files, [name for name in share if PurePosixPath(name).parts[0] not in unread])
    _check_coverage(folder, manifest, rank, ranks)
    _check_tensors(folder, manifest, share)
    return manifest


def check_bytes(folder: Path, files: Mapping[str, Seal], names: Sequence[str]) -> None:
    """Reads the files of these names. Raises CheckpointError where one has another SHA-256 than in `files`."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(sha256_of, [folder / name for name in names]))
    for name, digest in zip(names, digests, strict=True):
        if digest != files[name]["sha256"]:
            raise CheckpointError(f"{folder / name}: expected sha256 {files[name]['sha256']}, found {digest}")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises CheckpointError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror or error}") from None


def _spelled(value: Any, depth: int) -> str:
    """JSON with sorted keys, the upper three levels a line for each entry: 500,000 shards stay one line a tensor."""
    if depth == 3 or not isinstance(value, dict) or not value:
        return json.dumps(value, sort_keys=True)
    indent = " " * (depth + 1)
    lines = [f"{indent}{json.dumps(key)}: {_spelled(value[key], depth + 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def _check_size(folder: Path, name: str, entry: Seal) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder / NAME}: expected paths inside the checkpoint, found {name!r}")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file of {entry['bytes']} bytes, found none")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{path}: expected {entry['bytes']} bytes, found {path.stat().st_size}")


def _check_coverage(folder: Path, manifest: dict[str, Any], rank: int, ranks: int) -> None:
    names = [(part, name) for part in PARTS for name in sorted(manifest["tensors"].get(part, {}))]
    for part, name in names[rank::ranks]:
        entry = manifest["tensors"][part][name]
        try:
            shards = entry["shards"]
            boxes = [(tuple(shard["offset"]), tuple(shard["shape"])) for shard in shards]
            files = [shard["file"] for shard in shards]
            fault = fault_in_cover(entry["shape"], boxes) if shards else "it has no shard"
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / NAME}: tensor {name}: expected shards, found {error!r}") from None
        for file in files:
            if file not in manifest["files"]:
                raise CheckpointError(f"{folder / NAME}: tensor {name}: expected shards in listed files, found {file}")
        if fault:
            where = ", ".join(f"{number}: {file}" for number, file in enumerate(files[:8]))
            raise CheckpointError(
                f"{folder}: {part} tensor {name}: expected shards that cover it exactly once, found a fault: {fault} "
                f"({where}{', …' if len(files) > 8 else ''})"
            )


def _check_tensors(folder: Path, manifest: dict[str, Any], share: Iterable[str]) -> None:
    """What the files of the share hold is what the manifest says that they hold."""
    mine = {name for name in share if name.endswith(".safetensors")}
    expected: dict[str, dict[str, Any]] = {file: {} for file in mine}
    for entries in manifest["tensors"].values():
        for name, entry in entries.items():
            for shard in entry["shards"]:
                if shard["file"] in mine:
                    box = {"offset": shard["offset"], "shape": shard["shape"]}
                    expected[shard["file"]][name] = {"whole": entry["shape"], "dtype": entry["dtype"], **box}
    for file in sorted(mine):
        found = _boxes_in(folder / file)
        for name in sorted({*expected[file], *found}):
            if expected[file].get(name) != found.get(name):
                raise CheckpointError(
                    f"{folder / file}: tensor {name}: expected {expected[file].get(name)}, found {found.get(name)}"
                )


def _add_shard(entries: dict[str, Any], folder: Path, name: str, file: str, box: dict[str, Any]) -> None:
    entry = entries.setdefault(name, {"shape": box["whole"], "dtype": box["dtype"], "shards": []})
    if (entry["shape"], entry["dtype"]) != (box["whole"], box["dtype"]):
        raise CheckpointError(
            f"{folder / file}: tensor {name}: expected a shard of {entry['dtype']} {entry['shape']} as in "
            f"{entry['shards'][0]['file']}, found one of {box['dtype']} {box['whole']}"
        )
    entry["shards"].append({"file": file, "offset": box["offset"], "shape": box["shape"]})


def _boxes_in(path: Path) -> dict[str, dict[str, Any]]:
    """By tensor name, what a file holds of it: whole (its shape), dtype, offset and shape of the box."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            offsets, shapes = json.loads(metadata.get(OFFSETS, "{}")), json.loads(metadata.get(SHAPES, "{}"))
            boxes = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                shape = list(part.get_shape())
                offset = offsets[name][OFFSET] if name in offsets else [0] * len(shape)
                whole = shapes.get(name, shape)
                boxes[name] = {"whole": whole, "dtype": part.get_dtype(), "offset": offset, "shape": shape}
            return boxes
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found: {error}") from None


def _part(name: str) -> str:
    part = PurePosixPath(name).parts[0].removesuffix(".safetensors")
    if part not in PARTS:
        raise CheckpointError(f"{name}: expected tensors under {', '.join(PARTS)}, found {part!r}")
    return part
