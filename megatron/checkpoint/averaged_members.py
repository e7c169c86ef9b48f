"""Checkpoints that are to be averaged, opened and compared before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.imported import ORIGIN
from megatron.checkpoint.manager import CheckpointManager, CheckpointRef
from megatron.checkpoint.manifest import NAME, verify
from megatron.checkpoint.tensor_format import DTYPES
from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import NO_FUNCTION, ModelShape, unlike_fields
from megatron.data.ledger import Ledger

AVERAGED = "averaged"
"""The key of state.json that says which checkpoints an average was made of; no other checkpoint has it."""
_MASTERS = (torch.float32, torch.float64)
_IMPORTED = (*_MASTERS, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OpenMember:
    """A checkpoint that was found whole. manifest: its SHA-256, and so of all of it · files: paths in it."""

    ref: CheckpointRef
    manifest: str
    files: tuple[str, ...]

    @property
    def trained(self) -> bool:
        """Whether it is a run's, with a ledger, rather than an imported model."""
        return ORIGIN not in self.ref.state

    @property
    def ledger(self) -> Ledger:
        """What it was trained on. Only where it is `trained`."""
        return Ledger.from_json(self.ref.state["data"])

    @property
    def shape(self) -> ModelShape:
        """Of its model."""
        return ModelShape.from_json(self.ref.state["model"])

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of its weights, as they are stored."""
        return {DTYPES[entry["dtype"]] for entry in self.ref.tensors["model"].values()}

    def record(self) -> dict[str, Any]:
        """What an average says of it, as JSON values."""
        state = self.ref.state
        row: dict[str, Any] = {"path": str(self.ref.path.resolve()), "step": self.ref.step, "manifest": self.manifest}
        if not self.trained:
            return {**row, "imported": state[ORIGIN].get("folder") or state[ORIGIN].get("kind")}
        ledger = self.ledger
        return {
            **row,
            "run_id": state.get("run_id"),
            "seed": ledger.seed,
            "consumed_tokens": state["consumed_tokens"],
            "order": ledger.order_hash,
        }


@dataclass(frozen=True)
class Members:
    """Checkpoints that can be averaged, in the order they were named. weights: whole numbers in their proportion ·
    dtype: of the averaged weights · notes: what differs and is permitted, in words."""

    opened: tuple[OpenMember, ...]
    weights: tuple[int, ...]
    dtype: torch.dtype
    notes: tuple[str, ...]


def open_members(paths: Sequence[Path], weights: Sequence[int], say: Callable[[str], None]) -> Members:
    """Opens checkpoint folders, or run folders at their newest whole checkpoint, verifies every byte of their weights,
    and compares them.

    say: hears of damaged checkpoints that are passed over. Raises CheckpointError for one that is not whole or not
    there, ConfigError where they are not checkpoints of one architecture, vocabulary and precision.
    """
    opened = tuple(_open(path, say) for path in paths)
    return Members(opened, tuple(weights), *compare(opened))


def compare(opened: Sequence[OpenMember]) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype of the average and notes. Raises ConfigError that names the first member that does not fit and why."""
    first, notes = opened[0], list[str]()
    _refuse_twice(opened)
    if not first.trained and (trained := next((one for one in opened if one.trained), None)):
        raise ConfigError(
            f"--checkpoint {first.ref.path}: is an imported model and has no data position, which an average takes "
            f"from the first: name a run's checkpoint first, for example {trained.ref.path}"
        )
    for member in opened[1:]:
        if problems := _misfits(first, member):
            raise ConfigError(
                f"{member.ref.path} cannot be averaged with {first.ref.path}: {'; '.join(problems)}: only checkpoints "
                "of one architecture, vocabulary and tokenizer have a mean"
            )
        notes += [f"{member.ref.path}: {words}" for words in _permitted(first, member)]
    dtype = _dtype(opened)
    if any(member.dtypes != {dtype} for member in opened):
        word = str(dtype).removeprefix("torch.")
        narrow = ", ".join(f"{one.ref.path} ({_words(one.dtypes)})" for one in opened if one.dtypes != {dtype})
        notes.append(f"the average is kept in {word}; weights of {narrow} are taken as they are")
    return dtype, tuple(notes)


def _open(path: Path, say: Callable[[str], None]) -> OpenMember:
    if (path / "config.json").is_file() and not (path / NAME).exists():
        raise ConfigError(
            f"--checkpoint {path}: is a Hugging Face folder: make a checkpoint of it first: stagemix import_hf --input "
            f"{path} --output CHECKPOINT"
        )
    folder = path
    if (path / "checkpoints").is_dir():
        newest = CheckpointManager(path / "checkpoints").newest_whole(say)
        if newest is None:
            raise CheckpointError(f"--checkpoint {path}: this run holds no checkpoint yet")
        folder = newest.path
    if not folder.is_dir():
        raise CheckpointError(f"--checkpoint {folder}: no such checkpoint folder{_neighbours(folder)}")
    manifest = verify(folder, unread=("optimizer",))
    if "state.json" not in manifest["files"]:
        raise CheckpointError(f"{folder / 'state.json'}: expected in {NAME}, found no entry")
    state = json.loads((folder / "state.json").read_bytes())
    if "model" not in state or not (ORIGIN in state or "data" in state):
        raise CheckpointError(f"{folder / 'state.json'}: says neither the model nor what it was trained on")
    ref = CheckpointRef(folder, manifest["step"], state, manifest["tensors"])
    return OpenMember(ref, str(manifest["manifest_sha256"]), tuple(sorted(manifest["files"])))


