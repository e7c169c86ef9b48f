"""How many processors a loop may use."""

from __future__ import annotations

import os


def available_processors() -> int:
    """Processors that this process may use; not every system has affinities."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processors() -> int:
    """Those that a loop over an index may use, at most 16: past that, it waits for memory."""
    return min(16, available_processors())
