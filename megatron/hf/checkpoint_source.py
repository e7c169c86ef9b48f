"""What an export needs of a checkpoint, opened and checked: weights, shape, tokenizer, config and state."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.imported import ORIGIN
from megatron.checkpoint.manager import CheckpointManager, CheckpointRef
from megatron.checkpoint.manifest import NAME as MANIFEST
from megatron.checkpoint.manifest import check_bytes, read_manifest, verify
from megatron.checkpoint.stored_tensors import StoredTensors
from megatron.config.errors import CheckpointError, DataError
from megatron.config.load import load_config
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import RunConfig
from megatron.models.decoder import Decoder
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by our names, each read when it is asked for, and not kept."""

    def __init__(self, source: StoredTensors) -> None:
        self.source = source
        self._names = tuple(source.names())

    def __getitem__(self, name: str) -> Tensor:
        return self.source.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class CheckpointSource:
    """An opened checkpoint.

    tokenizer: None for an imported model that has none. identity: the SHA-256 of its manifest, and so of all of it.
    unread: files whose bytes are not yet verified; whoever reads weights calls `verify_bytes` before trusting them.
    """

    ref: CheckpointRef
    config: RunConfig
    tokenizer: Tokenizer | None
    shape: ModelShape
    identity: str = ""
    unread: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """For people: the run's name and the step."""
        return f"{self.config.run.name}, step {self.ref.step}"

    @property
    def weights(self) -> LazyTensors:
        """By our names, in the dtype that is stored: fp32 masters of a run, whatever was imported else."""
        return LazyTensors(self.ref.model())

    def verify_bytes(self) -> None:
        """Reads what was left unread of the model's files. Raises CheckpointError where it is not what was saved."""
        if self.unread:
            check_bytes(self.ref.path, self.unread, sorted(self.unread))

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


def open_source(path: Path, tokenizer: str | None = None, *, later: bool = False) -> CheckpointSource:
    """The checkpoint at `path`, or the newest whole one of a run folder.

    tokenizer: a path, instead of the checkpoint's own. later: the weights of a checkpoint that is named itself are left
    for `verify_bytes`, its optimizer state is not read. Raises CheckpointError, ConfigError, DataError.
    """
    ref, unread = _find(Path(path), later)
    config_file = ref.path / "config.toml"
    if not config_file.is_file():
        raise CheckpointError(f"{config_file}: missing, so the model's shape is not known")
    config = load_config(config_file)
    opened = load_tokenizer(tokenizer) if tokenizer else _tokenizer(ref, config)
    shape = _shape(ref, config, opened)
    if opened is not None and opened.vocab_size > shape.vocab_size:
        raise DataError(
            f"{path}: the tokenizer {opened.name} gives ids up to {opened.vocab_size - 1}, and the embedding has "
            f"{shape.vocab_size} rows: it is not this model's tokenizer: name the right one with --tokenizer"
        )
    identity = str(read_manifest(ref.path)["manifest_sha256"])
    return CheckpointSource(ref, config, opened, shape, identity, unread)


def _find(path: Path, later: bool) -> tuple[CheckpointRef, dict[str, Any] | None]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        return _open(path, later)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = CheckpointManager(folder).newest_whole(lambda message: print(message, file=sys.stderr))
    if found is None:
        raise CheckpointError(f"{path}: neither a checkpoint (no {MANIFEST}) nor a run folder with checkpoints in it")
    return found, None


def _open(path: Path, later: bool) -> tuple[CheckpointRef, dict[str, Any] | None]:
    if not later:
        return CheckpointManager(path.parent).open(path), None
    manifest = verify(path, unread=("model", "optimizer"))
    files = manifest["files"]
    if "state.json" not in files:
        raise CheckpointError(f"{path / 'state.json'}: expected in {MANIFEST}, found no entry")
    state = json.loads((path / "state.json").read_bytes())
    unread = {name: seal for name, seal in files.items() if name.startswith("model/")}
    return CheckpointRef(path, manifest["step"], state, manifest["tensors"]), unread


def _tokenizer(ref: CheckpointRef, config: RunConfig) -> Tokenizer | None:
    """The checkpoint's own copy of the tokenizer; the built-in one has no file, so its config names it."""
    said = ref.state.get("tokenizer", {})
    if files := said.get("files", []):
        return load_tokenizer(ref.path / files[0])
    if ORIGIN in ref.state and not said.get("name"):
        return None
    return load_tokenizer(config.tokenizer.path)


def _shape(ref: CheckpointRef, config: RunConfig, tokenizer: Tokenizer | None) -> ModelShape:
    if isinstance(saved := ref.state.get("model"), dict):
        return ModelShape.from_json(saved)
    if tokenizer is None:
        raise CheckpointError(f"{ref.path / 'state.json'}: says nothing of the model, so its shape is not known")
    longest = max([config.model.seq_length, *(stage.seq_length or 0 for stage in config.stages)])
    return resolve_model(config.model, tokenizer.vocab_size, longest)
