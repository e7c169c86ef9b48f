"""The policy about loss spikes: bounds for each step, steps without an update, batches that are passed over, the cap.

All ranks decide alike, since they decide by the same numbers: a step's loss and norm are those of the global batch, the
same bits on every rank, and what they are compared with is made of such numbers of earlier steps. `AllRanks` compares
how many steps each rank has left without an update, every step.

Over other layouts losses differ by rounding, and so may, for a step that close to its bound, the decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from megatron.checkpoint.manager import CheckpointRef
from megatron.config.errors import NonFiniteError
from megatron.config.spikes_section import SpikesSection
from megatron.data.ledger_events import Event, pass_over, spike_event
from megatron.engines.base import Bounds, DoneStep, Engine, LaunchedStep, StepResult
from megatron.trainer.spike_bounds import part_of
from megatron.trainer.state import BatchLike, Step, TrainerState

FindCheckpoint = Callable[[int], CheckpointRef | None]
"""All ranks: the newest whole checkpoint of a step that is not beyond the one given."""


class GoBack(Exception):
    """Raised out of the loop on all ranks: training is to go on from `found`. roll_back: as the state keeps it."""

    def __init__(self, roll_back: dict[str, Any], found: CheckpointRef) -> None:
        super().__init__(roll_back)
        self.roll_back, self.found = roll_back, found


class SpikeWatch:
    """Launches steps within their bounds, and as a hook does what the policy says about a spike.

    starts: of the parts of the run that are judged by themselves (`spike_bounds.leaps`). events: the ledger's so far;
    the state's data position carries them on from here. sources: names by source id. limit: train.max_non_finite.
    """

    def __init__(
        self,
        section: SpikesSection,
        state: TrainerState,
        starts: Sequence[int],
        events: Sequence[Event],
        sources: Sequence[str],
        limit: int,
        find: FindCheckpoint,
        say: Callable[[str], None],
    ) -> None:
        self._section, self._state, self._starts = section, state, list(starts)
        self._events, self._sources, self._limit = deepcopy(list(events)), sources, limit
        self._find, self._say = find, say

    def launch(self, engine: Engine, batch: BatchLike, lr: float) -> LaunchedStep:
        """The step of a batch; nothing runs for one that is passed over."""
        if batch.passed_over:
            return DoneStep(StepResult(math.nan, {}, math.nan, 0, False, "passed over after a spike"))
        bounds = self._bounds(batch)
        if bounds is None:
            return engine.launch_step(batch.microbatches, lr)
        return engine.launch_step(batch.microbatches, lr, bounds)

    def __call__(self, step: Step) -> None:
        """Enters a step into the window and its events. Raises GoBack, and NonFiniteError beyond the cap."""
        state, batch = self._state, step.batch
        if batch.passed_over:
            cause = next(one for one in reversed(state.spikes.roll_backs) if one["restart"] < state.step <= one["last"])
            pass_over(self._events, state.training_stage, state.step, _range(step), _tokens(batch), cause["step"])
        elif self._section.policy != "none":
            self._look(step)
        if self._events != batch.position.get("events", self._events):
            state.data = {**batch.position, "events": deepcopy(self._events)}

    def _bounds(self, batch: BatchLike) -> Bounds | None:
        if self._section.policy == "none":
            return None
        return self._state.spikes.bounds(batch.step, self._part(batch), self._section)

    def _part(self, batch: BatchLike) -> int:
        return part_of(batch.position["consumed_samples"] - 1, self._starts)

    def _look(self, step: Step) -> None:
        state, result = self._state, step.result
        if result.valid_targets:
            window = self._section.window
            state.spikes.remember(state.step, result.loss, result.grad_norm, self._part(step.batch), window)
        lost = state.skipped_in_row >= self._limit and not result.spike
        if not result.spike and not (lost and self._section.policy == "roll-back"):
            return
        state.spikes.steps = [n for n in (*state.spikes.steps, state.step) if n > state.step - self._section.within]
        if len(state.spikes.steps) > self._section.at_most:
            raise NonFiniteError(self._too_many(step))
        if self._section.policy == "roll-back" and self._goes_back(step, state.skipped_in_row if lost else 1):
            return
        self._events.append(
            spike_event(state.training_stage, state.step, _range(step), _tokens(step.batch), result.reason)
        )

    def _goes_back(self, step: Step, row: int) -> bool:
        """Raises GoBack where there is a checkpoint to go back to; gives False and says so where there is none.

        row: steps up to this one that made no update.
        """
        section, now = self._section, self._state.step
        restart = now - row + 1 - section.back
        found = self._find(restart) if restart > 0 else None
        if found is None:
            self._say(
                f"step {now}: no whole checkpoint is {section.back} steps (spikes.back) before it: there is nothing to "
                "roll back to, and the step is left out alone"
            )
            return False
        reason = step.result.reason
        if row > 1:
            reason = f"{row} steps in a row without an update, the last: {reason}"
        roll_back = {
            "step": now,
            "stage": self._state.training_stage,
            "reason": reason,
            "restart": restart,
            "last": max(now, restart + section.pass_over),
            "checkpoint": found.step,
        }
        raise GoBack(roll_back, found)

    def _too_many(self, step: Step) -> str:
        section, result = self._section, step.result
        losses = {self._sources[source]: sums for source, sums in sorted(result.loss_by_source.items())}
        shown = ", ".join(f"{name} {total / count:.4g}" for name, (total, count) in losses.items() if count)
        first, end = _range(step)
        steps = self._state.spikes.steps
        return (
            f"step {step.state.step}: {len(steps)} spikes within {section.within} steps, at steps "
            f"{', '.join(map(str, steps))} (spikes.at_most = {section.at_most}); the last: {result.reason}; its losses "
            f"by source: {shown or 'none'}. Look at its samples with tools/inspect_data.py CONFIG --samples "
            f"{first}:{end}; lower the learning rate or optimizer.clip_grad_norm, or raise spikes.deviations or "
            "spikes.at_most, and start the same command again"
        )


def _range(step: Step) -> tuple[int, int]:
    end = step.state.consumed_samples
    return end - step.batch.samples, end


def _tokens(batch: BatchLike) -> Mapping[str, int]:
    length = batch.tokens // max(1, batch.samples)
    return {name: count * length for name, count in batch.samples_by_source.items()}
