"""Hugging Face folders that transformers made, by the shape that they are to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.hf.architecture import config_json

WORDS = 100


def shape_of(fields: dict[str, Any]) -> ModelShape:
    """A model of WORDS words, which are padded to more."""
    return resolve_model(ModelSection(seq_length=32, **fields), WORDS)


def made_by_transformers(shape: ModelShape, folder: Path, shard_size: str = "5GB") -> Path:
    """A random model that transformers made and saved, norms and biases random too."""
    description = config_json(shape, bos_token_id=1, eos_token_id=1, dtype="float32")
    config = transformers.AutoConfig.for_model(**description)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder
