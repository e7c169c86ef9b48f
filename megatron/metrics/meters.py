"""Where a step's time goes, and how fast the run is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class StepClock:
    """Seconds of one step by what they were spent on: "data", "engine", and hooks such as "checkpoint".

    `lap` ends a step. What no name claims is the trainer's own work.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._spent: dict[str, float] = {}

    @contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Counts the time inside under `name`."""
        begin = self._now()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + self._now() - begin

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each is there counts under `name`."""
        iterator = iter(items)
        while True:
            with self.spending(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, by name; "step" is all of it."""
        now = self._now()
        spent = {**self._spent, "step": now - self._start}
        self._start, self._spent = now, {}
        return spent


class Smoothed:
    """A running mean with a memory of about `span` values; None before the first."""

    def __init__(self, span: int = 50) -> None:
        self._keep = 1 - 1 / span
        self.value: float | None = None

    def add(self, value: float) -> float:
        """Takes a value and gives the mean."""
        self.value = value if self.value is None else self._keep * self.value + (1 - self._keep) * value
        return self.value
