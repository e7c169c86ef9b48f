"""What an error is to a job of several processes: its code, its words, and whether it only follows from another's."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback

import torch.distributed as dist

from megatron.config.errors import EXIT_BROKEN_PIPE, EXIT_IO, EXIT_LOST_PROCESS, StagemixError
from megatron.parallel.mesh import host_name


def words_of(error: BaseException) -> str:
    """An error as a message; errors that are not for users come with their type."""
    return str(error) if isinstance(error, StagemixError) else f"{type(error).__name__}: {error}"


_PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "nccl",
    "gloo/transport",
    "timed out waiting",
    "processgroup",
)


def follows_from_a_lost_peer(error: BaseException) -> bool:
    """Whether an error is what a collective says when the other side has gone, or what was raised from one."""
    if isinstance(error, StagemixError):
        return isinstance(error.__cause__, dist.DistError)
    return any(
        isinstance(one, dist.DistError)
        or (isinstance(one, RuntimeError) and any(words in str(one).lower() for words in _PEER_WORDS))
        for one in (error, error.__cause__, error.__context__)
    )


def waited_too_long(error: BaseException) -> bool:
    """Whether a collective gave up because another rank never came to it."""
    return any("timed out" in str(one).lower() for one in (error, error.__cause__, error.__context__) if one)


def first_line(error: BaseException) -> str:
    return f"{words_of(error).splitlines()[0].partition('. This is typically')[0]:.300}"


def traceback_of(error: BaseException | None, code: int) -> str:
    """The traceback that a bug is shown with; empty for an error that is written for the user."""
    if error is None or isinstance(error, StagemixError) or code in (EXIT_LOST_PROCESS, EXIT_IO, EXIT_BROKEN_PIPE):
        return ""
    return "".join(traceback.format_exception(error)).rstrip()


def show_stacks(rank: int) -> None:
    """The stacks of all threads of this process, on standard error."""
    try:
        descriptor = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        os.write(descriptor, f"[rank {rank}] stacks of process {os.getpid()} on {host_name()}:\n".encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)
    except (OSError, ValueError):
        pass  # nowhere to show them
