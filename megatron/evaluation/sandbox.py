"""Untrusted programs, run one by one in a child that can compute and nothing else (sandbox_child.py says how).

Without the kernel's system call filter nothing is run at all: limits alone keep no program from the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron.config.errors import UnavailableError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MOST_ANSWER = 4096
WALLS = ("seccomp", "namespaces")
# a busy machine may take this many times the processor time before a program counts as hanging
_WALL_CLOCK = 4.0


@dataclass(frozen=True)
class SandboxLimits:
    """Of one program. `seconds`: processor time; wall-clock time is four times that. `memory`: bytes of addresses."""

    seconds: int = 5
    memory: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """Whether the tests ended, and why not: "AssertionError: …", "time limit", "killed by SIGSEGV", …"""

    passed: bool
    reason: str


def require_sandbox() -> list[str]:
    """The names of the walls that stand here: limits, seccomp and, where granted, namespaces.

    Raises UnavailableError where the kernel filters no system calls: then no program is run.
    """
    answer = _ask({"program": "", "tests": "", "report": True}, SandboxLimits(), WALLS)[0]
    with contextlib.suppress(ValueError):
        told = json.loads(answer)
        if isinstance(told, dict) and "walls" in told:
            return [str(wall) for wall in told["walls"]]
        if isinstance(told, dict) and "refused" in told:
            answer = str(told["refused"]).encode()
    raise UnavailableError(
        f"programs of a model cannot be run here: {answer.decode('utf-8', 'replace') or 'the sandbox did not start'}. "
        "Walls against them need Linux on x86_64 or aarch64 with seccomp: evaluate the code tasks on such a machine, "
        "or leave them out with --tasks"
    )


def run_program(
    program: str, tests: str, limits: SandboxLimits = SandboxLimits(), walls: Sequence[str] = WALLS
) -> Outcome:
    """Runs `program`, then `tests` in the same module. Passed: both came to their end within the limits."""
    token = secrets.token_hex(16).encode()
    answer, code, late = _ask({"program": program, "tests": tests}, limits, walls, token)
    if answer == token:
        return Outcome(True, "")
    if late:
        return Outcome(False, "time limit")
    if len(answer) > _MOST_ANSWER:
        return Outcome(False, "wrote where only its result is told")
    with contextlib.suppress(ValueError):
        told = json.loads(answer)
        if isinstance(told, dict) and isinstance(told.get("error"), str):
            return Outcome(False, told["error"])
        if isinstance(told, dict) and "refused" in told:
            raise UnavailableError(f"the sandbox could not be built: {told['refused']}")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(False, "time limit")
    if code < 0:
        return Outcome(False, f"killed by {signal.Signals(-code).name}")
    return Outcome(False, "ended before its tests did")


def run_programs(
    programs: Sequence[tuple[str, str]], limits: SandboxLimits = SandboxLimits(), jobs: int = 1
) -> list[Outcome]:
    """`run_program` of every (program, tests), `jobs` at a time, in their order."""
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(lambda pair: run_program(pair[0], pair[1], limits), programs))


def _ask(
    request: dict[str, object], limits: SandboxLimits, walls: Sequence[str], token: bytes = b""
) -> tuple[bytes, int, bool]:
    """(what the child answered, its exit code, whether it was stopped for its time). The child is gone afterwards."""
    content = json.dumps({**request, "seconds": limits.seconds, "memory": limits.memory, "walls": list(walls)}).encode()
    with tempfile.TemporaryDirectory(prefix="stagemix-sandbox-") as scratch:
        answer, child_answer = os.pipe()
        child_token, hand_token = os.pipe()
        os.write(hand_token, token)
        os.close(hand_token)
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_CHILD), str(child_answer), str(child_token)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(child_answer, child_token),
                cwd=scratch,
                env={},
                start_new_session=True,
            )
        finally:
            os.close(child_answer)
            os.close(child_token)
        assert child.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(content)
                child.stdin.close()
            said, late = _listen(answer, time.monotonic() + _WALL_CLOCK * limits.seconds)
        finally:
            os.close(answer)
            # until wait() the child's number is its own, so this ends no stranger
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            code = child.wait()
        return said, code, late


def _listen(answer: int, until: float) -> tuple[bytes, bool]:
    """What comes until the child has closed its end, or has said too much, or is late."""
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(answer, selectors.EVENT_READ)
        while len(said) <= _MOST_ANSWER:
            if not selector.select(max(0.0, until - time.monotonic())):
                return said, True
            more = os.read(answer, _MOST_ANSWER + 1)
            if not more:
                return said, False
            said += more
    return said, False
