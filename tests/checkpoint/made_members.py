"""Checkpoints of small made tensors, to be averaged: saved as a run saves, with a state that says what it must."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.checkpoint.imported import write_imported
from megatron.checkpoint.manager import CheckpointManager
from megatron.checkpoint.manifest import NAME, build_manifest, manifest_bytes
from megatron.checkpoint.tensor_format import cut_metadata
from megatron.checkpoint.tensor_shards import TensorShard, WholeTensors, whole_shards
from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection
from megatron.data.ledger import Ledger

SHAPES = {"embedding.weight": (12, 6), "layers.0.norm": (6,), "layers.0.weight": (6, 14), "scale": (), "none": (0, 6)}


def shape_json(**over: Any) -> dict[str, Any]:
    """A ModelShape, as JSON values."""
    section = ModelSection(
        seq_length=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return resolve_model(section, 257, 16).to_json() | over


def tensors_of(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Values over several orders of magnitude, so that sums round."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=draw) * 10 ** (4 * torch.rand(shape, generator=draw) - 3)).to(dtype)
        for name, shape in SHAPES.items()
    }


def member(folder: Path, tensors: Mapping[str, Tensor], step: int = 10, seed: int = 1, **over: Any) -> Path:
    """A run's checkpoint. over: other values in state.json; "validation" and "algorithm" are the ledger's."""
    ledger = Ledger(seed, "fingerprint", over.pop("validation", "fraction 0.1"), over.pop("algorithm", 1))
    state = {
        "format": 1,
        "run_id": f"run-{seed}",
        "step": step,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "training_stage": "init",
        "model": shape_json(),
        "precision": {"name": "fp32"},
        "tokenizer": {"name": "bytes", "fingerprint": "fingerprint", "files": []},
        "data": ledger.to_json(),
        "skipped_in_row": 1,
    } | over
    optimizer = {f"{name}/exp_avg": torch.ones_like(tensor) for name, tensor in tensors.items()}
    rng = {"cpu": torch.tensor([seed, step], dtype=torch.uint8)}
    files = {"config.toml": f"# of {seed}\n".encode()}
    manager = CheckpointManager(folder, keep=99)
    return manager.save(step, whole_shards(tensors), whole_shards(optimizer), rng, state, files)


def cut_member(path: Path, parts: int) -> None:
    """Cuts the model's tensors of a checkpoint into files of their rows, as ranks write them, and seals it anew."""
    (file,) = (path / "model").iterdir()
    tensors = load_file(file)
    file.unlink()
    for number in range(parts):
        held = {}
        for name, tensor in tensors.items():
            if not tensor.ndim or not tensor.numel():
                if not number:
                    held[name] = TensorShard.whole(tensor)
                continue
            chunk = -(-tensor.shape[0] // parts)
            piece = tensor[number * chunk : (number + 1) * chunk].contiguous()
            if piece.numel():
                held[name] = TensorShard(piece, tuple(tensor.shape), (number * chunk, *(0,) * (tensor.ndim - 1)))
        if not held:
            continue
        name = f"model-{number:05d}-of-{parts:05d}-00000.safetensors"
        save_file({key: shard.tensor for key, shard in held.items()}, path / "model" / name, cut_metadata(held))
    (path / NAME).unlink()
    step = int(path.name.removeprefix("step-"))
    (path / NAME).write_bytes(manifest_bytes(build_manifest(path, step, False)))


def imported(output: Path, tensors: Mapping[str, Tensor], shape: Mapping[str, Any] | None = None) -> Path:
    """An imported model's checkpoint."""
    origin = {"kind": "hugging_face", "folder": output.name, "files": {"model.safetensors": "0"}}
    return write_imported(output, WholeTensors(tensors), shape or shape_json(), [], "# imported\n", origin)
