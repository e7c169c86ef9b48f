"""Weights of a Hugging Face folder as ours, read box by box: the inverse of the export, by the same name table.

Only safetensors are read (law C2). Every name, size and dtype is checked before anything is handed on, every value
before it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.finite import is_finite
from megatron.checkpoint.stored_tensors import StoredTensors
from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import CONFIG
from megatron.hf.families.family import Family
from megatron.hf.folder_config import check_config
from megatron.hf.layout import ReadInto, fill_box
from megatron.hf.name_table import Entry, entries, our_size, their_size

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TRAINABLE = ("F64", "F32", "F16", "BF16")


class HuggingFaceTensors:
    """A TensorSource over the safetensors of a Hugging Face folder: our names, the files' dtypes.

    Only the bytes of a box are read, when it is asked for, and checked to be finite then; the vocabulary's padding is
    zero. For one thread. Methods raise KeyError for an unknown name.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """Checks every name, size and dtype, for which the files' headers are enough, and what config.json says of
        them.

        Raises CheckpointError for a missing or truncated file, a path that leaves the folder, pickle files only, a
        tensor that is missing, unknown, of another size or of no floating point, and a config.json that means another
        model than `shape`; ConfigError for one that no shape expresses.
        """
        self._folder = Path(folder)
        self._model = shape
        self._places: dict[str, tuple[Entry, int, str]] = {}
        self._files = tensor_files(self._folder)
        found = _headers(self._files)
        self._stored = StoredTensors(self._folder, found)
        family = check_config(self._folder, shape)
        unknown = {name for name in found if not name.endswith(family.buffers)}
        for entry in entries(family.table, shape):
            theirs = next((name for name in family.other_names(entry.theirs) if name in found), entry.theirs)
            self._check(theirs, found.get(theirs), their_size(entry, shape))
            unknown.discard(theirs)
            self._places |= {ours: (entry, number, theirs) for number, ours in enumerate(entry.ours)}
        self._twin = self._stored_twice(family, found, unknown)
        if unknown:
            names = ", ".join(sorted(unknown)[:8])
            raise CheckpointError(f"{self._folder}: tensors that this model shape does not know: {names}")

    def _stored_twice(self, family: Family, found: Mapping[str, Any], unknown: set[str]) -> str | None:
        """A head that is stored beside the embedding to which it is tied; it is taken out of `unknown`."""
        if not self._model.tie_word_embeddings:
            return None
        heads = [entry for entry in family.table if entry.ours == ("head.weight",)]
        for name in (name for entry in heads for name in family.other_names(entry.theirs)):
            if name in unknown:
                self._check(name, found[name], their_size(heads[0], self._model))
                unknown.discard(name)
                return name
        return None

    def _check(self, name: str, found: Mapping[str, Any] | None, wanted: tuple[int, ...]) -> None:
        if found is None:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing, which this model shape needs")
        if tuple(found["shape"]) != wanted:
            raise CheckpointError(
                f"{self._folder}: tensor {name} is {found['shape']}, and config and model shape say {list(wanted)}"
            )
        if found["dtype"] not in _TRAINABLE:
            raise CheckpointError(
                f"{self._folder}: tensor {name} is of {found['dtype']}: weights are {', '.join(_TRAINABLE)}: convert "
                "the model first"
            )

    @property
    def parameters(self) -> int:
        """Of the model: a tied head counts once, padding of the vocabulary not at all."""
        theirs = {entry.theirs: entry for entry, _, _ in self._places.values()}
        return sum(prod(their_size(entry, self._model)) for entry in theirs.values())

    def stored_at(self, name: str) -> str:
        """The file and their name of the tensor that holds one of ours, for people."""
        theirs = self._places[name][2]
        return f"{self._files[theirs].name} (as {theirs})"

    def names(self) -> Iterable[str]:
        """Every one of our names."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of our whole tensor, the vocabulary padded."""
        entry, number, _ = self._places[name]
        return our_size(entry.size[number], self._model)

    def dtype(self, name: str) -> torch.dtype:
        """Of its values, as stored."""
        return self._stored.dtype(self._places[name][2])

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A new tensor on the CPU: the box of `shape` that begins at `offset`.

        Raises CheckpointError where it holds NaN or infinity, or a file has changed; ValueError beyond the tensor.
        """
        whole = self.shape(name)
        if any(
            min(begin, size) < 0 or begin + size > end for begin, size, end in zip(offset, shape, whole, strict=True)
        ):
            raise ValueError(f"{name}: no box of {list(shape)} at {list(offset)} in a tensor of {list(whole)}")
        entry, number, theirs = self._places[name]
        box = torch.zeros(tuple(shape), dtype=self.dtype(name))
        if box.numel():
            for part in fill_box(box, entry, number, offset, self._model, self._reader(theirs)):
                if not is_finite(part):
                    raise CheckpointError(f"{self._folder}: tensor {theirs} holds NaN or infinity")
            if name == "embedding.weight" and self._twin:
                self._compare_twin(box, entry, offset, theirs)
        return box

    def _reader(self, theirs: str) -> ReadInto:
        return lambda part, offset: self._stored.read_into(part, theirs, offset)

    def _compare_twin(self, box: Tensor, entry: Entry, offset: Sequence[int], theirs: str) -> None:
        assert self._twin is not None
        twin = torch.zeros(box.shape, dtype=self._stored.dtype(self._twin))
        for _ in fill_box(twin, entry, 0, offset, self._model, self._reader(self._twin)):
            pass
        if not torch.equal(twin.to(box.dtype), box):
            raise CheckpointError(
                f"{self._folder}: {CONFIG} says tie_word_embeddings, and tensor {self._twin} differs from {theirs}, to "
                "which it would be tied: say tie_word_embeddings = false there and in [model]"
            )

    def whole(self, name: str) -> Tensor:
        """A new tensor on the CPU: all of it."""
        shape = self.shape(name)
        return self.read(name, (0,) * len(shape), shape)

    def all(self) -> dict[str, Tensor]:
        """Every tensor whole, in memory."""
        return {name: self.whole(name) for name in self.names()}


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


def _headers(home: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and file of each of their tensors, in the words of a checkpoint's manifest; no value is read."""
    names: dict[Path, list[str]] = {}
    for name, path in home.items():
        names.setdefault(path, []).append(name)
    found: dict[str, dict[str, Any]] = {}
    for path, its in names.items():
        with _open(path) as file:
            for name in its:
                try:
                    header = file.get_slice(name)
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from None
                shape = header.get_shape()
                shards = [{"file": path.name, "offset": [0] * len(shape), "shape": shape}]
                found[name] = {"shape": shape, "dtype": header.get_dtype(), "shards": shards}
    return found


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
