"""The layout part of a plan: processes by axis, layers by stage, microbatches, bubble, bytes of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape, notes_of_layout, refusals
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_costs, stage_count, stage_numbers, stage_parameters
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.data.schedule import Schedule
from megatron.planner.bubble import bubble_fraction
from megatron.planner.layout_bytes import rank_bytes, receive_bytes, step_bytes


def default_processes(section: ParallelSection) -> int:
    """The fewest processes that `[parallel]` names: the product of its axes."""
    return prod((section.pipeline, section.data_replicate, section.context, section.tensor))


def batches_of(schedule: Schedule, held_out_length: int | None = None) -> list[BatchShape]:
    """Every batch that some training stage uses, once each; held-out rows, where there are any, are of a length of
    their own."""
    steps = [step for stage in schedule.stages for step in stage.shapes.steps]
    batches = [BatchShape(step.seq_length, step.global_batch_size) for step in steps]
    if held_out_length is not None:
        batches.append(BatchShape(held_out_length, batches[0].global_batch_size))
    return list(dict.fromkeys(batches))


def plan_layout(
    section: ParallelSection,
    shape: ModelShape,
    train: TrainSection,
    optimizer: OptimizerSection,
    batches: Sequence[BatchShape],
    processes: int | None = None,
    known_vocabulary: bool = True,
) -> dict[str, Any]:
    """The layout over so many processes (default: the fewest) as JSON values.

    Keys: "processes", "words", "axes"; "refusals": what train would say, each with "exit_code" and "text"; "notes"; and
    where nothing is refused "batches" (each with microbatches and bubble), "stages" (layers, parameters, share of the
    work) and "ranks" (by pipeline rank: its stages and bytes on the data rank that holds the most), the last two only
    where the vocabulary is known. Raises ConfigError where the number of processes is no multiple of the named axes.
    """
    layout = resolve_layout(section, processes or default_processes(section))
    known = processes is not None
    found = refusals(section, layout, shape, train, optimizer, batches, train.precision, known)
    plan: dict[str, Any] = {
        "processes": layout.world_size,
        "words": words_of(section, layout),
        "axes": {
            "pipeline": layout.pipeline,
            "replicate": layout.replicate,
            "shard": layout.shard,
            "context": layout.context,
            "tensor": layout.tensor,
        },
        "refusals": [{"exit_code": error.exit_code, "text": str(error)} for error in found],
        "notes": [],
    }
    if plan["refusals"]:
        return plan
    plan["notes"] = notes_of_layout(section, layout, shape)
    plan["batches"] = [_batch_row(section, layout, shape, train, batch) for batch in batches]
    if known_vocabulary:
        plan["stages"] = _stage_rows(section, shape)
        plan["ranks"] = [_rank_row(shape, section, layout, optimizer, train, rank) for rank in range(layout.pipeline)]
    return plan


def words_of(section: ParallelSection, layout: Layout) -> str:
    """Such as "pipeline 4 (interleaved, 2 stages a rank) x data 32 (full shard) x tensor 8 with sequence"."""
    each = stage_count(section) // section.pipeline
    schedule = section.schedule + (f", {each} stages a rank" if each > 1 else "")
    shard = {"none": "replicated", "optimizer": "optimizer sharded", "gradients": "gradients sharded"}
    how = shard.get(section.data_shard, "fully sharded")
    if layout.replicate > 1 and layout.shard > 1:
        how += f", {layout.replicate} replicas"
    parts = [f"pipeline {layout.pipeline} ({schedule})"] if layout.pipeline > 1 else []
    parts += [f"data {layout.data} ({how})"] if layout.data > 1 else []
    parts += [f"context {layout.context}"] if layout.context > 1 else []
    parts += [f"tensor {layout.tensor}{' with sequence' if section.sequence else ''}"] if layout.tensor > 1 else []
    return " x ".join(parts) or "one process"


def _stage_rows(section: ParallelSection, shape: ModelShape) -> list[dict[str, Any]]:
    partition = partition_layers(shape, stage_count(section), shape.max_position_embeddings)
    costs = stage_costs(shape, partition, shape.max_position_embeddings)
    owners = {n: rank for rank in range(section.pipeline) for n in stage_numbers(section, rank)}
    return [
        {
            "stage": number,
            "rank": owners[number],
            "layers": [layers.start, layers.stop],
            "parameters": parameters,
            "share_of_work": cost / sum(costs),
        }
        for number, (layers, parameters, cost) in enumerate(
            zip(partition, stage_parameters(shape, partition), costs, strict=True)
        )
    ]


def _rank_row(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    optimizer: OptimizerSection,
    train: TrainSection,
    rank: int,
) -> dict[str, Any]:
    row: dict[str, Any] = {"pipeline_rank": rank, "stages": list(stage_numbers(section, rank))}
    if section.engine == "torch":
        held = rank_bytes(shape, section, layout, optimizer, train.precision, rank)
        if train.gradients == "bf16":
            held = replace(held, gradients=held.gradients // 2)
        split = optimizer.master_weights == "split"
        besides = step_bytes(shape, section, layout, train.precision, rank, split)
        row["bytes"] = {
            **vars(held),
            **vars(besides),
            "total": held.total,
            "step_total": held.total + besides.gathered + besides.accumulated,
        }
    return row


def _batch_row(
    section: ParallelSection, layout: Layout, shape: ModelShape, train: TrainSection, batch: BatchShape
) -> dict[str, Any]:
    rows = batch.global_batch_size // layout.data
    count = rows // train.micro_batch_size
    bubble = bubble_fraction(section.schedule, section.pipeline, section.virtual, count)
    return {
        "seq_length": batch.seq_length,
        "global_batch_size": batch.global_batch_size,
        "microbatches": count,
        "bubble": float(bubble),
        "receive_bytes": receive_bytes(
            section, layout, shape.hidden_size, train.precision, train.micro_batch_size, batch.seq_length, count
        ),
    }