def _neighbours(folder: Path) -> str:
    """What lies beside a checkpoint that is not there: it may have been retired."""
    there = sorted(path.name for path in folder.parent.glob("step-*") if path.is_dir())
    if not there:
        return ""
    return (
        f"; {folder.parent} has {', '.join(there)}: a run keeps the newest checkpoint.keep, stage ends and "
        "checkpoint.keep_steps"
    )


def _refuse_twice(opened: Sequence[OpenMember]) -> None:
    seen: dict[str, OpenMember] = {}
    for member in opened:
        if (other := seen.setdefault(member.manifest, member)) is not member:
            same = "is named twice" if other.ref.path == member.ref.path else f"is a copy of {other.ref.path}"
            raise ConfigError(
                f"--checkpoint {member.ref.path}: {same}: name it once, with the sum of the weights as its --weight"
            )


def _misfits(first: OpenMember, member: OpenMember) -> list[str]:
    """What keeps two checkpoints from being averaged, in words."""
    found = unlike_fields(first.shape, member.shape)
    ours, theirs = _fingerprint(first), _fingerprint(member)
    if ours and theirs and ours != theirs:
        found.append(f"its tokenizer is {_tokenizer(member)}, not {_tokenizer(first)}")
    if first.trained and member.trained and first.ledger.validation != member.ledger.validation:
        found.append(
            f"its held-out documents are {member.ledger.validation}, not {first.ledger.validation}, so that what one "
            "held out another may have been trained on"
        )
    return found or _unlike_tensors(first.ref.tensors["model"], member.ref.tensors["model"])


def _unlike_tensors(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    found = [f"has no tensor {name}" for name in sorted(ours.keys() - theirs.keys())]
    found += [f"has a tensor {name} besides" for name in sorted(theirs.keys() - ours.keys())]
    found += [
        f"tensor {name} has the shape {list(theirs[name]['shape'])}, not {list(ours[name]['shape'])}"
        for name in sorted(ours.keys() & theirs.keys())
        if list(ours[name]["shape"]) != list(theirs[name]["shape"])
    ]
    return [*found[:3], f"{len(found) - 3} more tensors differ"] if len(found) > 4 else found


def _permitted(first: OpenMember, member: OpenMember) -> list[str]:
    """What differs without a mean making no sense, in words."""
    then, now = first.shape.to_json(), member.shape.to_json()
    found = [
        f"{name} is {now.get(name)!r}, that of the average {then.get(name)!r}"
        for name in sorted(NO_FUNCTION - {"family", "initializer_range"})
        if then.get(name) != now.get(name)
    ]
    if not member.trained:
        if not _fingerprint(member):
            found.append("has no tokenizer to compare")
        return [*found, "is an imported model, so what it was trained on is not known"]
    if not first.trained:
        return found
    for words, ours, theirs in (
        ("seed", first.ledger.seed, member.ledger.seed),
        ("algorithm version", first.ledger.algorithm, member.ledger.algorithm),
        ("train.precision", _precision(first), _precision(member)),
    ):
        if ours != theirs:
            found.append(f"{words} is {theirs}, that of the first {ours}")
    return found


def _dtype(opened: Sequence[OpenMember]) -> torch.dtype:
    """Masters of runs are of one dtype, which the average has; of imported models alone it is float32, or float64."""
    runs = [member for member in opened if member.trained]
    for member in opened:
        allowed = _MASTERS if member.trained else _IMPORTED
        if strange := sorted(map(str, member.dtypes - set(allowed))):
            raise ConfigError(f"{member.ref.path}: holds weights in {', '.join(strange)}, which have no mean here")
    for member in runs:
        if member.dtypes != runs[0].dtypes or len(member.dtypes) != 1:
            raise ConfigError(
                f"{member.ref.path}: its master weights are {_words(member.dtypes)}, those of {runs[0].ref.path} "
                f"{_words(runs[0].dtypes)}: only masters of one precision are averaged"
            )
    if runs:
        return next(iter(runs[0].dtypes))
    return torch.float64 if any(torch.float64 in member.dtypes for member in opened) else torch.float32


def _words(dtypes: set[torch.dtype]) -> str:
    return "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _fingerprint(member: OpenMember) -> str:
    return str(member.ref.state.get("tokenizer", {}).get("fingerprint") or "")


def _tokenizer(member: OpenMember) -> str:
    return f"{member.ref.state['tokenizer'].get('name', '')} {_fingerprint(member)[:12]}".strip()


def _precision(member: OpenMember) -> str:
    return str(member.ref.state.get("precision", {}).get("name", ""))
