"""Tensors put together from pieces of other tensors: what the layouts of other trainers come down to, read in boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron.config.errors import CheckpointError
from megatron.foreign.torch_file import TensorRecord, TorchFile, printable


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of one file. key: its full name there."""

    file: TorchFile
    key: str
    record: TensorRecord

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.record.shape

    def __str__(self) -> str:
        return f"{self.file.path}: {printable(self.key)}"

    def read(self, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A new tensor: a box of it."""
        return self.file.read(self.key, self.record, offset, shape)


@dataclass(frozen=True)
class Piece:
    """A box of ours that is a box of theirs, or every `step`-th row of one.

    ours, theirs: where it begins in each; shape: its size in ours.
    """

    stored: StoredTensor
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    shape: tuple[int, ...]
    step: int = 1

    def read(self, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of it at `offset` within it."""
        rows = (shape[0] - 1) * self.step + 1
        begin = (
            self.theirs[0] + offset[0] * self.step,
            *(a + b for a, b in zip(self.theirs[1:], offset[1:], strict=True)),
        )
        return self.stored.read(begin, (rows, *shape[1:]))[:: self.step]


Join = Literal["place", "sum", "mean"]
"""How pieces that lie upon each other make one tensor; place: none do."""


@dataclass(frozen=True)
class Assembly:
    """One of our tensors. What no piece covers is zero (padding of the vocabulary).

    plus: added to every element, in float32 (norms that are stored as their difference from 1).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    join: Join = "place"
    plus: float = 0.0


class ForeignTensors:
    """A TensorSource over assemblies, by our names. For one thread."""

    def __init__(self, assemblies: Mapping[str, Assembly]) -> None:
        """Raises CheckpointError where a tensor's storage does not hold it."""
        self._assemblies = dict(assemblies)
        for name, assembly in self._assemblies.items():
            for stored in {id(piece.stored): piece.stored for piece in assembly.pieces}.values():
                stored.file.check(stored.key, stored.record)
                if not stored.record.dtype.is_floating_point or stored.record.dtype.itemsize < 2:
                    raise CheckpointError(
                        f"{stored}: is of {stored.record.dtype}, and {name} must be of 16 bits or more"
                    )

    def names(self) -> Iterable[str]:
        """Every name."""
        return self._assemblies.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of our whole tensor, the vocabulary padded."""
        return self._assemblies[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of its values, as stored; float32 where they are computed from what is stored."""
        return self._assemblies[name].dtype

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A new tensor on the CPU: the box of `shape` that begins at `offset`.

        Raises CheckpointError where it holds NaN or infinity; ValueError beyond the tensor.
        """
        assembly = self._assemblies[name]
        if len(offset) != len(assembly.shape) or any(
            begin < 0 or n < 0 or begin + n > whole
            for begin, n, whole in zip(offset, shape, assembly.shape, strict=True)
        ):
            raise ValueError(f"{name}: no box of {list(shape)} at {list(offset)} in a tensor of {list(assembly.shape)}")
        wide = assembly.join != "place" or assembly.plus
        box = torch.zeros(tuple(shape), dtype=_wide(assembly.dtype) if wide else assembly.dtype)
        for piece in assembly.pieces:
            self._add(box, piece, offset, assembly)
        if assembly.plus:
            box += assembly.plus
        return box.to(assembly.dtype)

    def _add(self, box: Tensor, piece: Piece, offset: Sequence[int], assembly: Assembly) -> None:
        bounds = list(zip(piece.ours, piece.shape, offset, box.shape, strict=True))
        begin = [max(at, start) for at, _, start, _ in bounds]
        size = [min(at + n, start + m) - b for b, (at, n, start, m) in zip(begin, bounds, strict=True)]
        if any(n <= 0 for n in size):
            return
        found = piece.read([b - at for b, at in zip(begin, piece.ours, strict=True)], size)
        # isfinite would make copies of the box; smallest and largest say the same, NaN included
        if not all(extreme.isfinite() for extreme in found.aminmax()):
            raise CheckpointError(f"{piece.stored}: holds NaN or infinity: choose an earlier checkpoint")
        here = tuple(slice(b - start, b - start + n) for b, start, n in zip(begin, offset, size, strict=True))
        if assembly.join == "place":
            box[here] = found
        else:
            box[here] += found.to(box.dtype) / (len(assembly.pieces) if assembly.join == "mean" else 1)

    def whole(self, name: str) -> Tensor:
        """A new tensor on the CPU: all of it."""
        shape = self.shape(name)
        return self.read(name, (0,) * len(shape), shape)

    def all(self) -> dict[str, Tensor]:
        """Every tensor whole, in memory."""
        return {name: self.whole(name) for name in self.names()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def computed(pieces: Sequence[Piece], shape: Sequence[int], join: Join = "place", plus: float = 0.0) -> Assembly:
    """An assembly of its pieces' dtype; where values are computed, of float32 at least."""
    dtype = pieces[0].stored.record.dtype
    return Assembly(tuple(shape), _wide(dtype) if plus or join != "place" else dtype, tuple(pieces), join, plus)


def whole_piece(stored: StoredTensor) -> Piece:
    """All of a tensor as all of ours."""
    nowhere = (0,) * len(stored.shape)
    return Piece(stored, nowhere, nowhere, stored.shape)


def rows_of(parts: Sequence[StoredTensor], ours: int, theirs: int, count: int, step: int = 1) -> Iterator[Piece]:
    """`count` rows from our row `ours` on: every `step`-th of theirs from row `theirs` on, where theirs are the rows of
    all parts one after the other."""
    first = 0
    for part in parts:
        size, rest = part.shape[0], part.shape[1:]
        # the rows theirs, theirs + step, … that lie in this part
        begin = max(0, -(-(first - theirs) // step))
        end = min(count, -(-(first + size - theirs) // step))
        if begin < end:
            nowhere = (0,) * len(rest)
            at = theirs + begin * step - first
            yield Piece(part, (ours + begin, *nowhere), (at, *nowhere), (end - begin, *rest), step)
        first += size


def columns_of(parts: Sequence[StoredTensor]) -> Iterator[Piece]:
    """The parts side by side along the second dimension."""
    first = 0
    for part in parts:
        yield Piece(part, (0, first), (0, 0), part.shape)
        first += part.shape[1]


def check_sizes(stored: StoredTensor, wanted: Sequence[int], why: str) -> None:
    """Raises CheckpointError that names file, key and both shapes."""
    if tuple(stored.shape) != tuple(wanted):
        raise CheckpointError(f"{stored}: is {list(stored.shape)}, and {why} say {list(wanted)}")
