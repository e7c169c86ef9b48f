"""Evaluations that a run asks for, as files in OUTPUT/evaluations: whoever can reach the folder can carry them out.

    requests/step-000001000.json        what to evaluate, and how; removed when it is done
    requests/step-000001000.claim-0001  who does: created exclusively, touched while that one lives
    step-000001000.json                 the result: a file of `stagemix evaluate` with "evaluated" besides
    step-000001000.failed.json          why there is none: exit code, last lines
    working/                            scratch folders, one an attempt
    discarded/                          results of steps that a resume went back behind

Claims are never taken from another: one that has gone stale is followed by the next number, and the highest counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import DataError
from megatron.evaluation.results import read_record, write_record

FORMAT = 1
STALE_SECONDS = 300.0
"""After so long without a touch a claim of another host is nobody's."""
MOST_ATTEMPTS = 3
"""Servers that may be lost over one request, before it counts as failed."""
_STEP = re.compile(r"^(step-\d{9,})\.json$")
_CLAIM = re.compile(r"^(step-\d{9,})\.claim-(\d{4,})$")


@dataclass(frozen=True)
class Request:
    """One checkpoint to evaluate.

    checkpoint: the SHA-256 of its manifest, so that a result is never taken for another's. folder: where relative paths
    of the run's config start. wants: the run's table [evaluation].
    """

    step: int
    training_stage: str
    consumed_samples: int
    consumed_tokens: int
    checkpoint: str
    folder: str
    wants: dict[str, Any]

    @property
    def name(self) -> str:
        """As checkpoints are called."""
        return step_name(self.step)

    def about(self) -> dict[str, Any]:
        """What a result says of its checkpoint."""
        kept = ("step", "training_stage", "consumed_samples", "consumed_tokens", "checkpoint")
        return {name: value for name, value in asdict(self).items() if name in kept}


def step_name(step: int) -> str:
    """ "step-000001000"."""
    return f"step-{step:09d}"


def read_request(path: Path) -> Request:
    """The request in a file. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise DataError(f"{path}: a request of another version: update stagemix, or remove the file")
        kinds = {"step": int, "consumed_samples": int, "consumed_tokens": int, "wants": dict}
        for name, value in content.items():
            if not isinstance(value, kinds.get(name, str)):
                raise TypeError(f"{name} is {value!r}")
        return Request(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a request for an evaluation ({error}): remove the file") from None


class Claim:
    """One process's turn at a request."""

    def __init__(self, box: EvaluationBox, request: Request, path: Path, number: int) -> None:
        self.box, self.request, self.path, self.number = box, request, path, number
        self._touched = time.monotonic()

    def beat(self, seconds: float = 20.0) -> bool:
        """To be called often: touches the claim now and then. False where the request is no longer this one's to do:
        another has taken it for lost, or the run has gone back behind its step."""
        if time.monotonic() - self._touched < seconds:
            return True
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path)
        self._touched = time.monotonic()
        return self.stands()

    def stands(self) -> bool:
        """Whether the request is still this one's to do."""
        if not self.path.exists() or any(number > self.number for number, _ in self.box.claims(self.request.name)):
            return False
        try:
            return read_request(self.box.request_path(self.request.step)) == self.request
        except (OSError, DataError):
            return False

    def release(self) -> None:
        """Gives the request back undone."""
        self.path.unlink(missing_ok=True)

    def publish(self, record: Mapping[str, Any], samples: Path | None = None) -> bool:
        """The result stands in the folder, and the request is done. False where it was no longer this one's to do."""
        if not self.stands():
            return False
        self.box.failure_path(self.request.step).unlink(missing_ok=True)
        if samples is not None and samples.is_dir():
            kept = self.box.folder / f"{self.request.name}-samples"
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(samples, kept)
        write_record(self.box.result_path(self.request.step), {**record, "evaluated": self.request.about()})
        self.box.remove_request(self.request.step)
        return True

    def fail(self, code: int, reason: str, last_lines: list[str], again: bool = True) -> bool:
        """Records why there is no result. again: whether the run may ask for it again when it starts. False as
        `publish`."""
        if not self.stands():
            return False
        failure = {"code": code, "reason": reason, "last_lines": last_lines, "again": again}
        failure["evaluated"] = self.request.about()
        write_record(self.box.failure_path(self.request.step), failure)
        self.box.remove_request(self.request.step)
        return True


