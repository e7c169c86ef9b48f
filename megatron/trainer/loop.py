"""The training loop. It never sees a model, a mesh or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from megatron.engines.base import Engine
from megatron.metrics.meters import StepClock
from megatron.trainer.over_ranks import OverRanks
from megatron.trainer.state import BatchLike, Step, TrainerState


class Timeline(Protocol):
    """What the loop asks of the schedule."""

    def learning_rate(self, consumed_tokens: int) -> float:
        """The rate of the step that ends when so many tokens of the whole run are consumed."""

    def ends_training_stage(self, consumed_samples: int) -> bool:
        """Whether a training stage ends at this number of consumed samples of the whole run."""


@dataclass
class Run:
    """The pieces of a run, put together by `build`. stop_signal: the one that this process was sent; empty: none."""

    state: TrainerState
    engine: Engine
    batches: Iterable[BatchLike]
    timeline: Timeline
    begin_training_stage: Callable[[str], None]
    stop_signal: Callable[[], str]
    over_ranks: OverRanks
    hooks: list[Callable[[Step], None]]
    clock: StepClock


def train(run: Run) -> str:
    """Trains until the schedule is over or any rank is asked to stop; a step that was begun is always finished.

    Gives the name of the signal that stopped it; empty where it came to its end.
    """
    state, clock = run.state, run.clock
    if stop := run.over_ranks.stop_asked(run.stop_signal()):
        return stop
    for batch in clock.waiting("data", run.batches):
        if batch.training_stage != state.training_stage:
            run.begin_training_stage(batch.training_stage)
        lr = run.timeline.learning_rate(state.consumed_tokens + batch.tokens)
        with clock.spending("engine"):
            result = run.engine.train_step(batch.microbatches, lr)
        whole, stop = run.over_ranks.end_of_step(batch, run.stop_signal())
        state.advance(whole, result)
        ends = run.timeline.ends_training_stage(state.consumed_samples)
        step = Step(state, whole, result, lr, ends, stop)
        for hook in run.hooks:
            hook(step)
        if stop:
            return stop
    return ""
