"""Hugging Face folders that transformers made, and what they say of our tensors by a plain computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.hf.architecture import architecture_for, config_json
from megatron.hf.name_table import entries

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


def ours_in(folder: Path, shape: ModelShape) -> dict[str, Tensor]:
    """Our tensors of a folder, whole."""
    theirs = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = {}
    for entry in entries(architecture_for(shape).table, shape):
        tensor = theirs.get(entry.theirs, theirs.get("lm_head.weight"))
        assert tensor is not None
        if len(entry.ours) == 3:
            heads = tensor.view(shape.num_attention_heads, 3, shape.head_dim, -1)
            parts = [heads[:, part].reshape(shape.hidden_size, *tensor.shape[1:]) for part in range(3)]
        else:
            rows = shape.padded_vocab_size if entry.layout == "vocabulary" else len(tensor)
            parts = [torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])]
        ours.update(zip(entry.ours, parts, strict=True))
    return ours
