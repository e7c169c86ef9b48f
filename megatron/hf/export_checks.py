"""What is looked at before an export writes its first byte: the place, the tensors' names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from megatron.checkpoint.aside import would_replace
from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import architecture_for
from megatron.hf.name_table import entries, our_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEEP = "keep"
"""As --dtype: what is stored."""
_OURS = re.compile(
    r"config\.json|generation_config\.json|model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"
    r"|README\.md|training_ledger\.json|origin\.json|proof\.json|proof\.md"
)
"""Files that an export writes."""
_MARKS = {
    "proof.json": ("format", "passed", "comparisons"),
    "training_ledger.json": ("run", "step"),
    "origin.json": ("kind",),
}
"""Files that only an export of ours has, and keys that are in them."""


def check_free(output: Path, overwrite: bool) -> None:
    """Raises ConfigError where `output` holds something that must not be replaced."""
    if not would_replace(output, overwrite):
        return
    if not output.is_dir() or not (output / "config.json").is_file() or not _is_export(output):
        raise ConfigError(
            f"{output}: is not a folder that export_hf made (config.json and one of {', '.join(_MARKS)}), so it is not "
            "overwritten: choose another --output, or remove it yourself"
        )
    foreign = sorted(path.name for path in output.iterdir() if not _OURS.fullmatch(path.name) or not path.is_file())
    if foreign:
        more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
        raise ConfigError(
            f"{output}: holds what no export writes, and --overwrite would remove it: {', '.join(foreign[:8])}{more}: "
            "move it elsewhere, or choose another --output"
        )


def _is_export(folder: Path) -> bool:
    for name, keys in _MARKS.items():
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.keys() >= set(keys):
            return True
    return False


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
