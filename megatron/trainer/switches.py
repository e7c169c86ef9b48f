"""The files OUTPUT/save-now and OUTPUT/stop-now, by which a person asks a run for a checkpoint, or to stop."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from megatron.launch.attempts import SAVE_NOW, STOP_NOW

NAMES = (STOP_NOW, SAVE_NOW)


class Switches:
    """Looked at by a thread of the process that writes the run's folder, so that training never waits for a file
    system; served by its main thread.

    A file that cannot be removed would be obeyed at every step: it is named, and not obeyed again while it is the same.
    A folder of that name is named, and never obeyed. say: hears that.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._lock = threading.Lock()
        self._seen: frozenset[str] = frozenset()
        self._taken: set[str] = set()
        self._serving: set[str] = set()
        self._ignored: dict[str, tuple[int, int]] = {}
        self._unseen: set[str] = set()

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of the files that are there, and not yet being served."""
        return tuple(name for name in NAMES if name in self._seen | self._taken)

    def look(self) -> None:
        """Looks whether the files are there."""
        with self._lock:
            there = frozenset(name for name in NAMES if name not in self._serving and self._is_there(name))
            self._seen = there

    def at_start(self) -> None:
        """A stop-now that an earlier attempt left is obeyed where it can be removed; else each start would end here."""
        self.look()
        with self._lock:
            if STOP_NOW in self._seen and self._remove(STOP_NOW):
                self._taken.add(STOP_NOW)
            self._seen -= {STOP_NOW}

    def serve(self, name: str) -> None:
        """What the file asks for is being done."""
        with self._lock:
            self._serving.add(name)
            self._taken.discard(name)
            self._seen -= {name}

    def served(self) -> None:
        """What is being served is done: the files are removed."""
        if not self._serving:
            return
        with self._lock:
            for name in self._serving:
                self._remove(name)
            self._serving.clear()

    def _is_there(self, name: str) -> bool:
        path = self._folder / name
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            self._ignored.pop(name, None)
            return False
        except OSError as error:
            if name not in self._unseen:
                self._unseen.add(name)
                self._say(f"note: {path} cannot be looked for: {error.strerror}")
            return False
        if self._ignored.get(name) == _identity(found):
            return False
        if stat.S_ISDIR(found.st_mode):
            self._ignored[name] = _identity(found)
            self._say(f"note: {path} is a folder, and not obeyed: remove it, and make a file (touch {path})")
            return False
        return True

    def _remove(self, name: str) -> bool:
        path = self._folder / name
        try:
            found = os.lstat(path)
            os.unlink(path)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._ignored[name] = _identity(found)
            self._say(
                f"note: {path} cannot be removed ({error.strerror}): remove it; until then it is not obeyed again"
            )
            return False
        return True


def _identity(found: os.stat_result) -> tuple[int, int]:
    """A folder's times change with what is put into it."""
    return found.st_ino, 0 if stat.S_ISDIR(found.st_mode) else found.st_mtime_ns
