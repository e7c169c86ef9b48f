"""What happens after a step: log it, validate, stop where losses are no numbers, save."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from megatron.config.errors import NonFiniteError
from megatron.data.ledger import add_to_order, hash_words
from megatron.engines.base import NO_TARGET, Engine
from megatron.metrics.meters import StepClock
from megatron.metrics.row_tail import ASIDE
from megatron.metrics.sinks import Sink
from megatron.trainer.held_out import HeldOut
from megatron.trainer.state import Step, TrainerState


class Log:
    """Writes one row a step to every sink.

    sources: the source names, by source id. start: what runs since this start, in the engine's words; the first row
    carries it, so that whatever sets rows aside at a resume sets aside the record of what made them.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        sources: Sequence[str],
        clock: StepClock,
        start: Mapping[str, str] | None = None,
    ) -> None:
        self._sinks = sinks
        self._sources = sources
        self._clock = clock
        self._unsaid = {"start": dict(start)} if start else {}

    def __call__(self, step: Step) -> None:
        """Logs `step`."""
        row = self._what_was_learnt(step) | self._what_it_took(step) | self._unsaid
        self._unsaid = {}
        for sink in self._sinks:
            sink.write(row)

    def _what_was_learnt(self, step: Step) -> dict[str, Any]:
        state, result = step.state, step.result
        losses = {self._sources[source]: mean(*sums) for source, sums in sorted(result.loss_by_source.items())}
        row = {
            "step": state.step,
            "training_stage": state.training_stage,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "loss": None if result.reason == NO_TARGET else result.loss,
            "loss_by_source": losses,
            "lr": step.lr,
            "grad_norm": result.grad_norm,
            "skipped": not result.updated,
            "skipped_total": state.skipped,
            "valid_targets": result.valid_targets,
            "samples_by_source": step.batch.samples_by_source,
            "batch_digest": step.batch.digest,
        }
        if step.batch.passed_over:
            return {**row, "passed_over": True, "skip_reason": result.reason, "batch_digest": None}
        return row if result.updated else {**row, "skip_reason": result.reason}

    def _what_it_took(self, step: Step) -> dict[str, Any]:
        spent = self._clock.lap()
        aside = {f"{name}_seconds": round(spent[name], 6) for name in ASIDE if name in spent}
        seconds = spent["step"] - sum(spent.get(name, 0.0) for name in ASIDE)
        step.state.seconds += seconds
        padding = step.batch.padding
        return {
            "tokens": step.batch.tokens,
            **({"padding": padding} if padding else {}),
            "tokens_per_second": round((step.batch.tokens - padding) / max(seconds, 1e-9), 3),
            "step_seconds": round(seconds, 6),
            "engine_seconds": round(spent.get("engine", 0.0), 6),
            "data_seconds": round(spent.get("data", 0.0), 6),
            **aside,
        }


