"""Whether a job that ended is to be started again by itself: a table of causes, and counts of attempts. Pure."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from typing import Literal

from megatron.config.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_CHANGED_PAST,
    EXIT_CHECKPOINT,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_LOST_PROCESS,
    EXIT_NON_FINITE,
    EXIT_PROOF_FAILED,
    EXIT_REQUEUE,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    EXIT_WATCHDOG,
)
from megatron.launch.attempts import STOP_NOW, reason_words
from megatron.launch.hardware_errors import hardware_error_in

STOPS_WITHOUT_PROGRESS = 10
"""So many stops in a row by signals, none after a later checkpoint: the time given is too short to get anywhere."""

Again = Literal["no", "yes", "limited"]


@dataclass(frozen=True)
class Cause:
    """A kind of end. again: whether the job is started once more; limited: while attempts get on. blames: whether
    hosts that the record names are counted as suspects. remedy: what to do where it is not started again."""

    what: str
    again: Again
    remedy: str = ""
    blames: bool = False


CAUSES: dict[str, Cause] = {
    "complete": Cause("the run is complete", "no"),
    "bug": Cause("a bug, or an error that nobody foresaw", "no", "read its traceback; the same would come again"),
    "config": Cause("command line or config cannot be carried out", "no", "correct it, then submit again"),
    "data": Cause("data are missing or damaged", "no", "mend the file that the message names, then submit again"),
    "checkpoint": Cause("no whole checkpoint was found", "no", "restore one, or name another with --resume-from"),
    "changed past": Cause("the config changes what was trained already", "no", "undo the change, or start a new run"),
    "unavailable": Cause(
        "these machines cannot do what the config asks for", "no", "set the key that the message names, or submit "
        "elsewhere"
    ),
    "proof": Cause("a proof of equality failed", "no", "keep the folders and report it"),
    "non-finite": Cause(
        "too many steps in a row had no finite loss", "no", "lower the learning rate, or look at the data of those "
        "steps; the same would come again"
    ),
    "watchdog": Cause("a process made no progress", "limited", "look at the stacks in the job's output", True),
    "lost process": Cause("a process was lost", "limited", "look at the system's log of its host", True),
    "hardware": Cause("a machine failed", "limited", "have the node looked at", True),
    "disk full": Cause("the disk is full, or a limit on size is reached", "no", "free some space, then submit again"),
    "disk failing": Cause("a disk or its network failed", "limited", "have the file system looked at", True),
    "storage": Cause("files could not be read or written", "no", "mend what the message names, then submit again"),
    "asked to stop": Cause("it was asked to stop", "yes", "submit again with more time (--time)"),
    "stop-now": Cause("a user asked it to stop (OUTPUT/stop-now)", "no", "submit again to go on"),
    "interrupted": Cause("a user interrupted it", "no", "submit again to go on"),
    "pipe": Cause("the reader of its output went away", "no", "write its output to a file, then submit again"),
    "killed": Cause("it was killed, and left no record", "limited", "look at the job's output and at the system's log "
                    "(out of memory?)"),
    "not runnable": Cause("the command could not be run", "no", "see to the environment of the batch script"),
    "never began": Cause("it failed before the run's folder was opened", "no", "read the job's output, mend it, then "
                         "submit again"),
}  # fmt: skip
"""What docs/cluster.md shows."""

BY_CODE: dict[int, str] = {
    EXIT_DONE: "complete",
    EXIT_BUG: "bug",
    EXIT_USAGE: "config",
    EXIT_DATA: "data",
    EXIT_CHECKPOINT: "checkpoint",
    EXIT_CHANGED_PAST: "changed past",
    EXIT_UNAVAILABLE: "unavailable",
    EXIT_PROOF_FAILED: "proof",
    EXIT_NON_FINITE: "non-finite",
    EXIT_WATCHDOG: "watchdog",
    EXIT_LOST_PROCESS: "lost process",
    EXIT_IO: "storage",
    EXIT_REQUEUE: "asked to stop",
    126: "not runnable",
    127: "not runnable",
    EXIT_INTERRUPTED: "interrupted",
    EXIT_BROKEN_PIPE: "pipe",
}
"""Causes by exit codes of docs/exit-codes.md, and of a shell. Others are kills: 128 + a signal's number, or SLURM's."""

_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_FAILING = tuple(
    os.strerror(number)
    for number in (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EUCLEAN)
)
"""A node's disk, or its way to a shared one. ESTALE, ENOTCONN, ESHUTDOWN: what NFS and Lustre say on a node that they
have lost; errors(3) of Linux has the words."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    code: its own, from the record that it left; else the launcher's; None: nobody knows. recorded: whether the
    attempt left a record of its end. claimed: whether it got so far as to open the run's folder. host, suspects: of the
    record: whose failure it is, and which hosts look bad.
    """

    code: int | None
    reason: str = ""
    recorded: bool = False
    claimed: bool = True
    host: str = ""
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Past:
    """What is known of a run's attempts, this one included, in the order in which they began.

    positions: steps that each began at; None: it never came to a first step. stops: whether each ended because it was
    asked to. newest: the step of the newest checkpoint now; 0 where there is none. requeues: restarts of this job so
    far.
    """

    positions: tuple[int | None, ...] = ()
    stops: tuple[bool, ...] = ()
    newest: int = 0
    requeues: int = 0


@dataclass(frozen=True)
class Decision:
    """requeue: whether the job is started again. cause: a key of CAUSES. why: a line in words. exit_code: of the batch
    script where it is not requeued."""

    requeue: bool
    cause: str
    why: str
    exit_code: int


def cause_of(ended: Ended) -> str:
    """The cause of an end, a key of CAUSES."""
    code, reason = ended.code, ended.reason
    if code == EXIT_DONE and (ended.recorded or not ended.claimed):
        return "complete"
    if code == EXIT_DONE or code is None:
        return "killed" if ended.claimed else "never began"  # it opened the folder and left no word of how it ended
    if code == EXIT_REQUEUE:
        return "stop-now" if reason.startswith(STOP_NOW) else "asked to stop"
    if code in (EXIT_BUG, EXIT_IO):
        if any(words in reason for words in _FULL):
            return "disk full"
        if any(words in reason for words in _FAILING):
            return "disk failing"
    if code in (EXIT_BUG, EXIT_UNAVAILABLE) and hardware_error_in(reason):
        return "hardware"
    if code == EXIT_BUG and not ended.recorded:
        # torchrun gives 1 for whatever its processes ended with, a shell for much
        return "killed" if ended.claimed else "never began"
    return BY_CODE.get(code, "killed")


def blamed(ended: Ended) -> tuple[str, ...]:
    """Hosts that look bad after such an end: the suspects of the record; where it names none and speaks of a machine,
    the host whose failure it is."""
    cause = cause_of(ended)
    if not CAUSES[cause].blames:
        return ()
    if ended.suspects:
        return tuple(sorted(set(ended.suspects)))
    # who notices that another is lost, or hangs, is not to blame, unless its own GPU said more
    said = hardware_error_in(ended.reason)
    own = cause == "disk failing" or (said is not None and (said.at_once or (said.own and cause == "hardware")))
    return (ended.host,) if own and ended.host else ()


def attempts_without_progress(past: Past) -> tuple[int, int]:
    """How many of the last attempts, up to this one, in a row led to no later checkpoint than they began at: those
    that failed, and those that were asked to stop."""
    failures = stops = 0
    following = past.newest
    for position, stopped in zip(reversed(past.positions), reversed(past.stops), strict=True):
        if position is not None:
            if following > position:
                break
            following = position
        failures, stops = failures + (not stopped), stops + stopped
    return failures, stops


def decide(ended: Ended, past: Past, without_progress: int = 3, max_requeues: int | None = None) -> Decision:
    """Whether to start again after such an end.

    without_progress: failures in a row that led to no later checkpoint, this one included, at which it is given up.
    max_requeues: restarts of one job at most; None: any number. Whatever the ends, attempts that never get on come to
    an end: after `without_progress` failures or STOPS_WITHOUT_PROGRESS stops.
    """
    cause = cause_of(ended)
    about = CAUSES[cause]
    at = past.positions[-1] if past.positions else None
    saved = cause == "asked to stop" and at is not None and past.newest > at
    what = f"{about.what}, and saved" if saved else about.what
    said = what if cause == "complete" else _said(ended, what)
    code = EXIT_BUG if ended.code is None else ended.code
    if cause == "killed" and code == EXIT_DONE:
        code = EXIT_LOST_PROCESS  # a launcher that says 0 of a job that was lost must not be believed

    def no(why: str, remedy: str) -> Decision:
        return Decision(False, cause, f"{why}: {remedy}" if remedy else why, code)

    if about.again == "no":
        return no(said, about.remedy)
    failures, stops = attempts_without_progress(past)
    where = f"the newest checkpoint is that of step {past.newest}" if past.newest else "there is no checkpoint yet"
    if about.again == "limited" and failures >= without_progress:
        return no(f"{said}; {_attempts(failures)} in a row failed without a later checkpoint ({where})", about.remedy)
    if stops >= STOPS_WITHOUT_PROGRESS:
        return no(f"{said}; {_attempts(stops)} in a row were stopped without a later checkpoint ({where})",
                  CAUSES["asked to stop"].remedy)  # fmt: skip
    if max_requeues is not None and past.requeues >= max_requeues:
        return no(f"{said}; the job was started again {past.requeues} times, as often as allowed (--max-requeues)",
                  "submit again to go on")  # fmt: skip
    if failures + stops and about.again == "limited":
        where += f"; {_attempts(failures)} of at most {without_progress} failed without a later one"
    return Decision(True, cause, f"{said}; {where}", code)


def _attempts(count: int) -> str:
    return f"{count} attempt{'s' if count != 1 else ''}"


def _said(ended: Ended, what: str) -> str:
    code = "no exit code is known" if ended.code is None else f"exit code {ended.code}{_signal_words(ended.code)}"
    reason = reason_words(ended.reason, 300)
    return f"{what} ({code})" + (f": {reason}" if reason else "")


def _signal_words(code: int) -> str:
    """The signal that a code of a shell, or of SLURM (256 + its number), speaks of."""
    number = code - 256 if code > 256 else code - 128
    if number <= 0 or code in BY_CODE:
        return ""
    try:
        return f", {signal.Signals(number).name}"
    except ValueError:
        return ""
