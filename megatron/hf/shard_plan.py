"""Which tensor of a Hugging Face folder goes where in which file, decided from shapes alone, before any value is read.

Files are cut and named as `save_pretrained` cuts and names them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from megatron.checkpoint.tensor_files import TensorPlace, lay_out
from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.import_weights import SINGLE
from megatron.hf.name_table import Entry, their_size

DEFAULT_SHARD = "5GB"
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{inner}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for inner, base in (("", 1000), ("i", 1024))
}
_LAYER = re.compile(r"layers\.(\d+)\.")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(words: str) -> int:
    """Bytes of "5GB", "500MB" (1000), "2GiB" (1024) or a plain number. Raises ConfigError."""
    match = _SIZE.fullmatch(words)
    units = {unit.lower(): scale for unit, scale in _UNITS.items()}
    if match is None or match.group(2).lower() not in units:
        raise ConfigError(f'--max-shard-size {words!r}: write a size such as "5GB", "500MB" or "2GiB"')
    size = int(float(match.group(1)) * units[match.group(2).lower()])
    if size < 1:
        raise ConfigError(f'--max-shard-size {words!r}: a file holds at least one byte: write a size such as "5GB"')
    return size


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of theirs: its entry in the name table, its file by number, and its place in that file."""

    entry: Entry
    file: int
    place: TensorPlace

    @property
    def name(self) -> str:
        """Theirs."""
        return self.entry.theirs


@dataclass(frozen=True)
class PlannedFile:
    """One file. header: the first bytes of it. size: of all of it, in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class ShardPlan:
    """All files and, in the name table's order, all tensors."""

    files: tuple[PlannedFile, ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def bytes_of_tensors(self) -> int:
        """Without headers."""
        return sum(tensor.place.size for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(prod(tensor.place.shape) for tensor in self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of all names, dtypes, shapes and places."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.name.encode() + b"\0" + file.header)
        return digest.hexdigest()

    def index(self) -> dict[str, Any] | None:
        """model.safetensors.index.json; None where one file holds all."""
        if len(self.files) == 1:
            return None
        home = {tensor.name: self.files[tensor.file].name for tensor in self.tensors}
        totals = {"total_parameters": self.parameters, "total_size": self.bytes_of_tensors}
        return {"metadata": totals, "weight_map": dict(sorted(home.items()))}


def plan_shards(table: Iterable[Entry], shape: ModelShape, dtype: torch.dtype, max_shard_size: int) -> ShardPlan:
    """The plan for the entries of a name table. max_shard_size: bytes of the tensors in a file; a larger tensor has a
    file for itself."""
    groups = _groups([(entry, their_size(entry, shape)) for entry in layer_by_layer(table)], dtype, max_shard_size)
    files: list[PlannedFile] = []
    place_of: dict[str, tuple[int, TensorPlace]] = {}
    for number, group in enumerate(groups):
        name = SINGLE if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        header, places = lay_out(((entry.theirs, dtype, size) for entry, size in group), {"format": "pt"})
        end = max((place.begin + place.size for place in places.values()), default=len(header))
        files.append(PlannedFile(name, header, end))
        place_of |= {theirs: (number, place) for theirs, place in places.items()}
    tensors = tuple(PlannedTensor(entry, *place_of[entry.theirs]) for group in groups for entry, _ in group)
    return ShardPlan(tuple(files), tensors)


def layer_by_layer(table: Iterable[Entry]) -> list[Entry]:
    """The entries with each layer's beside each other, as `transformers` has them: whoever reads one layer opens few
    files."""
    before: list[Entry] = []
    layers: dict[int, list[Entry]] = {}
    after: list[Entry] = []
    for entry in table:
        if layer := _LAYER.match(entry.ours[0]):
            layers.setdefault(int(layer.group(1)), []).append(entry)
        else:
            (after if layers else before).append(entry)
    return [*before, *(entry for number in sorted(layers) for entry in layers[number]), *after]


_Sized = tuple[Entry, tuple[int, ...]]


def _groups(tensors: Iterable[_Sized], dtype: torch.dtype, largest: int) -> list[list[_Sized]]:
    """Filled in order; a tensor that is larger than a file has one for itself, and the file at hand is filled on."""
    groups: list[list[_Sized]] = []
    group: list[_Sized] = []
    size = 0
    for tensor in tensors:
        bytes_here = prod(tensor[1]) * dtype.itemsize
        if bytes_here > largest:
            groups.append([tensor])
            continue
        if size + bytes_here > largest:
            groups.append(group)
            group, size = [], 0
        group.append(tensor)
        size += bytes_here
    return [*groups, group] if group else groups
