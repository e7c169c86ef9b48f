"""What an export needs of a checkpoint, opened and checked: weights, shape, tokenizer, config and state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.manager import CheckpointManager, CheckpointRef, open_checkpoint
from megatron.checkpoint.manifest import NAME as MANIFEST
from megatron.config.errors import CheckpointError
from megatron.config.load import load_config
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import RunConfig
from megatron.models.decoder import Decoder
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer


@dataclass(frozen=True)
class CheckpointSource:
    """An opened checkpoint. `weights` are fp32 masters by our names."""

    ref: CheckpointRef
    config: RunConfig
    tokenizer: Tokenizer
    shape: ModelShape
    weights: dict[str, Tensor]

    @property
    def name(self) -> str:
        """For people: the run's name and the step."""
        return f"{self.config.run.name}, step {self.ref.step}"

    def logits(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Our own model, computing in fp32 with weights rounded to `dtype`: token ids [1, T] to logits."""
        model = Decoder(self.shape)
        model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in self.weights.items()})
        model.float().eval()

        def run(tokens: Tensor) -> Tensor:
            with torch.no_grad():
                return model.logits(tokens, torch.zeros_like(tokens, dtype=torch.int32))

        return run


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint, or a run folder with checkpoints, rather than an exported folder."""
    return (path / MANIFEST).is_file() or (path / "checkpoints").is_dir()


def open_source(path: Path) -> CheckpointSource:
    """The checkpoint at `path`, or the newest whole one of a run folder. Raises CheckpointError, ConfigError."""
    ref = _find(Path(path))
    config_file = ref.path / "config.toml"
    if not config_file.is_file():
        raise CheckpointError(f"{config_file}: missing, so the model's shape is not known")
    config = load_config(config_file)
    tokenizer = _tokenizer(ref, config)
    shape = _shape(ref, config, tokenizer)
    return CheckpointSource(ref, config, tokenizer, shape, ref.model().all())


def _find(path: Path) -> CheckpointRef:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        return open_checkpoint(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = CheckpointManager(folder).newest_whole(lambda message: print(message, file=sys.stderr))
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint (no {MANIFEST}) nor a run folder with checkpoints in it")
    return found


def _tokenizer(ref: CheckpointRef, config: RunConfig) -> Tokenizer:
    """The checkpoint's own copy of the tokenizer; the built-in one has no file, so its config names it."""
    files = ref.state.get("tokenizer", {}).get("files", [])
    return load_tokenizer(ref.path / files[0] if files else config.tokenizer.path)


def _shape(ref: CheckpointRef, config: RunConfig, tokenizer: Tokenizer) -> ModelShape:
    if isinstance(saved := ref.state.get("model"), dict):
        return ModelShape.from_json(saved)
    longest = max([config.model.seq_length, *(stage.seq_length or 0 for stage in config.stages)])
    return resolve_model(config.model, tokenizer.vocab_size, longest)
