"""A signal asks the run to finish its step, save and stop; a second one, or a timer, ends it at once."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

from megatron.config.errors import EXIT_REQUEUE, EXIT_WATCHDOG

HANDLED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
SAME_REQUEST_SECONDS = 1.0
"""A launcher that hears Ctrl-C as well passes it on as SIGTERM at once: another signal so soon is the same request."""
SAME_SIGNAL_SECONDS = 0.5
"""At a job's time limit, and by scancel --full, SLURM sends each process SIGTERM twice within milliseconds (seen on
22.05): the same signal again so soon is the same request, too."""
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
LAST_WORDS_SECONDS = 20.0
"""For the record of an end by force: a disk that hangs must not hold the process."""


class StopSignals:
    """While entered, turns signals into a request. `at_once(signal number)` is called at the second, then the process
    ends with 128 + that number. Left after a request, it leaves the signals ignored; without one, as they were.

    A thread of its own hears the signals, and no other: it ends the process even while the main thread is deep in a
    long kernel or in a write that hangs, and what the main thread starts meanwhile, threads and processes (loaders,
    compilers, evaluations), is deaf to them, so that a signal to the whole job leaves them to the run.
    """

    def __init__(
        self,
        at_once: Callable[[int], None],
        names: Sequence[str] = HANDLED,
        seconds: float = 0,
        too_late: Callable[[], None] = lambda: None,
        before_training: Callable[[str], None] | None = None,
    ) -> None:
        """names: of the signals. seconds: from the request, or `ends`, until `too_late` is called and the process ends
        with 9; 0: never. before_training: called with the name at a signal that comes before `begins`, where nothing
        has to be finished or saved; the process then ends with 75. All three in the thread, which waits for them
        LAST_WORDS_SECONDS at most.
        """
        self._numbers = [signal.Signals[name] for name in dict.fromkeys(names)]
        self._at_once, self._too_late, self._before_training = at_once, too_late, before_training
        self._seconds = seconds
        self._end_by: float | None = None
        self._first: int | None = None
        self._asked = (0, 0.0)
        self._before: dict[int, object] = {}
        self._changing = threading.Lock()

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @property
    def name(self) -> str:
        """The first signal's name, "SIGTERM"; empty where none has come."""
        return "" if self._first is None else signal.Signals(self._first).name

    def begins(self) -> None:
        """Training begins: from now on a step is finished and the run saved before it stops. A signal that came before
        ends the process here."""
        with self._changing:
            self._before_training = None

    def ends(self) -> None:
        """The run stops for another reason than a signal to this process: the timer runs from now on."""
        if self._seconds and self._end_by is None:
            self._end_by = time.monotonic() + self._seconds
            os.write(self._write, b"\0")  # wakes the thread

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._numbers:
            self._before[number] = signal.signal(number, _noted)
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # After a stop all is saved and the process is ending: a late echo must not turn its exit code into 143.
            signal.signal(number, signal.SIG_IGN if self.requested else handler)  # type: ignore[arg-type]
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while True:
            left = None if self._end_by is None else max(0.0, self._end_by - time.monotonic())
            if not poll.poll(None if left is None else 1000 * left):
                _in_time(self._too_late)
                os._exit(EXIT_WATCHDOG)
            data = os.read(self._read, 64)
            if not data:
                return
            for number in data:
                if number in self._numbers:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            with self._changing:
                self._first, self._asked = number, (number, now)
                if (leave := self._before_training) is not None:
                    _in_time(lambda: leave(self.name))
                    os._exit(EXIT_REQUEUE)
            if self._seconds and self._end_by is None:
                self._end_by = now + self._seconds
        elif self._is_second(number, now):
            _in_time(lambda: self._at_once(number))
            os._exit(128 + number)

    def _is_second(self, number: int, now: float) -> bool:
        """Whether a signal after the first is another request, to end at once."""
        before, when = self._asked
        if number == signal.SIGTERM and before in _WARNINGS:
            # A scheduler that warned (sbatch --signal) says SIGTERM when the time is over: a save may still fit into
            # what it then grants (SLURM's KillWait), and SIGKILL ends it otherwise.
            self._asked = number, now
            return False
        return now - when > (SAME_SIGNAL_SECONDS if number == before else SAME_REQUEST_SECONDS)


def _in_time(last_words: Callable[[], None]) -> None:
    """Says them; returns when that takes too long, or goes wrong."""
    thread = threading.Thread(target=last_words, name="last-words", daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SECONDS)


def _noted(number: int, frame: FrameType | None) -> None:
    """The signal's number is already in the pipe: Python writes it there before this runs."""
