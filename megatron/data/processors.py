"""How many processors a loop may use."""

from __future__ import annotations

import os


def processors() -> int:
    """Processors that this process may use, at most 16: past that, passes over an index wait for memory."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, allowed)
