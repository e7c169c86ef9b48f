"""GPU-hours and disk of each node, by the planner's arithmetic, on one accelerator and layout."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron.config.errors import ConfigError
from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import refusals
from megatron.config.schema import RunConfig
from megatron.data.schedule import Schedule
from megatron.planner.disk import checkpoint_bytes, export_bytes
from megatron.planner.hardware import Accelerator, Efficiency
from megatron.planner.layout_plan import batches_of, default_processes
from megatron.planner.run_time import run_time, step_times
from megatron.study.graph import Graph, Node
from megatron.study.identity import longest_sequence, shape_of, vocabulary_of
from megatron.study.steps import TrainStep, regular_steps, trained


@dataclass(frozen=True)
class NodeTime:
    """One node on so many processes. seconds: of training alone, without saves, validations, queues and failures."""

    processes: int
    seconds: float

    @property
    def gpu_hours(self) -> float:
        """Hours x processes."""
        return self.seconds * self.processes / 3600


@dataclass(frozen=True)
class NodeDisk:
    """Bytes that stay of a node when it is done. checkpoints: how many, the copy of its parent's among them."""

    checkpoints: int
    checkpoint: int
    export: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints * self.checkpoint + self.export


def node_times(
    graph: Graph, accelerator: Accelerator, processes: int | None, efficiency: Efficiency | None = None
) -> tuple[dict[str, NodeTime], list[str]]:
    """By node, and what cannot be said and why. processes: default the fewest that [parallel] names.

    Raises ConfigError where the processes are no multiple of the named axes.
    """
    times: dict[str, NodeTime] = {}
    notes: dict[str, None] = {}
    for node in graph.nodes.values():
        if not isinstance(node.step, TrainStep):
            times[node.id] = NodeTime(1, 0.0)
            continue
        found = _time(node.step, accelerator, processes, efficiency)
        if isinstance(found, str):
            notes[found] = None
        else:
            times[node.id] = found
    return times, list(notes)


def _time(
    step: TrainStep, accelerator: Accelerator, processes: int | None, efficiency: Efficiency | None
) -> NodeTime | str:
    config = step.config
    section, train = config.parallel, config.train
    count = processes or default_processes(section)
    layout = resolve_layout(section, count)
    if vocabulary_of(config) is None:
        return f"no hours: the vocabulary of {config.tokenizer.path} is not known: set model.vocab_size in the base"
    shape = shape_of(config, longest_sequence(step))
    schedule = Schedule((step.stage,))
    wrong = refusals(section, layout, shape, train, config.optimizer, batches_of(schedule), train.precision, True)
    if wrong:
        return f"no hours: train would refuse the layout over {count} processes: {wrong[0]}"
    steps = step_times(schedule, shape, section, layout, train, config.optimizer, accelerator, efficiency)
    return NodeTime(count, run_time(schedule, steps, count).seconds)


def node_disk(node: Node, averaged: Collection[int] = ()) -> NodeDisk | None:
    """What stays of a node; None where the vocabulary is not known. averaged: steps that averages need of it."""
    step = trained(node.step)[-1]
    config = step.config
    if vocabulary_of(config) is None:
        return None
    shape = shape_of(config, longest_sequence(step))
    model, optimizer = checkpoint_bytes(shape, config.optimizer, config.train.precision)
    if not isinstance(node.step, TrainStep):
        return NodeDisk(1, model, export_bytes(shape))
    return NodeDisk(_kept(config, step, averaged), model + optimizer, export_bytes(shape))


def _kept(config: RunConfig, step: TrainStep, averaged: Collection[int]) -> int:
    """The one at its end and those for averages, the newest `keep` of the others, and the copy of what it goes on
    from."""
    regular = regular_steps(step.stage.start_step, step.stage.end_step, config.checkpoint.every)[1:]
    passing = [number for number in regular if number not in averaged]
    return 1 + len(averaged) + min(len(passing), config.checkpoint.keep) + (step.before is not None)


def check_processes(graph: Graph, processes: int | None) -> None:
    """Raises ConfigError where some node's layout does not divide the processes."""
    if processes is None:
        return
    for node in graph.nodes.values():
        if isinstance(node.step, TrainStep):
            try:
                resolve_layout(node.step.config.parallel, processes)
            except ConfigError as error:
                raise ConfigError(f"--processes {processes}: arm {node.step.arm!r}: {error}") from None
