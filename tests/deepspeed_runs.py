"""Runs of engines inside one rank, for the tests of the deepspeed engine: batches, curves, states taken out and in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from engines.made_rows import Micro
from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorShards
from megatron.config.layout import resolve_layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.base import Engine, StepResult
from megatron.engines.build import build_engine
from megatron.kernels.cross_entropy import IGNORED
from megatron.parallel.mesh import Mesh

LENGTH = 16
SHAPE: ModelShape = resolve_model(
    ModelSection(
        preset="llama-tiny",
        seq_length=LENGTH,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    61,
)
ROWS, MICRO = 8, 2
TRAIN = TrainSection(global_batch_size=ROWS, micro_batch_size=MICRO)

SGD = OptimizerSection(name="sgd", momentum=0.9, clip_grad_norm=0.0)
BITING = OptimizerSection(name="sgd", momentum=0.0, clip_grad_norm=0.97)
ADAMW = OptimizerSection(clip_grad_norm=1.0)


def microbatches(step: int, data_rank: int = 0, data_size: int = 1) -> list[Micro]:
    """A data rank's part of the global batch of a step, in microbatches. Rows differ in how many targets count."""
    made = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 61, (ROWS, LENGTH + 1), generator=made)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=made) < torch.linspace(0, 0.8, ROWS)[:, None]] = IGNORED
    documents = (torch.rand(ROWS, LENGTH, generator=made) < 0.1).cumsum(1).int()
    sources = torch.randint(0, 3, (ROWS,), generator=made)
    whole = Micro(tokens[:, :-1].contiguous(), targets, documents, sources, torch.arange(ROWS) + step * ROWS)
    share = ROWS // data_size
    starts = range(data_rank * share, (data_rank + 1) * share, MICRO)
    return [Micro(*(value[start : start + MICRO] for value in vars(whole).values())) for start in starts]


def engine_on(
    mesh: Mesh,
    parallel: ParallelSection,
    optimizer: OptimizerSection,
    precision: str = "fp32",
    shape: ModelShape = SHAPE,
) -> Engine:
    """An engine with the weights that every test begins with. One group of ranks serves ZeRO at every stage, which
    differ only in what of the data axis is called a replica."""
    fitting = replace(mesh, layout=resolve_layout(parallel, mesh.world_size))
    assert fitting.layout.data == mesh.layout.data and fitting.layout.tensor == mesh.layout.tensor
    return build_engine(shape, optimizer, parallel, TRAIN, 5, precision, fitting)


def rate(step: int) -> float:
    """A learning rate that changes at every step."""
    return 0.02 * (1 + step % 5)


def steps_of(engine: Engine, mesh: Mesh, optimizer: OptimizerSection, numbers: Iterable[int]) -> list[StepResult]:
    """Trains on the batches of these numbers."""
    factor = 0.05 if optimizer.name == "adamw" else 1.0
    results = []
    for number in numbers:
        batch = microbatches(number, mesh.data.rank, mesh.data.size)
        results.append(engine.train_step(batch, factor * rate(number)))
    return results


def boxes(state: TensorShards) -> list[tuple[str, Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Shards as copies that can leave the process."""
    return [
        (name, shard.tensor.detach().clone(), shard.shape, shard.offset)
        for name, shards in state.items()
        for shard in shards
    ]


def joined(ranks: Iterable[Any]) -> dict[str, Tensor]:
    """Whole tensors from every rank's boxes; each element must be there exactly once."""
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for rank in ranks:
        for name, tensor, shape, offset in rank:
            whole.setdefault(name, torch.zeros(shape))
            times.setdefault(name, torch.zeros(shape, dtype=torch.int64))
            box = tuple(slice(start, start + size) for start, size in zip(offset, tensor.shape, strict=True))
            whole[name][box] = tensor
            times[name][box] += 1
    assert all(bool((count == 1).all()) for count in times.values()), "an element is missing or there twice"
    return whole


def gathered(state: TensorShards, mesh: Mesh) -> dict[str, Tensor]:
    """Whole tensors on every rank."""
    if mesh.world_size == 1:
        return joined([boxes(state)])
    everyone: list[Any] = [None] * mesh.world_size
    torch.distributed.all_gather_object(everyone, boxes(state), group=mesh.host)
    return joined(everyone)


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
