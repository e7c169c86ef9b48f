"""One checkpoint written by all ranks together: aside, each rank its own files, then manifest and rename by rank 0."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.board import Meeting
from megatron.checkpoint.manifest import NAME, Seal, build_manifest, manifest_bytes
from megatron.checkpoint.storage import Storage
from megatron.config.errors import CheckpointError, StagemixError, StorageError

ASIDE = ".tmp-"

Write = Callable[[Path], dict[str, Seal]]


@dataclass(frozen=True)
class JointSave:
    """What one rank does for a checkpoint. `run` may be called in any thread.

    final: the folder to publish. folders: those inside it that files go to. write: writes this rank's files in the
    folder that it is given and returns their seals by path. On rank 0, prepare is called first, make_way before the
    rename and after_publishing when it is done.
    """

    meeting: Meeting
    storage: Storage
    final: Path
    step: int
    keep_forever: bool
    folders: Sequence[str]
    write: Write
    prepare: Callable[[], None]
    make_way: Callable[[], None]
    after_publishing: Callable[[], None]

    def run(self) -> None:
        """Returns when the checkpoint is published. Else every rank raises, and what was saved before is untouched.

        Raises StorageError that names the rank and its path, or the silent ranks; CheckpointError where the ranks'
        shards do not cover each tensor exactly once.
        """
        if self.meeting.rank == 0:
            self._lead()
        else:
            self._follow()

    def _lead(self) -> None:
        aside = self.final.with_name(f"{ASIDE}{self.final.name}-{secrets.token_hex(4)}")
        topic = "begin"
        try:
            self.prepare()
            for name in ("", *self.folders):
                self.storage.make_folder(aside / name)
            self.meeting.announce("begin", json.dumps({"aside": aside.name}).encode())
            topic = "end"
            self._publish(aside, self._gather(aside))
        except Exception as error:
            # The error that stopped the save is the one to show; the next save sweeps what stays here.
            with contextlib.suppress(StorageError):
                if aside.exists():
                    self.storage.remove_folder(aside)
            with contextlib.suppress(StorageError):
                self.meeting.announce(topic, json.dumps(_telling(error)).encode())
            raise
        self.meeting.announce("end", b"{}")

    def _gather(self, aside: Path) -> dict[str, Seal]:
        """The seals of all ranks' files. Waits for every rank even if one has failed: none may write on in `aside`."""
        failure: Exception | None = None
        seals: dict[str, Seal] = {}
        try:
            seals = self.write(aside)
        except Exception as error:
            failure = error
        try:
            reports = {rank: json.loads(words) for rank, words in self.meeting.collect("written").items()}
        except StorageError:
            if failure is None:
                raise
            reports = {}
        if failure is not None:
            if self.meeting.size > 1 and isinstance(failure, StagemixError):
                raise type(failure)(f"rank 0: {failure}") from failure
            raise failure
        for rank, report in reports.items():
            if "error" in report:
                raise _told(report, f"{self.final}: was not saved: rank {rank}: ")
            seals |= report["files"]
        return seals

    def _publish(self, aside: Path, seals: dict[str, Seal]) -> None:
        manifest = build_manifest(aside, self.step, self.keep_forever, seals)
        self.storage.write_bytes(aside / NAME, manifest_bytes(manifest))
        for path in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
            self.storage.sync_folder(path)
        self.make_way()
        self.storage.rename(aside, self.final)
        self.after_publishing()

    def _follow(self) -> None:
        begin = json.loads(self.meeting.hear("begin"))
        if "error" in begin:
            raise _told(begin)
        aside = self.final.with_name(begin["aside"])
        failure: Exception | None = None
        try:
            if not aside.is_dir():
                raise StorageError(
                    f"{aside}: rank 0 made this folder and rank {self.meeting.rank} does not see it: set run.output to "
                    "a folder that all nodes share"
                )
            report: dict[str, object] = {"files": self.write(aside)}
        except Exception as error:
            failure = error
            report = _telling(error)
        self.meeting.report("written", json.dumps(report).encode())
        try:
            end = json.loads(self.meeting.hear("end"))
            if "error" in end:
                raise _told(end)
        except StagemixError as error:
            if failure is None:
                raise
            # A bug keeps its own traceback; an I/O error is told in the words that all ranks give.
            raise (error if isinstance(failure, StagemixError) else failure) from failure


def _telling(error: Exception) -> dict[str, object]:
    """An error as other ranks are told of it."""
    words = str(error) if isinstance(error, StagemixError) else f"{type(error).__name__}: {error}"
    return {"error": words, "damaged": isinstance(error, CheckpointError)}


def _told(words: dict[str, str], where: str = "") -> StagemixError:
    return (CheckpointError if words["damaged"] else StorageError)(f"{where}{words['error']}")
