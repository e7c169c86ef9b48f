"""The tensors of a checkpoint on the disk, read in any box whatever the cut they were saved in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.coverage import overlap_of
from megatron.checkpoint.tensor_files import TensorFile
from megatron.checkpoint.tensor_format import DTYPES
from megatron.config.errors import CheckpointError

_OPEN_FILES = 64


class StoredTensors:
    """A TensorSource over the files of a checkpoint whose manifest was verified.

    Only the bytes of a box are read from the disk, when it is asked for. For one thread. Methods raise KeyError for an
    unknown name, CheckpointError where a file has changed since it was verified.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        """folder: of the checkpoint. tensors: a part of its manifest, name -> shape, dtype and shards."""
        self._folder = folder
        self._tensors = tensors
        self._files: OrderedDict[str, TensorFile] = OrderedDict()

    def names(self) -> Iterable[str]:
        """Every name."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Of its values, as stored."""
        return DTYPES[self._tensors[name]["dtype"]]

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A new tensor on the CPU: the box of `shape` that begins at `offset`. Raises ValueError beyond the tensor."""
        self._check_box(name, offset, shape)
        box = torch.empty(tuple(shape), dtype=self.dtype(name))
        self.read_into(box, name, offset)
        return box

    def read_into(self, box: Tensor, name: str, offset: Sequence[int]) -> None:
        """The same into a tensor that is there: a part of a larger one needs no memory of its own."""
        self._check_box(name, offset, box.shape)
        wanted = (tuple(offset), tuple(box.shape))
        found = 0
        for shard in self._tensors[name]["shards"]:
            begin = tuple(shard["offset"])
            common = overlap_of(wanted, (begin, tuple(shard["shape"])))
            if common is None:
                continue
            there = tuple(slice(a - b, a - b + n) for a, b, n in zip(common[0], begin, common[1], strict=True))
            here = tuple(slice(a - b, a - b + n) for a, b, n in zip(common[0], wanted[0], common[1], strict=True))
            self._read_part(box[here], shard["file"], name, tuple(part.start for part in there))
            found += prod(common[1])
        if found != box.numel():
            raise CheckpointError(f"{self._folder}: tensor {name}: found {found} of {box.numel()} elements of a box")

    def whole(self, name: str) -> Tensor:
        """A new tensor on the CPU: all of it."""
        shape = self.shape(name)
        return self.read(name, (0,) * len(shape), shape)

    def all(self) -> dict[str, Tensor]:
        """Every tensor whole, in memory."""
        return {name: self.whole(name) for name in self.names()}

    def _check_box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> None:
        whole = self.shape(name)
        if len(offset) != len(whole) or any(
            begin < 0 or n < 0 or begin + n > end for begin, n, end in zip(offset, shape, whole, strict=True)
        ):
            raise ValueError(f"{name}: no box of {list(shape)} at {list(offset)} in a tensor of {list(whole)}")

    def _read_part(self, box: Tensor, file: str, name: str, offset: tuple[int, ...]) -> None:
        path = self._folder / file
        try:
            if file not in self._files:
                self._files[file] = TensorFile(path)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(file)
            self._files[file].read_into(box, name, offset)
        except (CheckpointError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: expected the file that was verified, found: {error}") from None
