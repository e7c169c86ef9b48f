"""From a checkpoint to a Hugging Face folder: written aside, proven (law C3), then published by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.checkpoint.storage import io_errors
from megatron.config.durable_files import sync_path
from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import architecture_for, config_json
from megatron.hf.checkpoint_source import CheckpointSource
from megatron.hf.import_weights import INDEX, SINGLE
from megatron.hf.layout import pack
from megatron.hf.model_card import model_card
from megatron.hf.name_table import entries, our_size
from megatron.hf.parity import TOLERANCE, Proof, prompts_from, prove
from megatron.hf.tokenizer_files import check_equal, sample_texts, write_tokenizer
from megatron.hf.transformers_door import load_fast_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 5 * 10**9
PROOF = "proof.json"
TRAINING = "training_ledger.json"
SAMPLE = (
    "The committee met on a grey Tuesday, and nobody could say why the minutes had been kept in verse.\n\n"
    "def moving_average(values, width):\n    total = sum(values[:width])\n    yield total / width\n"
    "    for old, new in zip(values, values[width:]):\n        total += new - old\n        yield total / width\n"
)


@dataclass(frozen=True)
class Exported:
    """An export that was published. `proof` is None with --no-prove."""

    folder: Path
    architecture: str
    parameters: int
    proof: Proof | None
    tokenizer_bytes_compared: int


def export_checkpoint(
    source: CheckpointSource,
    output: Path,
    *,
    dtype: str = "float32",
    proven: bool = True,
    texts: Mapping[str, Sequence[int]] | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes, proves and publishes the folder `output`.

    texts: tokens to prove on, by where they come from; default a built-in passage.
    Raises ConfigError (the model cannot be expressed, output exists), CheckpointError (weights and shape disagree),
    ProofError (nothing is published then), StorageError.
    """
    output = Path(output)
    architecture = architecture_for(source.shape)
    check_free(output, overwrite)
    check_weights(source.weights, source.shape)
    aside = output.parent / f".{output.name}.tmp-{os.getpid()}"
    with io_errors(aside, "write"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        with io_errors(aside, "write"):
            _write_model(aside, source, DTYPES[dtype])
            write_tokenizer(aside, source.tokenizer, source.shape.max_position_embeddings)
        proof, compared = None, 0
        if proven:
            compared = check_equal(load_fast_tokenizer(aside), source.tokenizer, sample_texts())
            proof = prove_folder(aside, source, dtype=dtype, texts=texts, tolerance=tolerance)
            _write_json(aside / PROOF, proof.to_json() | {"tokenizer_bytes_compared": compared})
        _write_json(
            aside / TRAINING, {"run": source.config.run.name, "step": source.ref.step} | source.ref.state["data"]
        )
        (aside / "README.md").write_text(model_card(source, architecture.name, dtype, proof), encoding="utf-8")
        _publish(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(output, architecture.name, source.shape.parameter_count(), proof, compared)


def prove_folder(
    folder: Path,
    source: CheckpointSource,
    *,
    dtype: str | None = None,
    texts: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = TOLERANCE,
) -> Proof:
    """Law C3 for a folder on disk against the checkpoint it came from. Raises ProofError."""
    number = DTYPES[dtype or folder_dtype(folder)]
    weights = {name: tensor.to(number) for name, tensor in source.weights.items()}
    tokens = texts or {"built-in text": source.tokenizer.encode(SAMPLE)}
    return prove(folder, source.logits(number), weights, source.shape, prompts_from(tokens, source.shape), tolerance)


def folder_dtype(folder: Path) -> str:
    """The dtype that an exported folder's config.json names. Raises CheckpointError."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["torch_dtype"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not an exported folder: {error!r}") from None
    if name not in DTYPES:
        raise CheckpointError(f"{folder / 'config.json'}: torch_dtype {name!r} is not one of {', '.join(DTYPES)}")
    return str(name)


def check_free(output: Path, overwrite: bool) -> None:
    """Raises ConfigError where `output` holds something that must not be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output}: exists already: choose another --output, or say --overwrite")
    if not (output / "config.json").is_file():
        raise ConfigError(f"{output}: is not a Hugging Face model folder (no config.json), so it is not overwritten")


def check_weights(weights: Mapping[str, Tensor], shape: ModelShape) -> None:
    """Raises CheckpointError unless every tensor that the shape needs is there, finite, of its size, and no other."""
    left = dict(weights)
    for entry in entries(architecture_for(shape).table, shape):
        for name, size in zip(entry.ours, entry.size, strict=True):
            tensor = left.pop(name, None)
            if tensor is None:
                raise CheckpointError(f"the checkpoint lacks tensor {name}, which its model shape needs")
            if tuple(tensor.shape) != (wanted := our_size(size, shape)):
                raise CheckpointError(
                    f"tensor {name} is {list(tensor.shape)} in the checkpoint, its config says {list(wanted)}"
                )
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"tensor {name} holds NaN or infinity: choose an earlier checkpoint")
    if left:
        raise CheckpointError(f"the checkpoint holds tensors that its model shape does not know: {sorted(left)[:8]}")


def _write_model(folder: Path, source: CheckpointSource, dtype: torch.dtype) -> None:
    shape = source.shape
    end = source.tokenizer.eod_id
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config_json(shape, bos_token_id=end, eos_token_id=end, dtype=name))
    generation = {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    _write_json(folder / "generation_config.json", generation)
    shards = list(_shards(source, dtype))
    total = sum(tensor.numel() * tensor.element_size() for shard in shards for tensor in shard.values())
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    home: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(shard, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": home})


def _shards(source: CheckpointSource, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for entry in entries(architecture_for(source.shape).table, source.shape):
        tensor = pack(entry, [source.weights[name] for name in entry.ours], source.shape).to(dtype)
        bytes_here = tensor.numel() * tensor.element_size()
        if shard and size + bytes_here > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[entry.theirs] = tensor.clone()
        size += bytes_here
    yield shard


def _publish(aside: Path, output: Path) -> None:
    with io_errors(output, "publish"):
        for path in aside.rglob("*"):
            sync_path(path)
        sync_path(aside)
        old = output.parent / f".{output.name}.old-{os.getpid()}"
        if output.exists():
            os.rename(output, old)
        os.rename(aside, output)
        sync_path(output.parent)
        shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
