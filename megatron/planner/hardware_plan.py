"""The hardware part of a plan: memory, step time, communication, hours and disk of a layout on an accelerator, the
nearest layout that fits, and the best of all, as JSON values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.layout_checks import BatchShape, notes_of_layout
from megatron.config.schema import CheckpointSection, ValidationSection
from megatron.data.schedule import Schedule
from megatron.planner.bubble import bubble_fraction
from megatron.planner.communication import volumes
from megatron.planner.disk import DiskPlan
from megatron.planner.layout_fit import Place, framework_bytes, memory_of, time_of
from megatron.planner.layout_plan import words_of
from megatron.planner.nearest import changes_of, removals, settings
from megatron.planner.positions import stretches
from megatron.planner.run_time import Pause, run_time, save_seconds, validation_seconds
from megatron.planner.search import Fewest, Found, SearchResult
from megatron.planner.search_space import Choice, Workload, train_of
from megatron.planner.step_time import StepTime

KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "gathered",
    "accumulated",
    "receive",
    "activations",
    "logits",
    "workspace",
)
"""Of a rank's bytes, fields of RankMemory, besides "framework"."""


@dataclass(frozen=True)
class Run:
    """What decides how long a whole run takes. checkpoint_bytes: of one. bandwidth: bytes a second that all processes
    together write. rows: held-out ones of one validation."""

    schedule: Schedule
    checkpoint: CheckpointSection
    validation: ValidationSection
    rows: int
    checkpoint_bytes: int
    bandwidth: float


def training_batches(schedule: Schedule) -> tuple[BatchShape, ...]:
    """Every batch that training uses, the one that trains most tokens first; of equal ones the first to come."""
    tokens: dict[BatchShape, int] = {}
    for stage in schedule.stages:
        for part in stretches(stage):
            batch = BatchShape(part.seq_length, part.global_batch_size)
            tokens[batch] = tokens.get(batch, 0) + (part.end - part.start) * part.seq_length
    return tuple(sorted(tokens, key=lambda batch: -tokens[batch]))


def layout_json(workload: Workload, choice: Choice, place: Place, run: Run | None = None) -> dict[str, Any]:
    """A layout that train accepts.

    Keys: "words", "set" (KEY=VALUE for --set), "leave_out" (keys to be taken out of the file), "changes" (what they are
    about), "fits", "needed_bytes", "missing_bytes", "memory", "step", "microbatches", "bubble", "communication",
    "notes", and with run "run".
    """
    memory = memory_json(workload, choice, place)
    step = time_of(workload, choice, place)
    section, layout = choice.section, choice.layout
    now = workload.section, workload.train.micro_batch_size
    microbatches = workload.main.global_batch_size // layout.data // choice.rows
    row: dict[str, Any] = {
        "words": words_of(section, layout),
        "micro_batch_size": choice.rows,
        "set": settings(choice, *now),
        "leave_out": removals(choice, workload.section),
        "changes": list(changes_of(choice, *now)),
        "fits": memory["needed_bytes"] <= place.capacity,
        "needed_bytes": memory["needed_bytes"],
        "missing_bytes": max(0, memory["needed_bytes"] - place.capacity),
        "memory": memory,
        "microbatches": microbatches,
        "bubble": float(bubble_fraction(section.schedule, section.pipeline, section.virtual, microbatches)),
        "step": step_json(step),
        "communication": communication_json(workload, choice, place, step),
        "notes": _notes(workload, choice, place),
    }
    if run is not None:
        row["run"] = run_json(workload, choice, place, run)
    return row


def memory_json(workload: Workload, choice: Choice, place: Place) -> dict[str, Any]:
    """Of every pipeline rank in the batch that needs most: "ranks" with the bytes of each kind, "fullest" (its number),
    "needed_bytes" there, and "capacity_bytes"."""
    framework = framework_bytes(choice.layout)
    best: tuple[int, BatchShape, list[dict[str, Any]]] | None = None
    for batch in workload.batches:
        rows = []
        for rank in range(choice.layout.pipeline):
            memory = memory_of(workload, choice, rank, batch)
            kinds = {kind: getattr(memory, kind) for kind in KINDS}
            rows.append(
                {
                    "pipeline_rank": rank,
                    **kinds,
                    "framework": framework,
                    "total": memory.total + framework,
                    "moment": memory.moment,
                    "host": memory.host,
                }
            )
        most = max(row["total"] for row in rows)
        if best is None or most > best[0]:
            best = most, batch, rows
    assert best is not None, "a run has a batch"
    needed, batch, rows = best
    return {
        "seq_length": batch.seq_length,
        "global_batch_size": batch.global_batch_size,
        "capacity_bytes": place.capacity,
        "needed_bytes": needed,
        "fullest": next(row["pipeline_rank"] for row in rows if row["total"] == needed),
        "ranks": rows,
    }


def step_json(step: StepTime) -> dict[str, Any]:
    """Seconds by what they are spent on, throughput and MFU."""
    return {**vars(step), "exposed": dict(step.exposed), "communication": step.communication}


