"""Signals, with real processes: the first asks, the second ends, a launcher's echo is not a second."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, sys, time
from megatron.trainer.signals import StopSignals

def at_once(number):
    print("at once", number, flush=True)

with StopSignals(at_once) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.005)
    print("asked by", stop.name, flush=True)
    if sys.argv[1] == "busy":
        # like a long kernel: releases the interpreter's lock, but the main thread runs no signal handler meanwhile
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    if sys.argv[1] == "wait":
        time.sleep(0.5)
print("left", flush=True)
if sys.argv[1] == "linger":
    time.sleep(0.5)
"""


def start(mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, mode], stdout=subprocess.PIPE, text=True)
    assert line_of(process) == "ready"
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_asks_and_the_program_goes_on(number: signal.Signals) -> None:
    process = start("end")
    process.send_signal(number)
    assert line_of(process) == f"asked by {number.name}"
    assert line_of(process) == "left"
    assert process.wait(30) == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ends_at_once_even_a_busy_main_thread(number: signal.Signals) -> None:
    process = start("busy")
    try:
        process.send_signal(number)
        assert line_of(process) == f"asked by {number.name}"
        process.send_signal(number)
        assert line_of(process) == f"at once {int(number)}"
        assert process.wait(30) == 128 + number
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.timeout(60)
def test_an_echo_by_a_launcher_is_the_same_request() -> None:
    process = start("wait")
    process.send_signal(signal.SIGINT)
    assert line_of(process) == "asked by SIGINT"
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "left"
    assert process.wait(30) == 0


@pytest.mark.timeout(60)
def test_an_echo_while_the_process_ends_changes_no_exit_code() -> None:
    process = start("linger")
    process.send_signal(signal.SIGINT)
    assert line_of(process) == "asked by SIGINT" and line_of(process) == "left"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_handlers_are_given_back() -> None:
    from megatron.trainer.signals import StopSignals

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignals(lambda _: None) as stop:
        assert not stop.requested and stop.name == ""
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
