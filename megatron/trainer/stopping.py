"""Why a run stops, or saves out of turn, at a step boundary: signals, the allocation's end, and two switch files.

Each process knows what it was asked; what all of them do is one decision (`decisions`), made by `over_ranks`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron.config.errors import ConfigError, StopRequested
from megatron.config.schema import TrainSection
from megatron.launch.attempts import SAVE_NOW, WALL_TIME
from megatron.parallel.mesh import Mesh
from megatron.trainer.job import WatchedClock
from megatron.trainer.pace import Pace
from megatron.trainer.saving import Saver
from megatron.trainer.signals import StopSignals
from megatron.trainer.state import Step, TrainerState
from megatron.trainer.switches import Switches


class WallTime:
    """Whether another step and a save still fit into the allocation.

    The run stops where `now + steps + validations + 2 * save + margin > end`: steps: the longest of recent ones, twice
    where a step is launched before the one ahead of it is done; validations: the longest of recent ones for each of
    the next steps at which one is due; save: the longest of recent ones. `Pace` says what is taken before any was
    measured.
    """

    def __init__(self, end: float, margin: float, pace: Pace, now: Callable[[], float] = time.time) -> None:
        """end: unix seconds. Raises ConfigError where that is past."""
        self._end, self._margin, self._pace, self._now = end, margin, pace, now
        self._validates: Callable[[int], bool] = lambda step: False
        self._began = now()
        self.steps_ahead = 1
        if end <= self._began:
            raise ConfigError(
                f"the allocation's end, {_clock(end)}, is past (STAGEMIX_END_TIME, or SLURM_JOB_END_TIME): export the "
                "end of this job, or STAGEMIX_END_TIME=0 to train without looking at the time"
            )

    def plan(self, validates: Callable[[int], bool], steps_ahead: int) -> None:
        """validates: whether one is due after the step of this number. steps_ahead: steps between a decision and the
        end of the step after it."""
        self._validates, self.steps_ahead = validates, steps_ahead

    def needed(self, step: int) -> float:
        """Seconds that another step and a save take, so many steps having been taken."""
        pace = self._pace
        due = sum(self._validates(number) for number in range(step + 1, step + 2 + self.steps_ahead))
        steps = self.steps_ahead * pace.longest_step
        return steps + due * pace.longest_validation + 2 * pace.longest_save + self._margin

    def is_over(self, step: int) -> bool:
        """Whether the run has to stop now."""
        return self._now() + self.needed(step) > self._end

    def too_short(self, step: int) -> StopRequested:
        """The error of a run that was stopped before it took a step. Another start may be quicker, so that it may be
        requeued; stops without progress are counted there."""
        pace, left = self._pace, self._end - self._began
        return StopRequested(
            f"the allocation is too short: {left:.0f} s of it were left when this process began, and its start took "
            f"{self._now() - self._began:.0f} s; another {self.needed(step):.0f} s are needed for a step and a save: "
            f"{pace.longest_step:.1f} s for a step, twice {pace.longest_save:.1f} s for a save"
            f"{'' if pace.measured_save else ' (an estimate)'}, health.end_margin_seconds = {self._margin:.0f}: "
            "ask for more time (sbatch --time), or lower health.end_margin_seconds"
        )


class Stopping:
    """What this process was asked, and how long what it does takes. wall, switches: of the process that writes the
    run's folder; None: not looked at."""

    def __init__(
        self, signals: StopSignals, pace: Pace, wall: WallTime | None = None, switches: Switches | None = None
    ) -> None:
        self._signals, self._pace, self.wall, self.switches = signals, pace, wall, switches
        self._state = TrainerState()
        self._seconds = 0.0

    def plan(
        self, saver: Saver, mesh: Mesh, clock: WatchedClock, train: TrainSection, validates_every: int, validation: int
    ) -> None:
        """What is known of the run before its first step, and from now on measured: it begins. validation: microbatches
        of one on this rank; 0: there is none.
        """
        self.begins()
        self._state, self._seconds = saver.state, saver.state.seconds
        saver.published, clock.took = self.published, self.took
        step = max(1, train.global_batch_size // (train.micro_batch_size * mesh.data.size))
        self._pace.expect(saver.engine.parameter_count(), mesh.world_size, validation / step)
        if self.wall:
            ends = {stage.end_step for stage in saver.resolved.schedule.stages}
            # A device that works by itself is still at a step when the next decision is made.
            self.wall.plan(
                lambda number: validation > 0 and (number % validates_every == 0 or number in ends),
                steps_ahead=1 if mesh.device.type == "cpu" else 2,
            )

    def begins(self) -> None:
        """From now on a stop is a matter of the loop: what was begun is finished."""
        self._signals.begins()

    def after_step(self, step: Step) -> None:
        """The hook that measures steps, after the one that counts their seconds; before the one that saves, since the
        timer of a stop runs from its decision."""
        if step.stop:
            self._signals.ends()
        seconds, self._seconds = step.state.seconds - self._seconds, step.state.seconds
        if seconds > 0:
            self._pace.step_took(seconds)

    def took(self, name: str, seconds: float) -> None:
        """Time was spent under this name of the loop's clock."""
        if name == "validation":
            self._pace.validation_took(seconds)

    def published(self, seconds: float) -> None:
        """A checkpoint is there, so long after its save began."""
        self._pace.save_took(seconds)
        if self.switches:
            self.switches.served()

    def asked(self) -> tuple[str, ...]:
        """All that it was asked for by now."""
        found = list(self.switches.asked) if self.switches else []
        if self._signals.requested:
            found.append(self._signals.name)
        if self.wall and self.wall.is_over(self._state.step):
            found.append(WALL_TIME)
        return tuple(found)

    def reason(self) -> str:
        """Why it should stop, as far as it knows; empty: it need not."""
        return next((name for name in self.asked() if name != SAVE_NOW), "")

    def at_stop(self, save: Callable[[TrainerState], None]) -> None:
        """The run stops between two steps."""
        self._signals.ends()
        save(self._state)

    def saves_now(self) -> None:
        """The save that save-now asks for begins."""
        if self.switches:
            self.switches.serve(SAVE_NOW)

    def stopped(self) -> None:
        """The run has stopped, and all is saved: nothing is left of what was asked for."""
        for name in self.switches.asked if self.switches else ():
            self.switches.serve(name)  # type: ignore[union-attr]
        if self.switches:
            self.switches.served()

    def too_short(self, step: int) -> StopRequested:
        """The error of a run that the allocation's end stopped before it took a step."""
        if self.wall:
            return self.wall.too_short(step)
        return StopRequested("the allocation is too short for a step and a save: rank 0 says more")


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
