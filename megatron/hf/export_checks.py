"""What is looked at before an export writes its first byte: the place, the room on the disk, the tensors' names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megatron.checkpoint.storage import io_errors
from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import CheckpointError, ConfigError, StorageError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import architecture_for
from megatron.hf.name_table import entries, our_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEEP = "keep"
"""As --dtype: what is stored."""
_SMALL_FILES = 32 * 10**6


def check_free(output: Path, overwrite: bool) -> None:
    """Raises ConfigError where `output` holds something that must not be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output}: exists already: choose another --output, or say --overwrite")
    if not (output / "config.json").is_file():
        raise ConfigError(f"{output}: is not a Hugging Face model folder (no config.json), so it is not overwritten")


def check_room(aside: Path, needed: int) -> None:
    """Raises StorageError where the disk has no room for so many bytes, less what lies in `aside` already."""
    with io_errors(aside, "look at the disk of"):
        there = sum(path.stat().st_blocks * 512 for path in aside.rglob("*")) if aside.exists() else 0
        free = shutil.disk_usage(aside.parent).free
    missing = needed + _SMALL_FILES - there - free
    if missing > 0:
        raise StorageError(
            f"{aside.parent}: the export needs {(needed - there) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: free "
            f"{missing / 1e9:.2f} GB, or choose an --output on another disk; nothing was written"
        )


def check_names(weights: TensorSource, shape: ModelShape) -> None:
    """Raises CheckpointError unless every tensor that the shape needs is there, of its size, and no other."""
    left = set(weights.names())
    for entry in entries(architecture_for(shape).table, shape):
        for name, size in zip(entry.ours, entry.size, strict=True):
            if name not in left:
                raise CheckpointError(f"the checkpoint lacks tensor {name}, which its model shape needs")
            left.discard(name)
            if (found := tuple(weights.shape(name))) != (wanted := our_size(size, shape)):
                raise CheckpointError(
                    f"tensor {name} is {list(found)} in the checkpoint, its config says {list(wanted)}"
                )
    if left:
        raise CheckpointError(f"the checkpoint holds tensors that its model shape does not know: {sorted(left)[:8]}")


def dtype_named(words: str, weights: TensorSource) -> str:
    """A key of DTYPES: the one that is asked for, or for "keep" the one that all tensors have. Raises ConfigError."""
    if words != KEEP:
        if words not in DTYPES:
            raise ConfigError(f"--dtype {words!r}: choose {KEEP}, {', '.join(DTYPES)}")
        return words
    found = sorted({str(weights.dtype(name)).removeprefix("torch.") for name in weights.names()})
    if len(found) != 1 or found[0] not in DTYPES:
        raise ConfigError(f"--dtype keep: the checkpoint holds {', '.join(found)}: choose {', '.join(DTYPES)}")
    return found[0]


def folder_dtype(folder: Path) -> str:
    """The dtype that an exported folder's config.json names. Raises CheckpointError."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["torch_dtype"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not an exported folder: {error!r}") from None
    if name not in DTYPES:
        raise CheckpointError(f"{folder / 'config.json'}: torch_dtype {name!r} is not one of {', '.join(DTYPES)}")
    return str(name)
