"""One start of a run as a scheduler starts it: several real processes, signals to any of them, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from kills.recorder import Noted, Recorder, install, recorder_path
from rank_jobs import RankJob, start_ranks
from tiny_run import ROOT


class Attempt:
    """Ranks of one start. signals: what each was sent, in order."""

    by = "as srun starts it"

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.began = time.monotonic()
        self.signals: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
        self.stopped: set[int] = set()
        self._sessions: set[int] = set()

    def pid(self, rank: int) -> int | None:
        """The process of a rank; None where it is not known (yet)."""
        raise NotImplementedError

    def code(self, rank: int) -> int | None:
        """A rank's exit code; minus the signal that ended it; None while it lives."""
        raise NotImplementedError

    def text(self) -> str:
        """All that was printed."""
        raise NotImplementedError

    def noted(self, rank: int) -> Noted | None:
        """What a rank did last, where it is known."""
        return None

    def end(self) -> None:
        """Ends for certain what still runs."""
        raise NotImplementedError

    @property
    def codes(self) -> list[int | None]:
        """By rank."""
        return [self.code(rank) for rank in range(self.ranks)]

    @property
    def alive(self) -> list[int]:
        """The ranks that live."""
        return [rank for rank, code in enumerate(self.codes) if code is None]

    def send(self, rank: int, number: int) -> None:
        """A signal to one rank, where it still lives."""
        pid = self.pid(rank)
        if pid is None or self.code(rank) is not None:
            return
        self.signals[rank].append(number)
        if number == signal.SIGSTOP:
            self.stopped.add(rank)
        if number in (signal.SIGCONT, signal.SIGKILL):
            self.stopped.discard(rank)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def leftovers(self) -> list[int]:
        """Processes of the attempt that live after its end: those of the sessions that its ranks led."""
        return sorted(pid for pid in _processes() if _session(pid) in self._sessions)


class Forked(Attempt):
    """Ranks forked from the server of `ranks`, which has torch loaded; each leads a session."""

    def __init__(self, ranks: int, config: Path, words: Sequence[str], folder: Path, slow: float) -> None:
        super().__init__(ranks)
        folder.mkdir()
        self._recorders = [Recorder(recorder_path(folder, rank), new=True) for rank in range(ranks)]
        self._job: RankJob = start_ranks(ranks, config, *words, fault=partial(install, folder, slow))
        self._sessions = {process.pid for process in self._job.processes}

    def pid(self, rank: int) -> int | None:
        """The process."""
        pid: int = self._job.processes[rank].pid
        return pid

    def code(self, rank: int) -> int | None:
        """Its exit code."""
        code: int | None = self._job.processes[rank].exitcode
        return code

    def text(self) -> str:
        """The logs of all ranks."""
        return self._job.text()

    def noted(self, rank: int) -> Noted | None:
        """From its mapped file."""
        return self._recorders[rank].noted()

    def end(self) -> None:
        """SIGKILL."""
        self._job.kill()


class Torchrun(Attempt):
    """torchrun and its workers, of which it alone knows the exit codes: where it has gone, so have they."""

    by = "torchrun"

    def __init__(self, ranks: int, config: Path, words: Sequence[str]) -> None:
        super().__init__(ranks)
        self._log = config.with_name(f"torchrun-{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2", "--shutdown-timeout", "60"]
        command += [str(ROOT / "tools" / "train.py"), str(config), *words]
        with open(self._log, "w") as log:
            self._agent = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._pids: dict[int, int] = {}
        self._sessions = {self._agent.pid}

    def pid(self, rank: int) -> int | None:
        """A worker, found by its parent and the variable RANK."""
        if rank not in self._pids:
            for pid in _processes():
                found = _rank_of(pid) if _parent(pid) == self._agent.pid else None
                if found is not None:
                    self._pids[found] = pid
                    self._sessions.add(pid)
        return self._pids.get(rank)

    def code(self, rank: int) -> int | None:
        """None while it lives; else torchrun's code, or 0 before it has ended itself."""
        if self._agent.poll() is None:
            return None
        pid = self._pids.get(rank)
        return None if pid is not None and _is_alive(pid) else self._agent.returncode

    def text(self) -> str:
        """What torchrun and its workers printed."""
        return self._log.read_text()

    def end(self) -> None:
        """SIGKILL to torchrun and its workers."""
        for pid in [self._agent.pid, *self._pids.values(), *self.leftovers()]:
            if _is_alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._agent.wait(30)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _fields(pid: int) -> list[str]:
    """State, parent, process group, session, … of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_alive(pid: int) -> bool:
    return _fields(pid)[:1] not in ([], ["Z"])


def _parent(pid: int) -> int:
    return int((_fields(pid) or ["", "0"])[1])


def _session(pid: int) -> int:
    fields = _fields(pid)
    return int(fields[3]) if fields and fields[0] != "Z" else 0


def _rank_of(pid: int) -> int | None:
    try:
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                return int(word[5:])
    except OSError:
        pass
    return None
