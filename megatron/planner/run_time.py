"""Hours and GPU-hours of a whole schedule, from the seconds of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.layout import Layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.data.schedule import Schedule, TrainingStage
from megatron.planner.hardware import Accelerator, Efficiency
from megatron.planner.layout_plan import batches_of
from megatron.planner.positions import stretches
from megatron.planner.step_time import StepTime, step_time


@dataclass(frozen=True)
class Pause:
    """What training stops for every so many steps, and how long each time; every 0: never. at_stage_ends: also at the
    end of a training stage, as checkpoints and validation are."""

    every: int = 0
    seconds: float = 0.0
    at_stage_ends: bool = True

    def times(self, first: int, last: int) -> int:
        """Of the steps first + 1 … last of the run, which are one training stage."""
        if self.every == 0:
            return 0
        regular = last // self.every - first // self.every
        return regular + (self.at_stage_ends and last % self.every != 0)


@dataclass(frozen=True)
class StageTime:
    """One training stage. seconds: of training alone; saving, validating: of what it stops for."""

    name: str
    steps: int
    tokens: int
    seconds: float
    saves: int
    saving: float
    validating: float

    @property
    def total(self) -> float:
        """Seconds from its begin to its end."""
        return self.seconds + self.saving + self.validating


@dataclass(frozen=True)
class RunTime:
    """A whole run on so many processes."""

    processes: int
    stages: tuple[StageTime, ...]

    @property
    def seconds(self) -> float:
        """From begin to end, without starts, queues and failures."""
        return sum(stage.total for stage in self.stages)

    @property
    def hours(self) -> float:
        """The same in hours."""
        return self.seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours x processes."""
        return self.hours * self.processes


def step_times(
    schedule: Schedule,
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    train: TrainSection,
    optimizer: OptimizerSection,
    accelerator: Accelerator,
    efficiency: Efficiency | None = None,
) -> dict[BatchShape, StepTime]:
    """Of every batch that some training stage uses."""
    return {
        batch: step_time(shape, section, layout, train, optimizer, batch, accelerator, efficiency)
        for batch in batches_of(schedule)
    }


def run_time(
    schedule: Schedule,
    steps: Mapping[BatchShape, StepTime],
    processes: int,
    saving: Pause = Pause(),
    validating: Pause = Pause(),
) -> RunTime:
    """By training stage. steps: from `step_times`. saving, validating: what training stops for, `save_seconds` and
    `validation_seconds` each time."""
    found = []
    for stage in schedule.stages:
        count, seconds = _training(stage, steps)
        last = stage.end_step
        saves, looks = saving.times(last - count, last), validating.times(last - count, last)
        pauses = saves * saving.seconds, looks * validating.seconds
        found.append(StageTime(stage.name, count, stage.tokens, seconds, saves, *pauses))
    return RunTime(processes, tuple(found))


def _training(stage: TrainingStage, steps: Mapping[BatchShape, StepTime]) -> tuple[int, float]:
    count, seconds = 0, 0.0
    for part in stretches(stage):
        here = (part.end - part.start) // part.global_batch_size
        count += here
        seconds += here * steps[BatchShape(part.seq_length, part.global_batch_size)].total
    return count, seconds


def save_seconds(checkpoint_bytes: int, bytes_a_second: float, asynchronous: bool = False) -> float:
    """That training waits for a checkpoint of so many bytes, all ranks together, on a disk that takes so many a second.
    asynchronous: files are written beside training, which then waits for next to nothing."""
    return 0.0 if asynchronous else checkpoint_bytes / bytes_a_second


def validation_seconds(step: StepTime, batch: BatchShape, rows: int) -> float:
    """Of a look at so many held-out rows, at a third of what training on them takes: the forward pass alone."""
    return (step.total - step.optimizer) / 3 * rows / batch.global_batch_size
