"""Signals that ask a study to stop: heard, kept, and asked about."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_SECONDS = 1.0
"""A launcher that hears Ctrl-C as well passes it on at once: another signal so soon is the same request."""


class StopAsked:
    """While entered, hears the signals, but those that were ignored before (nohup, a shell's background). Main thread.

    count: how often it was asked, signals that come together being one. name: of the first, "SIGTERM"; "" before.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self._last = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopAsked:
        for number in HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.count or now - self._last > SAME_REQUEST_SECONDS:
            self.count += 1
            self._last = now
        self.name = self.name or signal.Signals(number).name
