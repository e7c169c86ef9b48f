"""The table [health]: which signals ask for a stop."""

from __future__ import annotations

import signal

import pytest
from pydantic import ValidationError

from megatron.config.schema import HealthSection


def test_signals_by_their_names_however_they_are_written() -> None:
    assert HealthSection().stop_signals == ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
    section = HealthSection.model_validate({"stop_signals": ["USR1", "sigusr2", " SIGXCPU", "hup"]})
    assert section.stop_signals == ["SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"]
    assert HealthSection.model_validate({"stop_signals": []}).stop_signals == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGKILL", "cannot be handled"),
        ("STOP", "cannot be handled"),
        ("SIGSEGV", "gone wrong"),
        ("SIGABRT", "gone wrong"),
        ("SIGCHLD", "comes by itself"),
        ("SIGCONT", "comes by itself"),
        ("SIGUSR3", "did you mean SIGUSR"),
        ("SIGTREM", "did you mean SIGTERM"),
        ("", "no signal"),
        (15, "no signal"),
        (None, "no signal"),
    ],
)
def test_what_cannot_ask_for_a_stop_is_refused_with_its_reason(name: object, words: str) -> None:
    with pytest.raises(ValidationError) as error:
        HealthSection.model_validate({"stop_signals": [name]})
    assert words in str(error.value)


def test_every_signal_that_is_taken_can_be_handled() -> None:
    taken = []
    for number in signal.Signals:
        try:
            taken += HealthSection.model_validate({"stop_signals": [number.name]}).stop_signals
        except ValidationError:
            continue
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGRTMIN"} <= set(taken)
    for name in taken:
        before = signal.signal(signal.Signals[name], signal.SIG_IGN)
        signal.signal(signal.Signals[name], before)
