"""Whether the process that has claimed a run's folder still lives, seen from outside without touching its claim."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from megatron.launch.attempts import HEARTBEAT, read_attempts, read_exit, read_heartbeat
from megatron.launch.run_state import state_of

LOCK = ".lock"
"""What `trainer/run_folder.py` claims a folder by."""
_SLACK = 5.0


def living_process(output: Path, now: float) -> str:
    """Words for the process that trains in a folder, "pid 12 on node3"; "" where none is known to live.

    On this host its number tells, and when that process was started; of another host its heartbeats. now: unix seconds.
    """
    attempts = read_attempts(output)
    last = attempts[-1] if attempts else None
    record = read_exit(output)
    if last is None or last.end is not None or (record is not None and record.attempt == last.number):
        return ""
    began = last.launch or last.start
    if began is None:
        return ""
    words = f"pid {began.pid} on {began.host}"
    if began.host in (None, *own_names()):
        return words if is_alive(began.pid, began.time) else ""
    beat = read_heartbeat(output)
    modified = None
    with contextlib.suppress(OSError):
        modified = (output / HEARTBEAT).stat().st_mtime
    return words if state_of(attempts, record, beat, {}, modified, now).live else ""


def is_claimed(output: Path) -> bool:
    """Whether a process holds the folder's lock now. Only for who starts processes there: it takes the lock for a
    moment, so that a start at that very moment would be refused."""
    try:
        lock = os.open(output / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(lock)
    return False


def own_names() -> tuple[str, ...]:
    """What this host may be called in records: its name, and SLURM's for the node."""
    node = os.environ.get("SLURMD_NODENAME")
    return (socket.gethostname(), node) if node else (socket.gethostname(),)


def is_alive(pid: int, by: float | None = None) -> bool:
    """Whether a process of this host lives; a zombie does not. by: unix seconds at which it was there, so that a number
    that was given anew is told from it, where /proc tells when a process was started."""
    if pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        # state is the first word behind the name, which stands in brackets and may hold anything
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = next(line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line[:6] == "btime ")
    except (OSError, StopIteration):
        return True  # no Linux
    if words[0] in "ZX":
        return False
    return by is None or int(booted) + int(words[19]) / os.sysconf("SC_CLK_TCK") <= by + _SLACK
