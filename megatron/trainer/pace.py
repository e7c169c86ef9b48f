"""How long steps, saves and validations take, for whoever asks whether the time that is left is enough."""

from __future__ import annotations

from collections import deque
from statistics import median

RECENT_STEPS = 20
RECENT_SAVES = 10
SAVE_BYTES_PER_SECOND = 100e6
"""What a process is expected to write of a checkpoint before a save was measured."""
SAVE_SECONDS = 5.0
"""And what a save takes besides."""
CHECKPOINT_BYTES = 12
"""Of a parameter: float32 weight and both moments."""


class Pace:
    """Seconds of recent steps, saves and validations of a process.

    Before the first of them a save is expected to take SAVE_SECONDS and what this process's share of the checkpoint
    takes at SAVE_BYTES_PER_SECOND, or what the attempt before measured if that was longer; a validation as long as the
    training steps that it is worth; a step, what the attempt before measured.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._saves: deque[float] = deque(maxlen=RECENT_SAVES)
        self._validations: deque[float] = deque(maxlen=RECENT_SAVES)
        self._expected_step = 0.0
        self._expected_save = SAVE_SECONDS
        self._validation_steps = 1.0

    def expect(self, parameters: int, processes: int, validation_steps: float) -> None:
        """validation_steps: training steps that have as many samples as a validation."""
        share = CHECKPOINT_BYTES * parameters / processes
        self._expected_save = max(self._expected_save, SAVE_SECONDS + share / SAVE_BYTES_PER_SECOND)
        self._validation_steps = validation_steps

    def measured_before(self, step_seconds: float | None, save_seconds: float | None) -> None:
        """What the attempt before this one measured."""
        self._expected_step = max(self._expected_step, step_seconds or 0.0)
        self._expected_save = max(self._expected_save, save_seconds or 0.0)

    def step_took(self, seconds: float) -> None:
        """A step with all that belongs to it, but no save and no validation."""
        self._steps.append(seconds)

    def save_took(self, seconds: float) -> None:
        """A save, from its beginning until it was published."""
        self._saves.append(seconds)

    def validation_took(self, seconds: float) -> None:
        """A validation."""
        self._validations.append(seconds)

    @property
    def longest_step(self) -> float:
        """Of the last RECENT_STEPS."""
        return max(self._steps, default=self._expected_step)

    @property
    def median_step(self) -> float | None:
        """Of the last RECENT_STEPS; None before the first."""
        return median(self._steps) if self._steps else None

    @property
    def measured_save(self) -> float | None:
        """The longest of the last RECENT_SAVES; None before the first."""
        return max(self._saves, default=None)

    @property
    def longest_save(self) -> float:
        """The same, or what is expected."""
        return max(self._saves, default=self._expected_save)

    @property
    def longest_validation(self) -> float:
        """Of the last RECENT_SAVES, or what is expected."""
        return max(self._validations, default=self._validation_steps * self.longest_step)
