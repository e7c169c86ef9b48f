"""A folder of GPT-NeoX' checkpoints, which DeepSpeed writes: which step, which files, and whose tensors they hold.

    FOLDER/latest                                              the name of the newest step's folder
    FOLDER/global_step1000/configs/*.yml                       the run's own configs
    FOLDER/global_step1000/layer_02-model_00-model_states.pt   layer 2 of the pipeline module, model-parallel rank 0
    FOLDER/global_step1000/mp_rank_00_model_states.pt          a rank's state; without a pipeline, its layers too

The pipeline module's layers (megatron/model/gpt2_model.py there) are the embedding (0), a function (1), the transformer
layers (2 …), a function, the last norm, and the head where it is not the embedding. Without a pipeline the same numbers
stand in "sequential.N." before each name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import CheckpointError, ConfigError
from megatron.foreign.inert_pickle import Stub
from megatron.foreign.pieces import StoredTensor
from megatron.foreign.torch_file import TorchFile, flat_tensors, printable

LATEST = "latest"
_STEP = re.compile(r"global_step(\d+)")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SEQUENTIAL = re.compile(r"(?:module\.)?sequential\.(\d+)\.(.+)")
_NOT_WEIGHTS = ("inv_freq", "_extra_state", "attention.bias", "masked_bias", "alibi_embed")


@dataclass(frozen=True)
class NeoxFiles:
    """An opened checkpoint. layers: by number in the pipeline module, by model-parallel rank, tensors by name."""

    folder: Path
    step: int | str
    model_ranks: int
    layers: Mapping[int, Sequence[Mapping[str, StoredTensor]]]
    args: Mapping[str, Any]
    ignored: Sequence[str]
    files: Sequence[TorchFile]


def is_neox_folder(path: Path) -> bool:
    """Whether a folder has the form of GPT-NeoX' checkpoints."""
    return (
        any(path.glob("global_step*"))
        or any(path.glob("layer_*-model_*-model_states.pt"))
        or any(path.glob("mp_rank_*_model_states.pt"))
    )


def step_folder(path: Path, step: int | None = None) -> Path:
    """The folder with the files: of a step, of the one that `latest` names, or `path` itself.

    Raises CheckpointError where there is none, ConfigError where the choice is the user's.
    """
    if any(path.glob("*_model_states.pt")):
        return path
    there = {int(match[1]): found for found in path.glob("global_step*") if (match := _STEP.fullmatch(found.name))}
    listed = f"steps {', '.join(map(str, sorted(there)[:8]))}" if there else "none"
    if step is not None:
        if step not in there:
            raise CheckpointError(f"{path}: no step {step}: there are {listed}")
        return there[step]
    latest = path / LATEST
    if latest.is_file():
        words = latest.read_text(encoding="utf-8", errors="replace").strip()
        match = _STEP.fullmatch(words)
        if match is None or int(match[1]) not in there:
            raise CheckpointError(f"{latest}: names {words[:40]!r}, and there are {listed}: say --iteration")
        return there[int(match[1])]
    if len(there) == 1:
        return next(iter(there.values()))
    if there:
        raise ConfigError(f"{path}: holds {listed} and no file {LATEST!r}: say --iteration")
    raise CheckpointError(f"{path}: no global_step* folder and no *_model_states.pt: not a checkpoint of GPT-NeoX")


def open_neox(path: Path, step: int | None, verify: bool = True) -> NeoxFiles:
    """Opens every file of a step and brings them together; no tensor is read.

    Raises CheckpointError naming files that are missing or disagree.
    """
    folder = step_folder(Path(path), step)
    ranks = {int(match[1]): found for found in sorted(folder.iterdir()) if (match := _RANK.fullmatch(found.name))}
    pieces = {
        (int(match[1]), int(match[2])): found
        for found in sorted(folder.iterdir())
        if (match := _LAYER.fullmatch(found.name))
    }
    files: list[TorchFile] = []

    def opened(found: Path) -> TorchFile:
        files.append(TorchFile(found))
        if verify:
            files[-1].verify()
        return files[-1]

    states = {rank: opened(found) for rank, found in ranks.items()}
    for file in states.values():
        if not isinstance(file.content, dict):
            raise CheckpointError(f"{file.path}: holds no state of a rank: not a checkpoint of GPT-NeoX")
    if pieces:
        found, size = _from_layers({place: opened(path) for place, path in pieces.items()}, folder)
    else:
        found, size = _from_ranks(states, folder)
    content = states[min(states)].content if states else {}
    args = content.get("args")
    number = content.get("iteration", content.get("global_steps"))
    number = number if isinstance(number, int) else folder.name
    kept = {"args", "module", "iteration"}
    ignored = sorted(printable(str(key)) for key, value in content.items() if key not in kept and _holds_state(value))
    if any(folder.glob("*optim_states.pt")):
        ignored.append("*optim_states.pt")
    return NeoxFiles(folder, number, size, found, args if isinstance(args, dict) else {}, ignored, files)


def _holds_state(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | Stub) and bool(value)


def _from_layers(
    opened: Mapping[tuple[int, int], TorchFile], folder: Path
) -> tuple[dict[int, list[dict[str, StoredTensor]]], int]:
    size = 1 + max(rank for _, rank in opened)
    layers: dict[int, list[dict[str, StoredTensor]]] = {}
    for number in sorted({layer for layer, _ in opened}):
        for rank in range(size):
            file = opened.get((number, rank))
            if file is None:
                raise CheckpointError(
                    f"{folder}: layer_{number:02d}-model_{rank:02d}-model_states.pt is missing, of {size} "
                    "model-parallel ranks"
                )
            layers.setdefault(number, []).append(_tensors(file, str(file.path), file.content))
    return layers, size


def _from_ranks(states: Mapping[int, TorchFile], folder: Path) -> tuple[dict[int, list[dict[str, StoredTensor]]], int]:
    """Without a pipeline: module of each rank's state, with numbers of layers in its names."""
    if not states:
        raise CheckpointError(f"{folder}: neither layer_* nor mp_rank_* files: not a checkpoint of GPT-NeoX")
    size = 1 + max(states)
    layers: dict[int, list[dict[str, StoredTensor]]] = {}
    for rank in range(size):
        if rank not in states:
            raise CheckpointError(f"{folder}: mp_rank_{rank:02d}_model_states.pt is missing, of {size} ranks")
        file = states[rank]
        for name, stored in _tensors(file, f"{file.path}: module", file.content.get("module")).items():
            match = _SEQUENTIAL.fullmatch(name)
            if match is None:
                raise CheckpointError(f"{stored}: is no part of GPT-NeoX' model (sequential.N.…)")
            layers.setdefault(int(match[1]), [{} for _ in range(size)])[rank][match[2]] = stored
    if not layers:
        raise CheckpointError(f"{folder}: mp_rank_* files hold no weights, and layer_* files are missing")
    return layers, size


def _tensors(file: TorchFile, where: str, tree: Any) -> dict[str, StoredTensor]:
    names = (
        (name, record) for name, record in flat_tensors(where, tree) if not any(part in name for part in _NOT_WEIGHTS)
    )
    return {name.removeprefix("module."): StoredTensor(file, name, record) for name, record in names}