def communication_json(workload: Workload, choice: Choice, place: Place, step: StepTime) -> list[dict[str, Any]]:
    """By axis: bytes that a rank sends in a step inside its node and to others, and the seconds waited for. Of the
    pipeline rank that sends most."""
    node, train = place.accelerator.processes_per_node, train_of(workload, choice.rows)
    ranks = {0, choice.layout.pipeline // 2, choice.layout.pipeline - 1}
    sent = [
        volumes(workload.shape, choice.section, choice.layout, train, workload.main, rank, node)
        for rank in sorted(ranks)
    ]
    most = max(sent, key=lambda found: sum(volume.bytes_a_rank for volume in found))
    axes: dict[str, dict[str, Any]] = {}
    for volume in most:
        row = axes.setdefault(
            volume.axis, {"axis": volume.axis, "inside_node": 0.0, "between_nodes": 0.0, "messages": 0}
        )
        row["inside_node" if volume.inside_node else "between_nodes"] += volume.bytes_a_rank
        row["messages"] += volume.count
    return [{**row, "exposed_seconds": step.exposed.get(axis, 0.0)} for axis, row in axes.items()]


def run_json(workload: Workload, choice: Choice, place: Place, run: Run) -> dict[str, Any]:
    """Hours and GPU-hours by training stage and in all, saves and validation included."""
    steps = {batch: time_of(workload, choice, place, batch) for batch in workload.batches}
    save = save_seconds(run.checkpoint_bytes, run.bandwidth, run.checkpoint.asynchronous)
    look = validation_seconds(steps[workload.main], workload.main, run.rows) if run.rows else 0.0
    times = run_time(
        run.schedule,
        steps,
        choice.layout.world_size,
        Pause(run.checkpoint.every, save),
        Pause(run.validation.every, look) if run.rows else Pause(),
    )
    return {
        "hours": times.hours,
        "gpu_hours": times.gpu_hours,
        "save_seconds": run.checkpoint_bytes / run.bandwidth,
        "validation_seconds": look,
        "stages": [
            {
                "name": stage.name,
                "steps": stage.steps,
                "hours": stage.total / 3600,
                "gpu_hours": stage.total / 3600 * times.processes,
                "saves": stage.saves,
                "saving_hours": stage.saving / 3600,
                "validating_hours": stage.validating / 3600,
            }
            for stage in times.stages
        ],
        "batches": [
            {**batch._asdict(), "step_seconds": step.total, "tokens_per_second": step.tokens_per_second}
            for batch, step in steps.items()
        ],
    }


def search_json(workload: Workload, result: SearchResult, place: Place, fewest: Fewest | None) -> dict[str, Any]:
    """The best layouts, short; where none fits the nearest misses, and the fewest processes over which one does."""
    return {
        "processes": result.processes,
        "looked_at": result.looked,
        "refused": result.refused,
        "too_large": result.too_large,
        "timed": result.timed,
        "best": [_short(workload, one, place) for one in result.best],
        "misses": [_short(workload, one, place) for one in result.misses],
        "fewest_processes": fewest.processes if fewest else None,
        "fewest_is_exact": fewest.exact if fewest else None,
    }


def _short(workload: Workload, one: Found, place: Place) -> dict[str, Any]:
    choice, now = one.choice, (workload.section, workload.train.micro_batch_size)
    section, layout = choice.section, choice.layout
    microbatches = workload.main.global_batch_size // layout.data // choice.rows
    return {
        "words": words_of(section, layout),
        "micro_batch_size": choice.rows,
        "axes": {key: getattr(layout, key) for key in ("tensor", "pipeline", "context", "replicate", "shard")},
        "schedule": section.schedule if section.pipeline > 1 else None,
        "virtual": section.virtual if section.schedule == "interleaved" else None,
        "data_shard": section.data_shard,
        "recompute": section.recompute,
        "recompute_policy": section.recompute_policy if section.recompute == "selective" else None,
        "recompute_layers": section.recompute_layers,
        "needed_bytes": one.needed,
        "missing_bytes": max(0, one.needed - place.capacity),
        "step_seconds": one.step.total,
        "tokens_per_second": one.step.tokens_per_second,
        "tokens_per_second_per_process": one.step.tokens_per_second_per_process,
        "mfu_causal": one.step.mfu_causal,
        "mfu_full": one.step.mfu_full,
        "bubble": float(bubble_fraction(section.schedule, section.pipeline, section.virtual, microbatches)),
        "set": settings(choice, *now),
        "leave_out": removals(choice, workload.section),
    }


_ENGINE_NOTES = {
    "deepspeed": ["DeepSpeed's memory is estimated from its documentation, and its messages are taken to be ours"]
}


def _notes(workload: Workload, choice: Choice, place: Place) -> list[str]:
    node = place.accelerator.processes_per_node
    section, layout = choice.section, choice.layout
    notes = notes_of_layout(section, layout, workload.shape, node)
    if section.schedule in ("zero-bubble", "zbv") and section.pipeline > 1:
        notes.append(f"parallel.schedule = {section.schedule} needs torch 2.13 or later, and runs layers uncompiled")
    notes += _ENGINE_NOTES.get(section.engine, [])
    if layout.world_size > node and layout.world_size % node:
        notes.append(
            f"{layout.world_size} processes are {layout.world_size // node} whole nodes of {node} and "
            f"{layout.world_size % node} processes on another, where messages take the network sooner than counted here"
        )
    return notes


def disk_json(plan: DiskPlan, bandwidth: float, asynchronous: bool) -> dict[str, Any]:
    """Of the whole run; bandwidth: bytes a second that all processes together write."""
    return {
        "checkpoint_bytes": plan.checkpoint,
        "model_bytes": plan.model,
        "optimizer_bytes": plan.optimizer,
        "checkpoints_at_most": plan.kept,
        "checkpoints_at_the_end": plan.at_the_end,
        "output_bytes": plan.output,
        "export_bytes": plan.export,
        "metrics_bytes": plan.metrics,
        "sources": [vars(source) for source in plan.sources],
        "data_bytes": sum(source.data for source in plan.sources),
        "index_bytes": sum(source.indexes for source in plan.sources),
        "bandwidth": bandwidth,
        "save_seconds": plan.checkpoint / bandwidth,
        "asynchronous": asynchronous,
    }
