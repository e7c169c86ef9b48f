"""Signals, with real processes: the first asks, the second ends, a launcher's echo is not a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import hashlib, signal, sys, time
from megatron.trainer.signals import HANDLED, StopSignals

for name in HANDLED:  # whatever this test's process was left with by others before it
    signal.signal(signal.Signals[name], signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])

def at_once(number):
    print("at once", number, flush=True)

def leave(name):
    print("leaves at", name, flush=True)

mode = sys.argv[1]
late = {"seconds": 1, "too_late": lambda: print("too late", flush=True)} if mode in ("late", "by others") else {}
if mode == "hangs":
    late = {"seconds": 1, "too_late": lambda: time.sleep(600)}
    import megatron.trainer.signals as module
    module.LAST_WORDS_SECONDS = 0.5
if mode == "starting":
    late = {"before_training": leave}
with StopSignals(at_once, ["SIGUSR2"] if mode == "one" else HANDLED, **late) as stop:
    if mode == "children":
        import subprocess, threading
        child = subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(600)"])
        worker = threading.Thread(target=time.sleep, args=(600,), daemon=True)
        worker.start()
        time.sleep(0.5)
    print("ready", flush=True)
    if mode == "starting":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    if mode == "by others":
        stop.ends()
        time.sleep(600)
    while not stop.requested:
        time.sleep(0.005)
    print("asked by", stop.name, flush=True)
    if mode in ("late", "hangs"):
        time.sleep(600)
    if mode == "children":
        print("child ended with", child.poll(), flush=True)
        child.kill()
        child.wait()
    if mode == "busy":
        # like a long kernel: releases the interpreter's lock, but the main thread runs no signal handler meanwhile
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    if mode in ("wait", "linger-in"):
        time.sleep(0.5 if mode == "wait" else 2.5)
print("left", flush=True)
if mode == "linger":
    time.sleep(0.5)
"""


def start(mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert line_of(process) == ("child" if mode == "children" else "ready")
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
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
        time.sleep(1)
        process.send_signal(number)
        assert line_of(process) == f"at once {int(number)}"
        assert process.wait(30) == 128 + number
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.timeout(60)
def test_slurm_sends_sigterm_twice_and_asks_once() -> None:
    process = start("wait")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "asked by SIGTERM"
    assert line_of(process) == "left"
    assert process.wait(30) == 0


@pytest.mark.timeout(60)
def test_sigterm_after_a_schedulers_warning_leaves_the_save_its_time() -> None:
    process = start("linger-in")
    process.send_signal(signal.SIGUSR1)
    assert line_of(process) == "asked by SIGUSR1"
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert line_of(process) == "left"
    assert process.wait(30) == 0


@pytest.mark.timeout(60)
def test_another_sigterm_after_a_warning_and_the_first_ends_at_once() -> None:
    process = start("busy")
    try:
        process.send_signal(signal.SIGUSR2)
        assert line_of(process) == "asked by SIGUSR2"
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert line_of(process) == f"at once {int(signal.SIGTERM)}"
        assert process.wait(30) == 128 + signal.SIGTERM
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


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mode", ["late", "by others", "hangs"])
def test_a_stop_that_does_not_come_to_its_end_is_ended_by_the_timer(mode: str) -> None:
    process = start(mode)
    try:
        if mode != "by others":
            process.send_signal(signal.SIGUSR1)
            assert line_of(process) == "asked by SIGUSR1"
        assert line_of(process) == ("" if mode == "hangs" else "too late"), "its last words may hang, and it ends"
        assert process.wait(30) == 9
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.timeout(60)
def test_before_training_one_signal_ends_even_a_busy_main_thread() -> None:
    process = start("starting")
    try:
        process.send_signal(signal.SIGTERM)
        assert line_of(process) == "leaves at SIGTERM"
        assert process.wait(30) == 75
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.timeout(60)
def test_only_the_signals_that_were_named_are_handled() -> None:
    process = start("one")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == -signal.SIGUSR1
    process = start("one")
    process.send_signal(signal.SIGUSR2)
    assert line_of(process) == "asked by SIGUSR2" and process.wait(30) == 0


@pytest.mark.timeout(60)
def test_a_signal_to_the_whole_group_is_for_the_run_alone() -> None:
    process = start("children")
    assert line_of(process) == "ready"
    os.killpg(process.pid, signal.SIGTERM)
    assert line_of(process) == "asked by SIGTERM"
    assert line_of(process) == "child ended with None", "what the run started is deaf, and the run's to end"
    assert line_of(process) == "left" and process.wait(30) == 0


def test_handlers_are_given_back() -> None:
    from megatron.trainer.signals import StopSignals

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignals(lambda _: None) as stop:
        assert not stop.requested and stop.name == ""
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "and none is blocked"
