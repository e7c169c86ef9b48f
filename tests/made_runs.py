"""Small real runs for tests: indexed files on disk, and configs over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.load import config_from_tables
from megatron.config.schema import RunConfig
from megatron.data.indexed_writer import IndexedDatasetWriter

VOCAB = 257


def write_corpus(prefix: Path, documents: int, seed: int, longest: int = 120) -> Path:
    """An indexed dataset of random documents that each end with token 256."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            ids = rng.integers(0, 256, rng.integers(1, longest)).tolist()
            writer.add_document([*ids, 256])
    return prefix


def run_tables(
    folder: Path, sources: dict[str, dict[str, Any]], stages: list[dict[str, Any]], **over: Any
) -> dict[str, Any]:
    """The tables of a run config with defaults that tests can do with; `over` replaces whole tables."""
    tables: dict[str, Any] = {
        "run": {"name": "test", "output": str(folder / "run"), "seed": 7},
        "tokenizer": {"path": "bytes"},
        "model": {
            "seq_length": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "sources": sources,
        "train": {"global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"},
        "validation": {"fraction": "0", "every": 1000},
        "stages": stages,
    }
    if stages and "lr" not in stages[0]:
        stages[0]["lr"] = {"peak": 0.001}
    return tables | over


def run_config(
    folder: Path, sources: dict[str, dict[str, Any]], stages: list[dict[str, Any]], **over: Any
) -> RunConfig:
    """`run_tables` as a RunConfig."""
    return config_from_tables(run_tables(folder, sources, stages, **over))
