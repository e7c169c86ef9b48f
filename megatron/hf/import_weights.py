"""Weights of a Hugging Face folder as ours: the inverse of the export, by the same name table.

Only safetensors are read (law C2). Every name, size and value is checked before anything is handed on.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import architecture_for
from megatron.hf.layout import unpack
from megatron.hf.name_table import entries, their_size

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ALIASES = {"embed_out.weight": "lm_head.weight"}  # transformers 5 saves GPT-NeoX heads under the new name


def load_hf_weights(folder: Path, shape: ModelShape) -> dict[str, Tensor]:
    """Our tensors by name, in the dtype of the files, from the safetensors of `folder`.

    Raises CheckpointError for a missing or truncated file, a path that leaves the folder, pickle files only, a tensor
    that is missing, unknown, of another size, or not finite; ConfigError for a shape that no architecture expresses.
    """
    folder = Path(folder)
    home = tensor_files(folder)
    weights: dict[str, Tensor] = {}
    for entry in entries(architecture_for(shape).table, shape):
        name = entry.theirs if entry.theirs in home else _ALIASES.get(entry.theirs, entry.theirs)
        if name not in home:
            raise CheckpointError(f"{folder}: tensor {name} is missing, which this model shape needs")
        tensor = _read(home.pop(name), name)
        if tuple(tensor.shape) != (wanted := their_size(entry, shape)):
            raise CheckpointError(
                f"{folder}: tensor {name} is {list(tensor.shape)}, and config and model shape say {list(wanted)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: tensor {name} holds NaN or infinity")
        weights.update(zip(entry.ours, unpack(entry, tensor, shape), strict=True))
    if home:
        raise CheckpointError(f"{folder}: tensors that this model shape does not know: {', '.join(sorted(home)[:8])}")
    return weights


def tensor_files(folder: Path) -> dict[str, Path]:
    """Each tensor's file, from the index or the one safetensors file. Raises CheckpointError."""
    if (folder / INDEX).is_file():
        return _from_index(folder)
    single = folder / SINGLE
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder}: only {', '.join(pickles[:3])} found, and pickle files can run code when read, so they are "
            "never read. Convert the model to safetensors (save_pretrained with safe_serialization) first"
        )
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} found: not a Hugging Face model folder")


def _from_index(folder: Path) -> dict[str, Path]:
    path = folder / INDEX
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index with a weight_map: {error!r}") from None
    home: dict[str, Path] = {}
    for tensor, file in names:
        # A name, not a path: "../x", "/x" and "a/b" all differ from their last part.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {tensor} lies in {file!r}: only .safetensors files in the folder itself are read"
            )
        if not (folder / file).is_file():
            raise CheckpointError(f"{path}: {file} is missing, which holds tensor {tensor}")
        home[tensor] = folder / file
    return home


def _read(path: Path, name: str) -> Tensor:
    with _open(path) as file:
        try:
            return file.get_tensor(name)  # type: ignore[no-any-return]
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
