"""What a process does at the moment, and the thread that tells others of it while it does it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron.launch.attempts import Heartbeat, write_heartbeat


class Pulse:
    """What a process does, noted by its main thread and read by others."""

    def __init__(self) -> None:
        self._now = ("starting", time.time())

    def at(self, phase: str) -> None:
        """Begins a phase."""
        if phase != self._now[0]:
            self._now = (phase, time.time())

    @property
    def now(self) -> tuple[str, float]:
        """The phase, and the unix time at which it began."""
        return self._now

    @property
    def seconds(self) -> float:
        """How long it has taken by now."""
        return time.time() - self._now[1]


class Heart:
    """A thread that replaces OUTPUT/heartbeat.json every `seconds`, also while a save or a compilation runs, and looks
    once a second at what people ask for. A disk that takes no heartbeat is named once, and never ends training."""

    def __init__(
        self,
        folder: Path,
        seconds: float,
        beat: Callable[[], Heartbeat],
        look: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._seconds, self._beat, self._look, self._say = folder, seconds, beat, look, say
        self._end = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def begin(self) -> None:
        """Starts beating."""
        self._thread.start()

    def end(self) -> None:
        """The last beat; waits for it a little, and not for a disk that hangs."""
        self._end.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5)

    def _run(self) -> None:
        due = 0.0
        while not self._end.is_set():
            self._look()
            if time.monotonic() >= due:
                due = time.monotonic() + self._seconds
                self._write()
            self._end.wait(1.0)
        self._write()

    def _write(self) -> None:
        try:
            write_heartbeat(self._folder, self._beat())
        except OSError as error:
            if not self._failing:
                self._failing = True
                with contextlib.suppress(OSError):
                    self._say(
                        f"note: {self._folder / 'heartbeat.json'} is not written: {error.strerror}; training goes on"
                    )
        else:
            self._failing = False
