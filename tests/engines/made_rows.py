"""Small batches for engines, and engines on real ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.layout import resolve_layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine
from megatron.engines.build import build_engine
from megatron.kernels.cross_entropy import IGNORED
from megatron.parallel.mesh import Mesh, launched, one_process_mesh, open_mesh

TRAIN = TrainSection(global_batch_size=8, micro_batch_size=2)
WORDS = 100
BATCH = 8


def tiny_shape(**fields: Any) -> ModelShape:
    """Eight layers of width 32, grouped queries, a tied head."""
    given = {
        "seq_length": 16,
        "hidden_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "tie_word_embeddings": True,
    }
    return resolve_model(ModelSection(**(given | fields)), WORDS)  # type: ignore[arg-type]


@dataclass
class Micro:
    """A microbatch."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    source_ids: Tensor
    sample_numbers: Tensor


def two_rows(seed: int, words: int, length: int, cuts: float) -> Micro:
    """Two rows of several documents, a source each; cuts: the share of positions at which a document begins."""
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, words, (2, length + 1), generator=drawn)
    ids = (torch.rand(2, length, generator=drawn) < cuts).cumsum(1).int()
    numbers = torch.arange(2) + 2 * seed
    return Micro(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ids, torch.tensor([0, 1]), numbers)


def microbatches(
    step: int, rank: int = 0, size: int = 1, length: int = 16, rows: int = BATCH, each: int = 2
) -> list[Micro]:
    """Data rank `rank` of `size`'s part of a step's global batch: documents, targets that do not count, sources."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, WORDS, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    ids = (torch.rand(rows, length, generator=generator) < 0.1).cumsum(1).int()
    sources = torch.randint(0, 3, (rows,), generator=generator)
    numbers = torch.arange(rows) + step * rows
    whole = (tokens[:, :-1].contiguous(), targets, ids, sources, numbers)
    first, last = rank * rows // size, (rank + 1) * rows // size
    return [Micro(*(part[start : start + each] for part in whole)) for start in range(first, last, each)]


def engine_here(
    world_size: int,
    parallel: dict[str, Any],
    optimizer: dict[str, Any],
    precision: str = "fp64",
    shape: ModelShape | None = None,
    seed: int = 5,
) -> tuple[Engine, Mesh]:
    """An engine on this rank of a new process group, or on this process alone."""
    section = ParallelSection(**parallel)
    layout = resolve_layout(section, world_size)
    mesh = open_mesh(layout, launched(), 60) if world_size > 1 else one_process_mesh()
    engine = build_engine(shape or tiny_shape(), OptimizerSection(**optimizer), section, TRAIN, seed, precision, mesh)
    return engine, mesh
