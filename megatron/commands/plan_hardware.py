"""The hardware part of `stagemix plan`: whether a layout fits an accelerator, how long it takes, and which is best."""

from __future__ import annotations

from typing import Any

from megatron.commands.plan_hardware_arguments import Asked
from megatron.config.errors import ConfigError
from megatron.config.layout import resolve_layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import RunConfig
from megatron.launch.stop_lead import ASSUMED_BYTES_A_SECOND
from megatron.planner.disk import DiskPlan, disk_plan
from megatron.planner.hardware import find_accelerator
from megatron.planner.hardware_plan import Run, disk_json, layout_json, search_json, training_batches
from megatron.planner.layout_fit import Place
from megatron.planner.layout_plan import batches_of
from megatron.planner.measured_efficiency import measured_efficiency
from megatron.planner.nearest import nearest
from megatron.planner.resolve import ResolvedRun
from megatron.planner.search import fewest_processes, search
from megatron.planner.search_space import Choice, Workload, reasons


def hardware_part(
    config: RunConfig, run: ResolvedRun, plan: dict[str, Any], vocabulary: int | None, asked: Asked
) -> dict[str, Any]:
    """The plan's "hardware" as JSON values. vocabulary: the tokenizer's ids, None where it is not there.

    Raises ConfigError for an unknown accelerator, a [model] that is none, or no known vocabulary; DataError for a run
    whose efficiency cannot be told.
    """
    accelerator = find_accelerator(asked.hardware)
    shape = _shape(config, run, vocabulary)
    measured = measured_efficiency(asked.efficiency, accelerator) if asked.efficiency else None
    place = Place(accelerator, measured, asked.margin)
    workload = workload_of(config, run, shape)
    nodes = -(-asked.processes // accelerator.processes_per_node)
    bandwidth = asked.bandwidth or ASSUMED_BYTES_A_SECOND * nodes
    disk = _disk(config, run, plan, shape)
    whole = Run(run.schedule, config.checkpoint, config.validation, _rows(config), disk.checkpoint, bandwidth)
    part: dict[str, Any] = {
        "accelerator": {**vars(accelerator)},
        "efficiency": (measured.words if measured else "the planner's own, fitted to published runs"),
        "processes": asked.processes,
        "nodes": nodes,
        "partial_node": asked.processes % accelerator.processes_per_node if nodes > 1 else 0,
        "precision": config.train.precision,
        "memory_margin": asked.margin,
        "capacity_bytes": place.capacity,
        "refusals": [],
        "layout": None,
        "nearest": None,
        "search": None,
        "disk": disk_json(disk, bandwidth, config.checkpoint.asynchronous),
    }
    now = _now(workload, asked.processes)
    part["refusals"] = [str(error) for error in now] if isinstance(now, list) else []
    if isinstance(now, Choice):
        part["layout"] = layout_json(workload, now, place, whole)
    fits = part["layout"] is not None and part["layout"]["fits"]
    near = None if fits else nearest(workload, asked.processes, place)
    if near is not None:
        part["nearest"] = layout_json(workload, near.found.choice, place, whole)
    nothing = not fits and near is None
    if asked.top is not None or nothing:
        result = search(workload, asked.processes, place, asked.top or 10)
        fewest = None if result.best else fewest_processes(workload, asked.processes, place)
        fastest = layout_json(workload, result.best[0].choice, place, whole) if result.best else None
        part["search"] = search_json(workload, result, place, fewest) | {"fastest": fastest}
    return part


def workload_of(config: RunConfig, run: ResolvedRun, shape: ModelShape) -> Workload:
    """What every layout of the run has in common."""
    held_out = config.model.seq_length if config.validation.fraction else None
    return Workload(
        shape,
        config.parallel,
        config.train,
        config.optimizer,
        training_batches(run.schedule),
        tuple(batches_of(run.schedule, held_out)),
        config.kernels,
    )


def _shape(config: RunConfig, run: ResolvedRun, vocabulary: int | None) -> ModelShape:
    words = config.model.vocab_size or vocabulary
    if words is None:
        raise ConfigError(
            f"--hardware needs to know the vocabulary, and tokenizer.path {config.tokenizer.path} is not there: set "
            "model.vocab_size, for example --set model.vocab_size=128256"
        )
    longest = max(stage.shapes.longest_sequence for stage in run.schedule.stages)
    return resolve_model(config.model, words, longest)


def _now(workload: Workload, processes: int) -> Choice | list[ConfigError]:
    """The layout of the config, or what train says against it."""
    try:
        layout = resolve_layout(workload.section, processes)
    except ConfigError as error:
        return [error]
    choice = Choice(workload.section, layout, workload.train.micro_batch_size)
    return reasons(workload, choice) or choice


def _rows(config: RunConfig) -> int:
    """Held-out rows of one validation, at most."""
    return config.validation.samples * len(config.sources) if config.validation.fraction else 0


def _disk(config: RunConfig, run: ResolvedRun, plan: dict[str, Any], shape: ModelShape) -> DiskPlan:
    ends = [stage.end_step for stage in run.schedule.stages]
    precision = config.train.precision
    return disk_plan(shape, config.optimizer, precision, config.checkpoint, ends, run.sources, plan["sources"])
