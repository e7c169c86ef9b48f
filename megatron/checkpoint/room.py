"""Whether a disk has room for what is about to be written, looked at before the first byte."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron.checkpoint.storage import io_errors
from megatron.config.errors import StorageError

_SMALL_FILES = 32 * 10**6


def check_room(aside: Path, needed: int, what: str = "the export") -> None:
    """Raises StorageError where the disk has no room for so many bytes, less what lies in `aside` already."""
    with io_errors(aside, "look at the disk of"):
        there = sum(path.stat().st_blocks * 512 for path in aside.rglob("*")) if aside.exists() else 0
        free = shutil.disk_usage(aside.parent).free
    missing = needed + _SMALL_FILES - there - free
    if missing > 0:
        raise StorageError(
            f"{aside.parent}: {what} needs {(needed - there) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: free "
            f"{missing / 1e9:.2f} GB, or choose an --output on another disk; nothing was written"
        )