class EvaluationBox:
    """OUTPUT/evaluations of the run in `output`. by_run: for the run's own process, which holds the folder's lock."""

    def __init__(self, output: Path, by_run: bool = False) -> None:
        self.output = output
        self.folder = output / "evaluations"
        self.requests = self.folder / "requests"
        self.working = self.folder / "working"
        self.by_run = by_run

    def checkpoint_path(self, step: int) -> Path:
        """The checkpoint that a request is about."""
        return self.output / "checkpoints" / step_name(step)

    def request_path(self, step: int) -> Path:
        """Where the request for a step lies."""
        return self.requests / f"{step_name(step)}.json"

    def result_path(self, step: int) -> Path:
        """Where its result will lie."""
        return self.folder / f"{step_name(step)}.json"

    def failure_path(self, step: int) -> Path:
        """Or why there is none."""
        return self.folder / f"{step_name(step)}.failed.json"

    def ask(self, request: Request) -> None:
        """Leaves a request; a failure that is on record is tried again."""
        self.requests.mkdir(parents=True, exist_ok=True)
        self.failure_path(request.step).unlink(missing_ok=True)
        content = json.dumps({"format": FORMAT, **asdict(request)}, indent=1) + "\n"
        write_whole(self.request_path(request.step), content.encode())

    def pending(self, report: Callable[[str], None] = lambda words: None) -> list[Request]:
        """Requests that are not done, oldest step first. Unreadable ones are named to `report` and passed over."""
        found = []
        for name in sorted(self._names(self.requests)):
            if not _STEP.match(name):
                continue
            try:
                found.append(read_request(self.requests / name))
            except FileNotFoundError:
                continue  # done a moment ago
            except DataError as error:
                report(str(error))
        return sorted(found, key=lambda request: request.step)

    def results(self, report: Callable[[str], None] = lambda words: None) -> dict[int, dict[str, Any]]:
        """Every result by step, oldest first. Damaged ones are named to `report` and passed over."""
        found: dict[int, dict[str, Any]] = {}
        for name in sorted(self._names(self.folder)):
            if _STEP.match(name):
                with contextlib.suppress(FileNotFoundError):
                    try:
                        record = read_record(self.folder / name)
                        found[int(record["evaluated"]["step"])] = record
                    except (DataError, KeyError, TypeError, ValueError) as error:
                        report(f"{self.folder / name}: not a result of an evaluation of this run ({error})")
        return found

    def failures(self) -> dict[int, dict[str, Any]]:
        """Every failure on record by step."""
        steps = sorted(
            {n for name in self._names(self.folder) if name.endswith(".failed.json") and (n := _number(name))}
        )
        return {step: found for step in steps if (found := self.failure(step)) is not None}

    def failure(self, step: int) -> dict[str, Any] | None:
        """Why a step has no result, where an evaluation of it failed."""
        try:
            found: dict[str, Any] = json.loads(self.failure_path(step).read_text(encoding="utf-8"))
            return found
        except (FileNotFoundError, ValueError):
            return None

    def remove_request(self, step: int) -> None:
        """There is nothing to do any more."""
        self.request_path(step).unlink(missing_ok=True)
        for _, path in self.claims(step_name(step)):
            path.unlink(missing_ok=True)

    # Claims

    def claims(self, name: str) -> list[tuple[int, Path]]:
        """Claims on the request of that name, (number, path), ascending."""
        found = [
            (match, self.requests / match.string) for n in self._names(self.requests) if (match := _CLAIM.match(n))
        ]
        return sorted((int(match[2]), path) for match, path in found if match[1] == name)

    def claim(self, request: Request) -> Claim | None:
        """A turn at the request; None while another has it, or where it is done. Whoever creates the next number first
        has it. A request over which too many servers were lost is recorded as failed."""
        claims = self.claims(request.name)
        if claims and self._lives(claims[-1][1]):
            return None
        number = claims[-1][0] + 1 if claims else 1
        path = self.requests / f"{request.name}.claim-{number:04d}"
        words = json.dumps({**_process(os.getpid()), "by_run": self.by_run, "token": secrets.token_hex(8)})
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except (FileExistsError, FileNotFoundError):
            return None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(words + "\n")
        taken = Claim(self, request, path, number)
        if not taken.stands():
            taken.release()
            return None
        if number > MOST_ATTEMPTS:
            lost = f"{MOST_ATTEMPTS} processes that evaluated it were lost: was there too little memory?"
            taken.fail(
                1, f"{lost} It is not tried again before {self.failure_path(request.step)} is removed", [], False
            )
            return None
        return taken

    def _lives(self, path: Path) -> bool:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            age = self._now() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        except ValueError:
            # Created, and not yet written; or its process was killed between the two.
            return self._now() - path.stat().st_mtime < STALE_SECONDS
        mine, pid = _process(os.getpid()), int(content["pid"])
        if self.by_run and content["by_run"]:
            return bool(pid == mine["pid"])  # the folder's lock is ours, so the process that had it is gone
        here = all(content[key] == mine[key] for key in ("host", "namespace"))
        if here and content["started"]:
            return bool(_process(pid)["started"] == content["started"])
        return age < STALE_SECONDS

    def _now(self) -> float:
        """The time by the clock of whatever keeps the folder, which stamps the claims."""
        probe = self.requests / f".clock-{secrets.token_hex(4)}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    # For the run, which alone decides what there is to do

    def settle(self, step: int) -> list[Path]:
        """The run goes on from `step`: results beyond it are set aside, requests removed. Gives what was set aside."""
        aside = []
        for name in self._names(self.folder):
            if (number := _number(name)) is not None and number > step:
                place = self.folder / "discarded"
                place.mkdir(exist_ok=True)
                path = self.folder / name
                aside.append(place / f"{path.stem}-{secrets.token_hex(3)}{path.suffix}")
                os.replace(path, aside[-1])
        for name in self._names(self.requests):
            if (number := _number(name)) is not None and number > step:
                (self.requests / name).unlink(missing_ok=True)
        return aside

    def clear(self) -> None:
        """Removes what killed processes left: claims on nothing, half-written files, scratch folders that no living
        process works in. Their claims on requests stay, and count as attempts."""
        for name in self._names(self.requests):
            match = _CLAIM.match(name)
            of_nothing = match is not None and not (self.requests / f"{match[1]}.json").exists()
            if of_nothing or name.startswith(".clock-") or name.endswith(".partial"):
                (self.requests / name).unlink(missing_ok=True)
        for name in self._names(self.folder):
            if name.endswith(".partial"):
                (self.folder / name).unlink(missing_ok=True)
        for name in self._names(self.working):
            claims = self.claims(name.rpartition("-")[0])
            if not claims or not self._lives(claims[-1][1]):
                shutil.rmtree(self.working / name, ignore_errors=True)

    def work_folder(self, request: Request) -> Path:
        """A new scratch folder; those of earlier attempts at the same request are removed."""
        self.working.mkdir(parents=True, exist_ok=True)
        for name in self._names(self.working):
            if name.startswith(f"{request.name}-"):
                shutil.rmtree(self.working / name, ignore_errors=True)
        folder = self.working / f"{request.name}-{secrets.token_hex(4)}"
        folder.mkdir()
        return folder

    @staticmethod
    def _names(folder: Path) -> list[str]:
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []


def _number(name: str) -> int | None:
    match = re.match(r"^step-(\d{9,})[.-]", name)
    return int(match[1]) if match else None


def _process(pid: int) -> dict[str, Any]:
    """What makes a process recognisable: host, namespace of its number, number, when it started; "" of one that has
    ended, or where nothing tells. Two containers of one host may have the same name and count their processes anew."""
    started, namespace = "", ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        # state is the first word behind the name, which stands in brackets and may hold anything; Z: has ended
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = words[19] if words[0] not in "ZX" else ""
    return {"host": socket.gethostname(), "namespace": namespace, "pid": pid, "started": started}
