"""Disks that are really full: a small file system in memory, of which a test says how much is free."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096
_ROOMY = 64 * 2**20


class SmallDisk:
    """A tmpfs at `path`. It counts in pages of PAGE bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave_free(self, pages: int) -> None:
        """Only so many pages more can be written."""
        status = os.statvfs(self.path)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        self._remount(f"size={max(PAGE, used + pages * PAGE)}")
        status = os.statvfs(self.path)
        if not pages and status.f_bfree:  # an empty disk has a page at least
            (self.path / "filler").write_bytes(bytes(PAGE))

    def make_room(self) -> None:
        """Somebody has freed space."""
        (self.path / "filler").unlink(missing_ok=True)
        self._remount(f"size={_ROOMY}")

    def read_only(self, yes: bool = True) -> None:
        """Nothing can be written, or again all."""
        self._remount("ro" if yes else "rw")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True, timeout=30)


@contextmanager
def small_disk(path: Path) -> Iterator[SmallDisk]:
    """Mounts a disk at a new folder; gone afterwards, whatever happens. Skips the test where that is not allowed."""
    path.mkdir()
    try:
        options = ["-t", "tmpfs", "-o", f"size={_ROOMY},mode=755", "tmpfs", str(path)]
        made = subprocess.run(["mount", *options], capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here (mount needs root): {made.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False, timeout=30)
