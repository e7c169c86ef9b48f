"""Errors as interface: every failure that a user can cause or repair has a class, and every class an exit code.

The codes are part of the documented contract (docs/exit-codes.md); launchers and scripts read them.
"""

from __future__ import annotations

import errno

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_CHANGED_PAST = 5
EXIT_UNAVAILABLE = 6
EXIT_PROOF_FAILED = 7
EXIT_NON_FINITE = 8
EXIT_WATCHDOG = 9
EXIT_LOST_PROCESS = 10
EXIT_IO = 74
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# operating-system errors that a user can repair, each with what to do: exit code 74
IO_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another disk",
    errno.EROFS: "write to a folder that is not on a read-only file system",
    errno.EIO: "the disk reports a hardware error: check it, or use another",
    errno.ENOTDIR: "the path leads through a file: name another",
    errno.EEXIST: "a file lies where a folder is needed: name another path",
    errno.EISDIR: "a folder lies where a file is needed: name another path",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
}


class StagemixError(Exception):
    """Base of every error whose message is written for the user. A traceback of one is never shown."""

    exit_code = EXIT_BUG


class ConfigError(StagemixError):
    """A command line or a config file that cannot be carried out, on no machine."""

    exit_code = EXIT_USAGE


class DataError(StagemixError):
    """A corpus, an indexed dataset, a tokenizer or an index that is missing, broken or contradicts itself."""

    exit_code = EXIT_DATA


class CheckpointError(StagemixError):
    """A checkpoint that is not whole, or none is."""

    exit_code = EXIT_CHECKPOINT


class ChangedPastError(StagemixError):
    """A resume whose config or data contradict what the run has already been trained on (law M5)."""

    exit_code = EXIT_CHANGED_PAST


class UnavailableError(StagemixError):
    """A choice that this machine or this installation cannot honour, and another might (law T3: no silent fallback)."""

    exit_code = EXIT_UNAVAILABLE


class ProofError(StagemixError):
    """An export or an import whose parity proof missed its tolerance (law C3)."""

    exit_code = EXIT_PROOF_FAILED


class NonFiniteError(StagemixError):
    """Too many steps in a row with a loss or a gradient that is not finite."""

    exit_code = EXIT_NON_FINITE


class LostProcessError(StagemixError):
    """Another process of the job ended without a word, or never came."""

    exit_code = EXIT_LOST_PROCESS


class StorageError(StagemixError):
    """The disk is full, read-only or failing."""

    exit_code = EXIT_IO


class StopRequested(StagemixError):
    """A signal asked the run to save and stop; the run can be resumed."""

    exit_code = EXIT_REQUEUE


def exit_code_of(error: BaseException) -> int:
    """The code that a process ends with for an error that nobody handles; argparse's SystemExit has its own."""
    if isinstance(error, StagemixError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return EXIT_BROKEN_PIPE
    return EXIT_IO if isinstance(error, OSError) and error.errno in IO_REMEDIES else EXIT_BUG
