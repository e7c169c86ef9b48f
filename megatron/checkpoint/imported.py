"""A model of other makers as a checkpoint of step 0: weights alone, written tensor by tensor.

What it lacks of a run's checkpoint (optimizer, random states, data position) begins with the training stage that takes
the weights over: `take = { weights = "CHECKPOINT" }`. Its state.json has "imported" in their place: where the weights
come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.tensor_shards import TensorSource
from megatron.checkpoint.weights_alone import write_weights_alone
from megatron.config.version import VERSION

FORMAT = 1
ORIGIN = "imported"
"""The key of state.json that says where the weights come from; no checkpoint of a run has it."""


def write_imported(
    output: Path,
    source: TensorSource,
    model: Mapping[str, Any],
    tokenizer_files: Sequence[Path],
    config_toml: str,
    origin: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    *,
    tokenizer: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the checkpoint `output` of step 0, whole or not at all, as `write_weights_alone` does.

    source: weights by our names, whole tensors in any number of boxes; read once, a few MB at a time.
    model: ModelShape as JSON. config_toml: becomes config.toml.
    tokenizer_files: copied into tokenizer/. tokenizer: what state.json says of it, where there is one: name,
    fingerprint, vocab_size, eod_id.
    origin: JSON values for state.json, or a function that is asked for them when the weights are written.
    dtype: of the weights in the checkpoint; None: each tensor's own. progress: told bytes written, and of how many.
    Returns `output`. Raises ConfigError where `output` is in use or exists (an older checkpoint is replaced with
    `overwrite`), CheckpointError for values that are not finite, or not in `dtype`, StorageError.
    """

    def state() -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": 0,
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "model": dict(model),
            "tokenizer": {**(tokenizer or {}), "files": [f"tokenizer/{path.name}" for path in tokenizer_files]},
            ORIGIN: dict(origin() if callable(origin) else origin),
        }

    files: dict[str, bytes | Path] = {
        "config.toml": config_toml.encode(),
        **{f"tokenizer/{path.name}": path for path in tokenizer_files},
    }
    return write_weights_alone(output, source, 0, state, files, dtype=dtype, overwrite=overwrite, progress=progress)
