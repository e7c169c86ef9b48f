"""Going back to a checkpoint within a process, on all ranks, and the file that makes a kill on the way harmless.

PaLM (arXiv 2204.02311, section 5.1) began again from a checkpoint some 100 steps before a spike and passed over some
200 to 500 batches, which cover those before and during it. Here a checkpoint need not lie there: training goes on from
the newest whole one that is early enough, the steps up to `restart` are trained as they were, to the bit where the
layout is the same, and the batches from there to `last` are passed over. So what is lost does not depend on how often
the run saves.

Those batches are consumed: sample and step numbers, cursors, order hash and learning rate are those of an undisturbed
run, of which the steps made no update.

OUTPUT/roll_backs.json is written when everything beyond the checkpoint has been set aside. A process that is killed
before finds the spike again by itself; one that is killed later, or started on another layout, finds the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, MutableSequence
from typing import Any, TypeVar

from megatron.checkpoint.manager import CheckpointManager, CheckpointRef
from megatron.config.errors import CheckpointError
from megatron.config.spikes_section import SpikesSection
from megatron.data.ledger_events import Event, roll_back_event
from megatron.engines.base import Engine
from megatron.metrics.sinks import JsonlSink, Sink
from megatron.trainer.job import Job
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.spikes import FindCheckpoint, GoBack
from megatron.trainer.state import TrainerState

T = TypeVar("T")
Say = Callable[[str], None]
JOURNAL = "roll_backs.json"


class RollingBack:
    """Called with a GoBack by all ranks: engine and state are then those of its checkpoint, and what lies beyond is set
    aside. Gives the events that the checkpoint's ledger lacks."""

    def __init__(
        self,
        folder: RunFolder,
        manager: CheckpointManager,
        engine: Engine,
        state: TrainerState,
        sinks: MutableSequence[Sink],
        job: Job,
        say: Say,
    ) -> None:
        self._folder, self._manager, self._engine, self._state = folder, manager, engine, state
        self._sinks, self._job, self._say = sinks, job, say

    def __call__(self, back: GoBack) -> list[Event]:
        """Goes back."""
        found, one = back.found, back.roll_back
        self._job.at("goes back to a checkpoint")
        self._say(
            f"step {one['step']}: {one['reason']}: goes back to step {one['restart']}, by way of {found.path}; steps "
            f"{one['restart'] + 1} to {one['last']} will be passed over: their samples are consumed and not trained on"
        )
        then, now = TrainerState.from_json(found.state), self._state
        lacking = [roll_back for roll_back in [*now.spikes.roll_backs, one] if roll_back not in then.spikes.roll_backs]
        then.spikes.roll_backs += lacking
        then.spikes.steps, then.seconds = now.spikes.steps, now.seconds
        if self._job.writes:
            self._set_aside(found.step)
            write_journal(self._folder, then.spikes.roll_backs)
        self._engine.load_model_state(found.model())
        self._engine.load_optimizer_state(found.optimizer())
        self._engine.load_rng_state(found.rng())
        vars(now).update(vars(then))
        return [roll_back_event(roll_back) for roll_back in lacking]

    def _set_aside(self, step: int) -> None:
        """As a start from an older checkpoint does."""
        for number, path in self._manager.steps():
            if number > step and self._manager.is_whole_as_far_as_known(path):
                self._say(f"set aside {path} as {self._manager.set_aside(path)}")
        for sink in self._sinks:
            if isinstance(sink, JsonlSink) and (rows := sink.cut_after(step)):
                self._say(f"set aside {rows} rows of metrics beyond step {step} in metrics.discarded.jsonl")


def open_again(job: Job, back: GoBack, make: Callable[[], T]) -> T:
    """All ranks: opens the data once more, in turn; a turn has a name of its own."""
    return job.in_turn(f"opens the data before step {back.roll_back['step']}", make)


def finder(manager: CheckpointManager, say: Say) -> FindCheckpoint:
    """Looks for a checkpoint to go back to, with no save in flight."""

    def find(restart: int) -> CheckpointRef | None:
        manager.finish()
        try:
            return manager.newest_whole(say, up_to=restart)
        except CheckpointError as error:
            say(f"note: {error}")
            return None

    return find


def write_journal(folder: RunFolder, roll_backs: list[dict[str, Any]]) -> None:
    """Rank 0: makes the roll-backs durable. Raises StorageError."""
    folder.write(JOURNAL, json.dumps(roll_backs, indent=1) + "\n")


def read_journal(folder: RunFolder) -> list[dict[str, Any]]:
    """Rank 0: the roll-backs on record. Raises CheckpointError for a file that is damaged."""
    path = folder.path / JOURNAL
    if not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        _ = [
            (row["step"] + row["restart"] + row["last"] + row["checkpoint"], row["reason"], row["stage"])
            for row in rows
        ]
        return rows
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no record of roll-backs ({error!r}): put it back from a copy, or remove it to train on the steps "
            "that it says are passed over"
        ) from None


def take_up(section: SpikesSection, folder: RunFolder, state: TrainerState, job: Job, say: Say) -> list[Event]:
    """All ranks, at a start: the roll-backs that the checkpoint does not know yet, into the state; gives their events.
    Under another policy what is still to be passed over is trained on after all. Raises CheckpointError."""
    spikes, policy = state.spikes, section.policy
    known = job.share("roll-backs", lambda: read_journal(folder))
    lacking = [one for one in known if one not in spikes.roll_backs and one["restart"] >= state.step]
    pending = [one for one in [*spikes.roll_backs, *lacking] if one["last"] > state.step]
    if pending and policy != "roll-back":
        for one in pending:
            say(
                f'note: spikes.policy is "{policy}": steps {max(one["restart"], state.step) + 1} to {one["last"]} '
                f"are trained on, which a roll-back at step {one['step']} passed over"
            )
        spikes.roll_backs = [
            {**one, "last": min(one["last"], state.step)} for one in spikes.roll_backs if one["restart"] < state.step
        ]
        return []
    for one in pending:
        say(
            f"note: steps {max(one['restart'], state.step) + 1} to {one['last']} are passed over, as decided at step "
            f'{one["step"]} ({one["reason"]}); spikes.policy = "none" trains on them'
        )
    spikes.roll_backs += lacking
    spikes.steps = sorted({*spikes.steps, *(one["step"] for one in lacking)})
    return [roll_back_event(one) for one in lacking]
