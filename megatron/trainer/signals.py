"""A signal asks the run to finish its step, save and stop; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 1.0
"""A launcher that hears Ctrl-C as well passes it on as SIGTERM at once: another signal so soon is the same request."""


class StopSignals:
    """While entered, turns signals into a request. `at_once(signal number)` is called at the second, then the process
    ends with 128 + that number. Left after a request, it leaves the signals ignored; without one, as they were.

    A thread of its own reads the signals, so that the second one ends the process even while the main thread is deep
    in a long kernel or in a write that hangs.
    """

    def __init__(self, at_once: Callable[[int], None]) -> None:
        self._at_once = at_once
        self._first: int | None = None
        self._first_time = 0.0
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @property
    def name(self) -> str:
        """The first signal's name, "SIGTERM"; empty where none has come."""
        return "" if self._first is None else signal.Signals(self._first).name

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in HANDLED:
            self._before[number] = signal.signal(number, _noted)
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # After a stop all is saved and the process is ending: a late echo must not turn its exit code into 143.
            signal.signal(number, signal.SIG_IGN if self.requested else handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        while data := os.read(self._read, 64):
            for number in data:
                if number in HANDLED:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._first_time = number, now
        elif number == self._first or now - self._first_time > SAME_REQUEST_SECONDS:
            try:
                self._at_once(number)
            finally:
                os._exit(128 + number)


def _noted(number: int, frame: FrameType | None) -> None:
    """The signal's number is already in the pipe: Python writes it there before this runs."""
