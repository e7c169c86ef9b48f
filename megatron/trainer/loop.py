"""The training loop. It never sees a model, a mesh or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from megatron.engines.base import Engine
from megatron.metrics.meters import StepClock
from megatron.trainer.state import BatchLike, Step, TrainerState


class Timeline(Protocol):
    """What the loop asks of the schedule."""

    def learning_rate(self, consumed_tokens: int) -> float:
        """The rate of the step that ends when so many tokens of the whole run are consumed."""

    def ends_training_stage(self, consumed_samples: int) -> bool:
        """Whether a training stage ends at this number of consumed samples of the whole run."""


@dataclass
class Run:
    """The pieces of a run, put together by `build`."""

    state: TrainerState
    engine: Engine
    batches: Iterable[BatchLike]
    timeline: Timeline
    begin_training_stage: Callable[[str], None]
    stop_requested: Callable[[], bool]
    hooks: list[Callable[[Step], None]]
    clock: StepClock


def train(run: Run) -> None:
    """Trains until the schedule is over or a stop is requested; a step that was begun is always finished."""
    state, clock = run.state, run.clock
    if run.stop_requested():
        return
    for batch in clock.waiting("data", run.batches):
        if batch.training_stage != state.training_stage:
            run.begin_training_stage(batch.training_stage)
        lr = run.timeline.learning_rate(state.consumed_tokens + batch.tokens)
        with clock.spending("engine"):
            result = run.engine.train_step(batch.microbatches, lr)
        state.advance(batch, result)
        ends = run.timeline.ends_training_stage(state.consumed_samples)
        step = Step(state, batch, result, lr, ends, run.stop_requested())
        for hook in run.hooks:
            hook(step)
        if step.stopping:
            return
