"""Locks on the folder of parts: the kernel gives them up when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.config.errors import StorageError
from megatron.preprocessing.storage import storage_errors


class FolderLock:
    """A lock file that is held, shared among several processes or by one alone."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def try_alone(self) -> bool:
        """Make the lock exclusive, if no one else holds it; else it is as it was."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # the kernel gives the old lock up when it cannot convert it
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            return False
        return True

    def share(self) -> None:
        """Let others share the lock again."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)


@contextmanager
def locked(path: Path, *, shared: bool, patience: float = 0.0) -> Iterator[FolderLock | None]:
    """Holds the lock file; gives None where another process still holds it after `patience` seconds."""
    deadline = time.monotonic() + patience
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    while (descriptor := _attempt(path, mode)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if descriptor is None:
        yield None
        return
    try:
        yield FolderLock(path, descriptor)
    finally:
        os.close(descriptor)


def _attempt(path: Path, mode: int) -> int | None:
    while True:
        with storage_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the folder was removed in between
            continue
        try:
            fcntl.flock(descriptor, mode)
            # A process that finished meanwhile has removed this very file: its lock protects nothing any more.
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:  # some network file systems are mounted without locks
            os.close(descriptor)
            raise StorageError(
                f"{path}: the file system gives no locks ({error.strerror}): mount it with flock, or put the output on "
                "another one"
            ) from None
        os.close(descriptor)
