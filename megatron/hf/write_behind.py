"""Sends what was written to the disk while more is being written: the last fsync has little left to wait for."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

SYNC_EVERY = 128 * 10**6


class WriteBehind:
    """A thread that calls fdatasync on files of which a good deal was written since. For a `with` block.

    failed: told an OSError of a fdatasync; later ones of the same file may say nothing of it.
    """

    def __init__(self, failed: Callable[[OSError], None]) -> None:
        self._failed = failed
        self._written: dict[int, int] = {}
        self._lock = threading.Lock()
        self._files: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="write behind", daemon=True)

    def __enter__(self) -> WriteBehind:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._files.put(None)
        self._thread.join()

    def wrote(self, descriptor: int, size: int) -> None:
        """Notes bytes that were written; never waits for the disk."""
        with self._lock:
            total = self._written.get(descriptor, 0) + size
            self._written[descriptor] = 0 if total >= SYNC_EVERY else total
        if total >= SYNC_EVERY:
            self._files.put(os.dup(descriptor))  # the file may be done and closed before its turn comes

    def _run(self) -> None:
        while (descriptor := self._files.get()) is not None:
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                self._failed(error)
            finally:
                os.close(descriptor)
