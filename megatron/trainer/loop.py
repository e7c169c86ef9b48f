"""The training loop. It never sees a model, a mesh or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from megatron.engines.base import Engine, LaunchedStep
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
    """The pieces of a run, put together by `build`.

    stop_signal: the one that this process was sent; empty: none. looks_at: whether a hook wants the weights as they are
    after a step of this number.
    """

    state: TrainerState
    engine: Engine
    batches: Iterable[BatchLike]
    timeline: Timeline
    begin_training_stage: Callable[[str], None]
    stop_signal: Callable[[], str]
    over_ranks: OverRanks
    hooks: list[Callable[[Step], None]]
    clock: StepClock
    looks_at: Callable[[int], bool] = lambda step: True


@dataclass(frozen=True)
class _Begun:
    """A step that was launched and has not been looked at."""

    batch: BatchLike
    launched: LaunchedStep
    lr: float
    ends: bool
    stop: str


def train(run: Run) -> str:
    """Trains until the schedule is over or any rank is asked to stop; a step that was begun is always finished.

    Where a device works by itself, a step is looked at when the next one has been launched; but at once where weights
    are wanted as they are after it. Gives the name of the signal that stopped it; empty where it came to its end.
    """
    state, last = run.state, None
    if stop := run.over_ranks.stop_asked(run.stop_signal()):
        return stop
    samples, tokens, stage = state.consumed_samples, state.consumed_tokens, state.training_stage
    for batch in run.clock.waiting("data", run.batches):
        if batch.training_stage != stage:
            run.begin_training_stage(batch.training_stage)
        samples, tokens, stage = samples + batch.samples, tokens + batch.tokens, batch.training_stage
        lr = run.timeline.learning_rate(tokens)
        with run.clock.spending("engine"):
            launched = run.engine.launch_step(batch.microbatches, lr)
        whole, stop = run.over_ranks.end_of_step(batch, run.stop_signal())
        _finish(run, last)
        last = _Begun(whole, launched, lr, run.timeline.ends_training_stage(samples), stop)
        if launched.ready or last.ends or stop or run.looks_at(state.step + 1):
            last = _finish(run, last)
        if stop:
            return stop
    _finish(run, last)
    return ""


def _finish(run: Run, begun: _Begun | None) -> None:
    """Counts a step, where there is one, and shows it to the hooks."""
    if begun is None:
        return
    with run.clock.spending("engine"):
        result = begun.launched.result()
    run.state.advance(begun.batch, result)
    step = Step(run.state, begun.batch, result, begun.lr, begun.ends, begun.stop)
    for hook in run.hooks:
        hook(step)
