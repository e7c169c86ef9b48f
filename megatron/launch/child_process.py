"""Commands of ours as processes that a study runs side by side: their words, their logs, and their end with its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron.launch.side_process import side_environment, stagemix

_BEGINS = [sys.executable, "-S", "-E", str(Path(__file__).with_name("exec_with_starter.py"))]
_TORCHRUN = (
    *("--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2", "--shutdown-timeout", "600"),
    *("--no-python", "--nproc-per-node"),
)


class ChildProcess:
    """A command in a session of its own, so that Ctrl-C reaches it by way of who started it alone, who passes it on.

    Where that one is killed, the child gets SIGTERM (Linux): a run then saves and stops, and nothing trains unseen. The
    thread that starts children must live as long as they do: the kernel watches the thread.
    """

    def __init__(
        self, words: Sequence[str], log: Path, threads: int, processes: int = 1, device: str | None = None
    ) -> None:
        """words: of `stagemix …`. log: its output is added there. threads: of a process's arithmetic. processes: more
        than one are started by torchrun. device: the accelerator that it sees, as CUDA_VISIBLE_DEVICES says it; None:
        what this process sees. OSError."""
        self.log = log
        environment = side_environment(Path(tempfile.gettempdir()), threads)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        line = [*stagemix(words[0]), *words[1:]]
        if processes > 1:
            line = [sys.executable, "-P", "-m", "torch.distributed.run", *_TORCHRUN, str(processes), *line]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as told:
            told.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} stagemix {' '.join(words)}\n".encode())
            told.flush()
            self.begin = told.tell()
            self._process = subprocess.Popen(
                [*_BEGINS, str(os.getpid()), *line],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.started = time.time()
        self.monotonic = time.monotonic()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, 128 + the signal's number of one that a signal ended; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, seconds: float) -> int | None:
        """The same, at most so long waited for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.poll()

    def send(self, number: int) -> None:
        """A signal to the process, not to what it started: a run decides itself what that means for its evaluations."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """The process and its session are gone afterwards."""
        if self._process.poll() is None:  # not waited for yet, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def last_lines(self, count: int = 8) -> list[str]:
        """Of what it has said since it was started; of a progress bar its last state alone."""
        return last_lines(self.log, count, self.begin)


def last_lines(log: Path, count: int = 8, begin: int = 0) -> list[str]:
    """The last lines of a log from a place on, but blank ones; of a progress bar its last state alone."""
    try:
        with open(log, "rb") as file:
            file.seek(max(begin, file.seek(0, os.SEEK_END) - 16_384))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-count:]


def accelerators() -> list[str]:
    """The accelerators that this process may use, each as CUDA_VISIBLE_DEVICES names it; [] where there is none. Found
    without asking a driver."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name.strip() for name in said.split(",") if name.strip() and name.strip() != "-1"]
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((number for number in numbers if number.isdigit()), key=int)
