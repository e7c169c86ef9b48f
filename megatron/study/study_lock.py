"""One `study run` at a time in a study's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.config.errors import ConfigError, StorageError
from megatron.launch.living_run import is_alive, own_names

STALE_SECONDS = 120.0
"""After so long without a touch an owner on another host counts as gone."""
_BEAT_SECONDS = 10.0


class StudyLock:
    """While entered, this process owns the study's folder. `beat` keeps that fresh for other hosts.

    The file system's lock decides where it has locks, and ends with the process. Where it has none, or where another
    host does not see it, the owner's words in the file do: host, process, and when it was last touched.
    """

    def __init__(self, folder: Path, what: str = "study run") -> None:
        """what: which command owns it, for messages."""
        self.path = folder / "study.lock"
        self._what = what
        self._file: int | None = None
        self._beaten = 0.0

    def __enter__(self) -> StudyLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be made: {error.strerror}: set study.output elsewhere") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            owner = self._owner()
            self._close()
            raise self._taken(owner) from None
        except OSError:
            locked = False
        owner = self._owner()
        if owner and self._lives(owner, locked):
            self._close()
            raise self._taken(owner)
        words = {"host": own_names()[0], "pid": os.getpid(), "time": time.time(), "what": self._what}
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, (json.dumps(words) + "\n").encode(), 0)
        except OSError as error:
            self._close()
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._beaten = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
        self._close()

    def beat(self) -> None:
        """To be called often: touches the file every few seconds."""
        if self._file is not None and time.monotonic() - self._beaten > _BEAT_SECONDS:
            self._beaten = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _owner(self) -> dict[str, Any]:
        assert self._file is not None
        try:
            owner = json.loads(os.pread(self._file, 4096, 0))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _lives(self, owner: dict[str, Any], locked: bool) -> bool:
        """Whether an owner that left its words there is still at work."""
        if owner.get("host") in own_names():
            return not locked and is_alive(int(owner.get("pid", 0)), float(owner.get("time", 0.0)))
        assert self._file is not None
        return time.time() - os.fstat(self._file).st_mtime < STALE_SECONDS

    def _taken(self, owner: dict[str, Any]) -> ConfigError:
        who = f"{owner.get('what', 'another process')}, pid {owner.get('pid', '?')} on {owner.get('host', '?')}"
        since = owner.get("time")
        when = f", since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}" if since else ""
        words = who if owner else "another process"
        return ConfigError(
            f"{self.path.parent}: {words}{when}, is at work there: wait for it or stop it; one at a time may run a "
            f"study (what a killed one on another host left counts for {STALE_SECONDS:.0f} s)"
        )
