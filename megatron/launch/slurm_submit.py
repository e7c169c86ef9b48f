"""Batch scripts as files that stay, their submission, and whether a job that writes to a folder is still alive."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import ConfigError, StorageError, UnavailableError
from megatron.launch.attempts import read_attempts, read_exit, read_heartbeat

JOBS = "jobs.jsonl"
"""In the folder of the scripts: a line a submission, {"time", "file", "job"}."""
LOCK = ".lock"
"""In the same folder: held while a launch looks whether something trains there, and submits."""
SECONDS = 120
_NUMBERED = re.compile(r"(\d{4,})-.*\.sbatch$")


def next_script(folder: Path, kind: str) -> Path:
    """The path of a new script in the folder, "0001-train.sbatch": earlier ones stay."""
    taken = [int(found[1]) for path in folder.glob("*.sbatch") if (found := _NUMBERED.match(path.name))]
    return folder / f"{max(taken, default=0) + 1:04d}-{kind}.sbatch"


def keep_script(path: Path, text: str) -> None:
    """Writes it, and its folder where that is not there. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
        path.chmod(0o755)
    except OSError as error:
        raise _unwritable(path, error) from None


@contextlib.contextmanager
def one_launch_at_a_time(folder: Path) -> Iterator[None]:
    """Within it, no other launch looks whether something trains, or submits, from the same folder; waits for one that
    does. The folder is made where it is not there. Raises StorageError."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise _unwritable(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"note: another launch holds {path}: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"note: {path}: the file system gives no locks ({error.strerror}): see to it yourself that nobody "
                "launches the same run at this moment",
                file=sys.stderr,
                flush=True,
            )
        yield


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: the batch script's folder cannot be made or written: {error.strerror or error}: name another "
        "place (--set run.output=…, or --folder), or mend this one"
    )


def require_sbatch() -> None:
    """Raises UnavailableError where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise UnavailableError(
            "there is no program sbatch in PATH: launch from a login node of a SLURM cluster; --dry-run shows the "
            "batch script anywhere; without SLURM, torchrun starts a run (see stagemix train --help)"
        )


def submit(path: Path, options: Sequence[str] = (), hint: str = "") -> str:
    """Hands a script to sbatch; the job's id. options: of sbatch, besides those in the file. hint: what is said besides
    where it refuses.

    Raises ConfigError with sbatch's own words where it refuses; the file stays.
    """
    require_sbatch()
    words = ["sbatch", "--parsable", *options, str(path)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"sbatch did not answer within {SECONDS} s: look with squeue --me whether the job is there, or submit "
            f"{path} by hand"
        ) from None
    said = " ".join((done.stderr or done.stdout).split())
    if done.returncode:
        raise ConfigError(
            f"sbatch refused {path}: {said or f'exit code {done.returncode}'}\n"
            + (f"{hint}\n" if hint else "")
            + "The file stays: correct the options and launch again, or correct the file and submit it by hand"
        )
    if done.stderr.strip():
        print(done.stderr.strip(), flush=True)
    job = done.stdout.strip().split(";")[0]  # with several clusters: ID;CLUSTER
    note_submission(path, job)
    return job


def note_submission(path: Path, job: str) -> None:
    """Adds a line to jobs.jsonl beside the script. OSError."""
    with (path.parent / JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), "file": path.name, "job": job}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def submissions(folder: Path) -> list[dict[str, Any]]:
    """What was submitted from scripts of the folder, oldest first: the lines of jobs.jsonl that can be read, {"time",
    "file", "job"}."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / JOBS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and "job" in record:
                    found.append(record)
    return found


def alive(jobs: Iterable[str]) -> dict[str, str]:
    """Those of the jobs that SLURM still knows as waiting or running, with their state; {} where it cannot be asked."""
    asked = [job for job in dict.fromkeys(jobs) if re.fullmatch(r"\d+(_\d+)?", job)]
    found: dict[str, str] = {}
    if not asked or shutil.which("squeue") is None:
        return found
    mine = ["squeue", "--noheader", "--array", "--format=%i|%A|%F|%T", f"--user={os.getuid()}"]
    try:
        done = subprocess.run(mine, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return found
    for line in done.stdout.splitlines():
        *names, state = line.strip().split("|")
        for job in asked:
            if job in names:
                found[job] = state
    return found


def trainer_of(output: Path, heartbeat_seconds: int, folder: Path | None = None) -> str | None:
    """Words on what trains in the folder now, or waits to; None where nothing seems to.

    heartbeat_seconds: how often it would be heard of. folder: where its batch scripts are, OUTPUT/slurm.
    """
    attempts = read_attempts(output)
    jobs = [str(one["job"]) for one in submissions(folder or output / "slurm")] + [
        _job_name(one.job) for one in attempts[-1:]
    ]
    living = alive(filter(None, jobs))
    if living:
        job, state = next(iter(living.items()))
        return f"job {job} is {state}"
    beat, ended = read_heartbeat(output), read_exit(output)
    fresh = beat is not None and time.time() - beat.time < max(60, 6 * heartbeat_seconds)
    if beat is not None and fresh and (ended is None or ended.time < beat.time - heartbeat_seconds):
        where = f"process {beat.pid} on {beat.host}" if beat.host else "a process"
        return f"{where} wrote its heartbeat {max(0, time.time() - beat.time):.0f} s ago"
    return None


def _job_name(job: dict[str, Any]) -> str:
    if "array_job" in job and "array_task" in job:
        return f"{job['array_job']}_{job['array_task']}"
    return str(job.get("id", ""))