class CompareOrder:
    """Sums what was really loaded, sample by sample, and compares it with the order hash of the stream.

    order: the hash's two words where the run goes on from. A difference is a bug of the loader or damaged memory, and
    would train on other samples than the ledger says: RuntimeError, before anything is saved.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self._order = list(order)

    def __call__(self, step: Step) -> None:
        """Adds the batch of `step` and compares."""
        add_to_order(self._order, step.batch.loaded)
        loaded, said = hash_words(self._order), step.batch.position["order"]
        if loaded != said:
            raise RuntimeError(
                f"step {step.state.step}: the samples that were loaded have the order hash {loaded}, the ledger says "
                f"{said}: nothing was saved since; go on from the last checkpoint, and report this"
            )


class Validate:
    """Evaluates held-out samples by source every `every` steps and at the end of each training stage; of steps that
    are passed over, which leave weights as they are, at the latter alone. held_out: by name of each training stage."""

    def __init__(
        self,
        every: int,
        engine: Engine,
        held_out: Mapping[str, HeldOut],
        sources: Sequence[str],
        sinks: Sequence[Sink],
        clock: StepClock,
    ) -> None:
        self._every = every
        self._engine = engine
        self._held_out = held_out
        self._sources = sources
        self._sinks = sinks
        self._clock = clock

    def __call__(self, step: Step) -> None:
        """Evaluates where it is time to."""
        due = step.state.step % self._every == 0 and not step.batch.passed_over
        held_out = self._held_out[step.state.training_stage]
        if held_out.microbatches and (due or step.ends_training_stage):
            with self._clock.spending("validation"):
                sums = self._engine.evaluate(held_out.microbatches)
            state = step.state
            row: dict[str, Any] = {
                "step": state.step,
                "training_stage": state.training_stage,
                "consumed_samples": state.consumed_samples,
                "consumed_tokens": state.consumed_tokens,
                "validation": {self._sources[source]: mean(*sums[source]) for source in sorted(sums)},
            }
            if held_out.masked:
                row["validation_masked"] = list(held_out.masked)
            for sink in self._sinks:
                sink.write(row)


class StopWhereNothingIsLearnt:
    """Ends the run after `limit` steps in a row without an update."""

    def __init__(self, limit: int, newest_checkpoint: Callable[[], str]) -> None:
        self._limit = limit
        self._newest = newest_checkpoint

    def __call__(self, step: Step) -> None:
        """Raises NonFiniteError at the limit."""
        state = step.state
        if state.skipped_in_row >= self._limit:
            raise NonFiniteError(
                f"step {state.step}: {state.skipped_in_row} steps in a row without an update "
                f"(train.max_non_finite = {self._limit}); the last: {step.result.reason or 'loss not finite'}. "
                f"The newest checkpoint is {self._newest()}. {self._remedy(step)}"
            )

    @staticmethod
    def _remedy(step: Step) -> str:
        end = step.state.consumed_samples
        look = f"look at the last batch with tools/inspect_data.py --samples {end - step.batch.samples}:{end}"
        if step.result.reason == NO_TARGET:
            return (
                f"The loss masks mark nothing in these batches: {look} --loss, raise the stage's global_batch_size or "
                "seq_length, or leave out the source whose documents have so few targets"
            )
        return f"Lower the learning rate or optimizer.clip_grad_norm, set train.precision to fp32, or {look}"


class Checkpoint:
    """Saves every `every` steps, at the end of each training stage and at `keep_steps` (both kept for good), when asked
    to and when the run stops.

    While steps go without an update, or are passed over, nothing that could wait is saved, and nothing older is
    deleted: the last good checkpoints must not be pushed out by a run that has gone wrong.
    """

    def __init__(
        self,
        every: int,
        save: Callable[[bool, bool], None],
        clock: StepClock,
        poll: Callable[[], None] = lambda: None,
        asked_for: Callable[[], None] = lambda: None,
        keep_steps: Collection[int] = (),
    ) -> None:
        """poll: raises what went wrong in a save that ran beside training. asked_for: called before a save that was
        asked for out of turn. keep_steps: steps that are saved besides, and kept for good."""
        self._every = every
        self._save = save
        self._clock = clock
        self._poll = poll
        self._asked_for = asked_for
        self._keep_steps = frozenset(keep_steps)
        self._saved = -1

    def __call__(self, step: Step) -> None:
        """Calls save(keep_forever, retire) where it is time to."""
        self._poll()
        learning = step.learnt
        due = step.state.step % self._every == 0 and learning
        kept = step.ends_training_stage or step.state.step in self._keep_steps
        saves = bool(due or kept or step.stop or step.save)
        self._saved = step.state.step if saves else -1
        if step.save:
            self._asked_for()
        if saves:
            with self._clock.spending("checkpoint"):
                self._save(kept, learning)

    def at_stop(self, state: TrainerState) -> None:
        """Saves a run that stops between two steps, unless it was saved after the last one."""
        if self._saved != state.step:
            self._saved = state.step
            with self._clock.spending("checkpoint"):
                self._save(False, state.skipped_in_row == 0 and not state.spikes.passes_over(state.step))


def mean(total: float, count: int) -> float | None:
    """total / count; None of nothing."""
    return total / count if count else None
