"""Every tensor of an exported folder read back, bit for bit, a box of rows at a time."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import CheckpointError, ProofError
from megatron.config.model_shape import ModelShape
from megatron.hf.import_weights import HuggingFaceTensors

_BOX = 2**24
"""Elements that are compared at once."""
_VOCABULARY = ("embedding.weight", "head.weight")


def compare_tensors(folder: Path, source: TensorSource, dtype: torch.dtype, shape: ModelShape) -> int:
    """How many tensors were compared with the source's, rounded to `dtype`; padding of the vocabulary may be anything.

    Raises ProofError for the first that differs, and where the folder cannot be read.
    """
    try:
        read = HuggingFaceTensors(folder, shape)
        names = list(source.names())
        for name in names:
            _compare(read, source, name, dtype, shape, folder)
    except CheckpointError as error:
        raise ProofError(f"parity proof failed: {error}") from None
    return len(names)


def _compare(
    read: HuggingFaceTensors, source: TensorSource, name: str, dtype: torch.dtype, shape: ModelShape, folder: Path
) -> None:
    whole = source.shape(name)
    rows = shape.vocab_size if name in _VOCABULARY else whole[0]
    step = max(1, _BOX // max(1, prod(whole[1:])))
    for begin in range(0, rows, step):
        offset, box = (begin, *(0 for _ in whole[1:])), (min(step, rows - begin), *whole[1:])
        wanted, found = source.read(name, offset, box).to(dtype), read.read(name, offset, box)
        if found.dtype != dtype:
            how = f" (it is {found.dtype}, not {dtype})"
        elif not torch.equal(_bits(wanted), _bits(found)):
            how = _where(wanted, found, begin)
        else:
            continue
        raise ProofError(
            f"{folder}: parity proof failed: tensor {name} read back differs from the checkpoint's{how}, in "
            f"{read.stored_at(name)}"
        )


def _bits(values: Tensor) -> Tensor:
    """As integers: so that -0.0 is not 0.0."""
    return values.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def _where(wanted: Tensor, found: Tensor, begin: int) -> str:
    """How many values differ in this box of rows from `begin` on, and the first of them."""
    places = (_bits(wanted) != _bits(found)).nonzero()
    first = tuple(places[0].tolist())
    place = [first[0] + begin, *first[1:]]
    return f" at {place} ({len(places)} there: {found[first].item():.9g} instead of {wanted[first].item():.9g})"
