"""Every layout that `[parallel]` can say over a few processes, by plain products of values: the search's oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape, refusals
from megatron.config.model_shape import resolve_model
from megatron.config.schema import KernelsSection, ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.planner.hardware import HARDWARE
from megatron.planner.layout_fit import Place
from megatron.planner.rank_memory import RankMemory, communicating_groups, rank_memory
from megatron.planner.search_space import Choice, Workload
from megatron.planner.step_time import StepTime, step_time

NODE = 4


def workload(batch: int = 16, length: int = 4096, layers: int = 4, **parallel: Any) -> Workload:
    """A decoder of 0.4B parameters whose activations weigh as much as its state."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 8192}
    section = ModelSection(seq_length=length, vocab_size=32000, tie_word_embeddings=False, **sizes)
    rows = int(parallel.pop("rows", 1))
    train = TrainSection(global_batch_size=batch, micro_batch_size=rows, precision="bf16")
    batches = (BatchShape(length, batch),)
    shape = resolve_model(section, 32000)
    return Workload(shape, ParallelSection(**parallel), train, OptimizerSection(), batches, batches)


def place(gigabytes: float, margin: float = 0.0) -> Place:
    """An H100 with so much memory, four to a node."""
    device = replace(HARDWARE["h100"], memory_bytes=int(gigabytes * 1e9), processes_per_node=NODE)
    return Place(device, margin=margin)


@dataclass(frozen=True)
class Forced:
    """A layout that train accepts, what its fullest rank needs, and its step."""

    choice: Choice
    needed: int
    step: StepTime


def every(work: Workload, processes: int, where: Place) -> list[Forced]:
    """All that train accepts, whether it fits or not; every number of recomputed layers."""
    return [
        Forced(Choice(section, layout, rows), *_figures(work, section, layout, rows, where))
        for section, layout, rows in _accepted(work, processes)
    ]


def _accepted(work: Workload, processes: int) -> Iterator[tuple[ParallelSection, Layout, int]]:
    sizes = [1, 2, 4, 8]
    several = [rows for rows in (1, 2, 4, 8, 16, 32, 64) if rows <= work.train.global_batch_size]
    layers = work.shape.num_hidden_layers
    again: list[tuple[str, str, int | None]] = [("none", "attention", None)]
    for kind in (("selective", "attention"), ("selective", "operations"), ("full", "attention")):
        again += [(*kind, number) for number in (None, *range(1, layers))]
    for tensor, context, pipeline in product(sizes, sizes, sizes):
        data, rest = divmod(processes, tensor * context * pipeline)
        if rest or data == 0 or tensor > NODE:
            continue
        orders = [("1f1b", 2), *(("interleaved", v) for v in (2, 4)), ("zero-bubble", 2), ("zbv", 2)]
        for (schedule, virtual), shard, replicate in product(
            orders if pipeline > 1 else orders[:1], ("none", "optimizer", "gradients", "full"), sizes
        ):
            if shard != work.section.data_shard and _left_out(shard, replicate, data, tensor * context, pipeline):
                continue
            for rows, (kind, policy, number) in product(several, again):
                section = ParallelSection(
                    tensor=tensor,
                    sequence=tensor > 1,
                    context=context,
                    pipeline=pipeline,
                    schedule=schedule,
                    virtual=virtual,
                    data_shard=shard,
                    data_replicate=replicate,
                    recompute=kind,
                    recompute_policy=policy,
                    recompute_layers=number,
                )
                try:
                    layout = resolve_layout(section, processes)
                except ConfigError:
                    continue
                train = work.train.model_copy(update={"micro_batch_size": rows})
                if not refusals(section, layout, work.shape, train, work.optimizer, work.checked, "bf16"):
                    yield section, layout, rows


def _left_out(shard: str, replicate: int, data: int, inner: int, pipeline: int) -> bool:
    """What the space leaves out by its own words: shards of nothing, gradients under a pipeline, and replicas whose
    groups are neither a node nor 2, 4, 8 of them."""
    if shard != "none" and data == 1 or shard == "gradients" and pipeline > 1:
        return True
    group = data // replicate * inner
    return replicate > 1 and (group % NODE > 0 or group == 0 or (group // NODE).bit_count() != 1 or data == replicate)


def _figures(work: Workload, section: ParallelSection, layout: Layout, rows: int, where: Place) -> tuple[int, StepTime]:
    train = work.train.model_copy(update={"micro_batch_size": rows})
    batch, optimizer = work.batches[0], work.optimizer
    framework = RankMemory(*[0] * 9).device_bytes(communicating_groups(layout), 0.0)
    most = max(
        rank_memory(work.shape, section, layout, train, optimizer, batch, rank, KernelsSection()).total
        for rank in range(layout.pipeline)
    )
    return most + framework, step_time(work.shape, section, layout, train, optimizer, batch, where.accelerator)
