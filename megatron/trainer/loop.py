"""The training loop. It never sees a model, a mesh or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.engines.base import Engine, LaunchedStep
from megatron.metrics.meters import StepClock
from megatron.trainer.decisions import Decision
from megatron.trainer.over_ranks import OverRanks
from megatron.trainer.state import BatchLike, Step, TrainerState


class Timeline(Protocol):
    """What the loop asks of the schedule."""

    def learning_rate(self, consumed_tokens: int) -> float:
        """The rate of the step that ends when so many tokens of the whole run are consumed."""

    def ends_training_stage(self, consumed_samples: int) -> bool:
        """Whether a training stage ends at this number of consumed samples of the whole run."""


def launch_plainly(engine: Engine, batch: BatchLike, lr: float) -> LaunchedStep:
    """A step without bounds."""
    return engine.launch_step(batch.microbatches, lr)


@dataclass
class Run:
    """The pieces of a run, put together by `build`.

    asked: what this process was asked by now, see `Stopping`. looks_at: whether a hook wants the weights as they are
    after a step of this number; what it does may take minutes, and whoever asked meanwhile need not wait for another
    step. save_at_stop: saves a run that stops between two steps. launch: how a batch becomes a step of the engine.
    """

    state: TrainerState
    engine: Engine
    batches: Iterable[BatchLike]
    timeline: Timeline
    begin_training_stage: Callable[[str], None]
    asked: Callable[[], Sequence[str]]
    over_ranks: OverRanks
    hooks: list[Callable[[Step], None]]
    clock: StepClock
    looks_at: Callable[[int], bool] = lambda step: True
    save_at_stop: Callable[[], None] = lambda: None
    launch: Callable[[Engine, BatchLike, float], LaunchedStep] = launch_plainly


@dataclass(frozen=True)
class _Begun:
    """A step that was launched and has not been looked at."""

    batch: BatchLike
    launched: LaunchedStep
    lr: float
    ends: bool
    decision: Decision


def train(run: Run) -> str:
    """Trains until the schedule is over or any rank is asked to stop; a step that was begun is always finished.

    Where a device works by itself, a step is looked at when the next one has been launched; but at once where weights
    are wanted as they are after it. Gives what stopped it, a signal's name say; empty where it came to its end.
    """
    state, last = run.state, None
    if stop := run.over_ranks.decide(run.asked()).stop:
        return stop
    samples, tokens, stage = state.consumed_samples, state.consumed_tokens, state.training_stage
    for batch in run.clock.waiting("data", run.batches):
        if batch.training_stage != stage:
            run.begin_training_stage(batch.training_stage)
        samples, tokens, stage = samples + batch.samples, tokens + batch.tokens, batch.training_stage
        lr = run.timeline.learning_rate(tokens)
        with run.clock.spending("engine"):
            launched = run.launch(run.engine, batch, lr)
        whole, decision = run.over_ranks.end_of_step(batch, run.asked(), _skipped(state, launched))
        _finish(run, last)
        last = _Begun(whole, launched, lr, run.timeline.ends_training_stage(samples), decision)
        looked = last.ends or decision.stop or decision.save or run.looks_at(state.step + 1)
        if launched.ready or looked:
            last = _finish(run, last)
        if decision.stop:
            return decision.stop
        if looked and (stop := run.over_ranks.decide(run.asked()).stop):
            run.save_at_stop()
            return stop
    _finish(run, last)
    return ""


def _skipped(state: TrainerState, launched: LaunchedStep) -> int:
    """Steps that are known here to have made no update, this one among them where it is known at once."""
    return state.skipped + (launched.ready and not launched.result().updated)


def _finish(run: Run, begun: _Begun | None) -> None:
    """Counts a step, where there is one, and shows it to the hooks."""
    if begun is None:
        return
    with run.clock.spending("engine"):
        result = begun.launched.result()
    run.state.advance(begun.batch, result)
    step = Step(run.state, begun.batch, result, begun.lr, begun.ends, begun.decision.stop, begun.decision.save)
    for hook in run.hooks:
        hook(step)
