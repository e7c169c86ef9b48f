"""The table [health]: how a run is stopped in time, and how it notices that a process of it is lost or hangs."""

from __future__ import annotations

import signal
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron.config.section import Section

_CANNOT_BE_HANDLED = ("SIGKILL", "SIGSTOP")
_MEAN_A_FAULT = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGIOT", "SIGTRAP", "SIGSYS", "SIGSTKFLT")
_NO_REQUEST = ("SIGCHLD", "SIGCLD", "SIGPIPE", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGWINCH", "SIGPROF")
_TIMERS = ("SIGALRM", "SIGVTALRM")


def stop_signal_of(words: Any) -> str:
    """A signal by its name, "SIGUSR1" of "USR1" or "sigusr1". Raises ValueError for what cannot ask for a stop."""
    name = words.strip().upper() if isinstance(words, str) else ""
    name = name if name.startswith("SIG") else f"SIG{name}"
    known = [number.name for number in signal.Signals]
    if name not in known:
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f'{words!r} is no signal of this system: name it as in "SIGUSR1"{hint}')
    if name in _CANNOT_BE_HANDLED:
        raise ValueError(f"{name} cannot be handled by any process: name another, for example SIGTERM")
    if name in _MEAN_A_FAULT:
        raise ValueError(f"{name} says that the process has gone wrong: nothing could be saved; name another")
    if name in (*_NO_REQUEST, *_TIMERS):
        raise ValueError(f"{name} comes by itself and asks for nothing: name another, for example SIGUSR1")
    return name


StopSignal = Annotated[str, BeforeValidator(stop_signal_of)]


class HealthSection(Section):
    """How a run is stopped in time, and how a job of several processes notices that one of them is lost or hangs."""

    watchdog_seconds: int = Field(1800, ge=0, description="without any progress until the job ends; 0: never")
    start_seconds: int = Field(600, ge=1, description="for all processes to find each other and for any collective")
    stop_signals: list[StopSignal] = Field(
        default_factory=lambda: ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"],
        max_length=16,
        description="that ask the run to finish its step, save and stop; a second one ends it at once",
    )
    stop_seconds: int = Field(
        1800, ge=0, description="from a request to stop until the job ends by force, where a save hangs, say; 0: never"
    )
    end_margin_seconds: int = Field(
        60, ge=0, description="kept free before the allocation's end, for the run to be saved and to leave"
    )
    heartbeat_seconds: int = Field(10, ge=1, description="between two writes of heartbeat.json")
