"""One request carried out: `stagemix evaluate` as a process of its own, its result or its failure put on record."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.config.errors import DataError
from megatron.config.evaluation_section import HELDOUT, EvaluationSection
from megatron.evaluation.requests import Claim, EvaluationBox, Request
from megatron.evaluation.results import read_record
from megatron.launch.side_process import side_environment, stagemix

_LAST_LINES = 12
_PAUSE = 0.25


@dataclass(frozen=True)
class Outcome:
    """How an evaluation ended. code: 0 where there is a result; None where it was given back undone."""

    step: int
    code: int | None
    reason: str = ""
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """For people."""
        if self.code == 0:
            return f"step {self.step}: evaluated in {self.seconds:.1f} s"
        if self.code is None:
            return f"step {self.step}: not evaluated: {self.reason}"
        return f"step {self.step} could not be evaluated (exit code {self.code}): {self.reason}"


def evaluate_words(wants: EvaluationSection, checkpoint: Path, name: str, output: Path) -> list[str]:
    """The command line of an evaluation. Values of the config stand behind "=", so that none is taken for an option."""
    words = [*stagemix("evaluate"), f"--model={name}={checkpoint}", f"--output={output}", "--ends-with-stdin"]
    words += [f"--device={wants.device}", f"--dtype={wants.dtype}", f"--batch-size={wants.batch_size}"]
    if wants.suite:
        words.append(f"--suite={wants.suite}")
    if wants.suite == HELDOUT:
        words += [f"--config={checkpoint / 'config.toml'}"]
        words += [f"--questions={wants.questions}", f"--passages={wants.passages}"]
    if wants.tasks:
        words.append(f"--tasks={','.join(wants.tasks)}")
    if wants.include_path:
        words.append(f"--include-path={wants.include_path}")
    if wants.data:
        words.append(f"--data={wants.data}")
    if wants.limit:
        words.append(f"--limit={wants.limit}")
    flags = {"--online": wants.online, "--skip-missing": wants.skip_missing}
    flags["--allow-code-execution"] = wants.allow_code_execution
    return words + [flag for flag, said in flags.items() if said]


def carry_out(
    box: EvaluationBox,
    request: Request,
    wants: EvaluationSection,
    stop: Callable[[], bool],
    niceness: int = 0,
) -> Outcome | None:
    """Evaluates what a request is about. None while another process does, or where it is done already.

    wants: how, mostly what the request says. stop: asked several times a second; once true, the evaluation is ended and
    the request given back. Whatever goes wrong in the evaluation is on record, and no error here. OSError where the
    folder cannot be written.
    """
    claim = box.claim(request)
    if claim is None:
        return None
    try:
        work = box.work_folder(request)
        try:
            return _evaluate(claim, wants, work, stop, niceness)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        claim.release()


def _evaluate(claim: Claim, wants: EvaluationSection, work: Path, stop: Callable[[], bool], niceness: int) -> Outcome:
    request, output, log = claim.request, work / "result.json", work / "log.txt"
    checkpoint = claim.box.checkpoint_path(request.step).absolute()
    words = evaluate_words(wants, checkpoint, f"step-{request.step}", output.absolute())
    began = time.monotonic()
    folder = request.folder if Path(request.folder).is_dir() else None
    with open(log, "wb") as told:
        child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=side_environment(work.absolute(), wants.threads),
            start_new_session=True,  # Ctrl-C is for the run, which then ends its evaluation itself
        )
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, child.pid, niceness)  # before it starts threads, which inherit it
        code, why = _wait(child, claim, wants.seconds, stop)
    finally:
        _end(child)
    seconds = time.monotonic() - began
    if code is None:
        return Outcome(request.step, None, why, seconds)
    return _record(claim, code, why, output, log, seconds)


def _wait(child: subprocess.Popen[bytes], claim: Claim, limit: int, stop: Callable[[], bool]) -> tuple[int | None, str]:
    """(exit code, why it was ended); no code where the request goes back undone."""
    end = time.monotonic() + limit
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(_PAUSE)
            return (code if code >= 0 else 128 - code), ""
        if stop():
            return None, "the run, or who evaluates for it, was asked to stop"
        if not claim.beat():
            return None, "another process has taken it over, or the run has gone back behind this step"
        if limit and time.monotonic() > end:
            return 124, f"took longer than {limit} s (evaluation.seconds)"


def _end(child: subprocess.Popen[bytes]) -> None:
    """The process and all that it started in its session are gone afterwards."""
    if child.poll() is None:  # not waited for yet, so the number is still its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.stdin is not None:
        child.stdin.close()


def _record(claim: Claim, code: int, why: str, output: Path, log: Path, seconds: float) -> Outcome:
    step, stands, reason = claim.request.step, False, why
    if code == 0:
        try:
            samples = output.with_name(f"{output.stem}-samples")
            stands = claim.publish(read_record(output), samples)
        except DataError as error:
            code, reason = 3, str(error)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            code, reason = 74, str(error)
    if code:
        lines = _last_lines(log)
        reason = reason or _what_went_wrong(lines)
        stands = claim.fail(code, reason, lines)
    if not stands:
        return Outcome(step, None, "another process has taken it over, or the run has gone back behind it", seconds)
    return Outcome(step, code, reason, seconds)


def _what_went_wrong(lines: list[str]) -> str:
    """The message of a command of ours, which may stand behind a progress bar; else the last line."""
    said = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return said[-1] if said else lines[-1] if lines else "it said nothing"


def _last_lines(log: Path) -> list[str]:
    """Of what the process said; of a progress bar its last state alone."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode("utf-8", "replace")
    lines = [re.split(r"\r", line.rstrip("\r"))[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-_LAST_LINES:]
