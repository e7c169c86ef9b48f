"""A tiny real run for tests of export, evaluation and report: corpora, tokenizer, indexed files, a checkpoint."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.manager import CheckpointManager, CheckpointRef, open_checkpoint
from megatron.checkpoint.tensor_shards import whole_shards
from megatron.config.load import config_from_tables, config_to_toml
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import RunConfig
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.planner.resolve import resolve_run
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer
from megatron.tokenizers.train import train_sentencepiece

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
NEOX: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "gated_mlp": False,
    "norm": "layernorm",
    "attention_bias": True,
    "mlp_bias": True,
    "parallel_block": True,
    "partial_rotary_factor": 0.5,
}


def library_code(files: int = 40) -> list[str]:
    """Source files of the running interpreter's standard library, the first ones by name."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths[:files]]


def library_prose(code: list[str]) -> list[str]:
    """Docstrings of these files: English about programs."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for text in code for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    return [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 500]


def make_corpora(folder: Path, tokenizer: Tokenizer, files: int = 40) -> dict[str, Path]:
    """Indexed files `code` and `text` in `folder`."""
    code = library_code(files)
    prefixes = {}
    for name, texts in (("code", code), ("text", library_prose(code))):
        prefixes[name] = folder / name
        with IndexedDatasetWriter(prefixes[name], np.uint16) as writer:
            for text in texts:
                writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
    return prefixes


def make_tokenizer(folder: Path, vocab_size: int = 600) -> Path:
    """A small SentencePiece BPE model, trained on the standard library."""
    path = folder / "tokenizer.model"
    train_sentencepiece(iter(library_code(20)), path, vocab_size)
    return path


def make_config(folder: Path, tokenizer: str, model: dict[str, Any]) -> RunConfig:
    """Two training stages over code and text, a third of the documents held out."""
    return config_from_tables(
        {
            "run": {"name": "tiny", "output": str(folder / "run"), "seed": 7},
            "tokenizer": {"path": tokenizer},
            "model": {"seq_length": 160, **model},
            "sources": {
                "code": {"group": "code", "data": [str(folder / "code")]},
                "text": {"group": "text", "data": [str(folder / "text")]},
            },
            "train": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
            "validation": {"fraction": "0.33"},
            "stages": [
                {"name": "balanced", "steps": 6, "mixture": {"code": "0.5", "text": "0.5"}, "lr": {"peak": 0.001}},
                {"name": "text", "steps": 4, "mixture": {"code": "0.1", "text": "0.9"}},
            ],
        }
    )


def make_weights(shape: ModelShape, seed: int = 3) -> dict[str, torch.Tensor]:
    """Initial weights with noise on norms and biases, so that a forgotten or swapped one shows."""
    model = Decoder(shape)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.dim() == 1 else 0.05))
            assert name in model.state_dict()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def make_checkpoint(folder: Path, model: dict[str, Any] | None = None, tokenizer: str | None = None) -> CheckpointRef:
    """The whole thing: a run folder `folder/run` with one checkpoint after 8 steps. `tokenizer`: default trained."""
    path = tokenizer or str(make_tokenizer(folder))
    opened = load_tokenizer(path)
    make_corpora(folder, opened)
    config = make_config(folder, path, model or LLAMA)
    shape = resolve_model(config.model, opened.vocab_size)
    stream = resolve_run(config).stream()
    for _ in range(8):
        stream.next_batch()
    state = {
        "format": 1,
        "step": 8,
        "consumed_samples": 32,
        "consumed_tokens": 32 * 160,
        "data": json.loads(json.dumps(stream.ledger.to_json())),
        "model": shape.to_json(),
        "tokenizer": {"files": [f"tokenizer/{file.name}" for file in opened.files()]},
    }
    extra: dict[str, bytes | Path] = {"config.toml": config_to_toml(config).encode()}
    extra |= {f"tokenizer/{file.name}": file for file in opened.files()}
    manager = CheckpointManager(Path(config.run.output) / "checkpoints")
    optimizer = whole_shards({"x": torch.zeros(1)})
    return open_checkpoint(
        manager.save(8, whole_shards(make_weights(shape)), optimizer, {"cpu": torch.zeros(1)}, state, extra)
    )
