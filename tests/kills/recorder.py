"""What each rank of a job is doing, kept where it outlives a SIGKILL: a mapped file, read by the test that kills.

`install` is a fault for `start_ranks`: it changes no arithmetic and no file of the run, only notes what goes on; and
makes file operations of a save take as long as on a slow disk, where it is asked to, so that kills meet saves.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SLOT = 96
_MAIN, _SAVE, _STEPS = range(3)
STORAGE = ("make_folder", "write_bytes", "write_tensors", "copy_file", "sync_folder", "rename", "remove_folder")

START, FIRST, TRAIN, VALIDATE = "start-up", "first step", "training", "validation"
BETWEEN, FILE, PUBLISH, RETIRE = "save, between files", "save, in a file", "save, manifest to rename", "save, retiring"
WAIT, END = "save, waits", "finish and exit"
PHASES = (START, FIRST, TRAIN, VALIDATE, WAIT, BETWEEN, FILE, PUBLISH, RETIRE, END)


@dataclass(frozen=True)
class Noted:
    """What a rank did last. save: the file operation of the save in flight; empty where none is."""

    main: str
    save: str
    steps: int

    @property
    def phase(self) -> str:
        """One of PHASES."""
        if self.save:
            return _phase_of_a_save(self.save)
        if self.main in ("exit.json", "leaves"):
            return END
        if self.main == "checkpoint":
            return WAIT
        if self.main == "validation":
            return VALIDATE
        if self.steps:
            return TRAIN
        return FIRST if self.main in ("engine", "data") else START

    @property
    def beside(self) -> bool:
        """Whether a save ran while this rank trained on."""
        return bool(self.save) and self.main != "checkpoint"


def _phase_of_a_save(words: str) -> str:
    operation, _, name = words.partition(" ")
    if operation in ("write_tensors", "write_bytes", "copy_file") and name != "manifest.json":
        return FILE
    if operation == "remove_folder" or name.startswith(".old-"):
        return RETIRE
    return PUBLISH if operation in ("write_bytes", "sync_folder", "rename") else BETWEEN


class Recorder:
    """The mapped file of one rank; made by the test, written by the rank."""

    def __init__(self, path: Path, new: bool = False) -> None:
        if new:
            path.write_bytes(bytes(3 * _SLOT))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 3 * _SLOT)

    def note(self, slot: int, words: str) -> None:
        """Keeps words of less than a hundred bytes."""
        self._map[slot * _SLOT : (slot + 1) * _SLOT] = words.encode()[: _SLOT - 1].ljust(_SLOT, b"\0")

    def words(self, slot: int) -> str:
        """What was kept."""
        return self._map[slot * _SLOT : (slot + 1) * _SLOT].rstrip(b"\0").decode(errors="replace")

    def noted(self) -> Noted:
        """All of it."""
        return Noted(self.words(_MAIN), self.words(_SAVE), int(self.words(_STEPS) or 0))


def recorder_path(folder: Path, rank: int) -> Path:
    """Of a rank's mapped file."""
    return folder / f"rank-{rank}"


def install(folder: Path, slow: float, rank: int) -> None:
    """In a rank, before `train`: notes go to its mapped file. slow: up to so many seconds for each file operation."""
    os.setsid()  # whatever it starts is found by its session afterwards
    recorder = Recorder(recorder_path(folder, rank))
    recorder.note(_MAIN, "imports")
    _note_the_main_thread(recorder, slow)
    _note_saves(recorder, random.Random(rank), slow)


def _note_the_main_thread(recorder: Recorder, slow: float) -> None:
    import megatron.trainer.job as job
    from megatron.metrics.meters import StepClock
    from megatron.trainer.attempt import Attempt
    from megatron.trainer.state import TrainerState

    spending, advance, ends = StepClock.spending, TrainerState.advance, Attempt.ends

    @contextmanager
    def noted_spending(self: StepClock, name: str) -> Iterator[None]:
        before = recorder.words(_MAIN)
        recorder.note(_MAIN, name)
        with spending(self, name):
            yield
        recorder.note(_MAIN, before)

    def noted_advance(self: TrainerState, *words: Any) -> None:
        advance(self, *words)
        recorder.note(_STEPS, str(int(recorder.words(_STEPS) or 0) + 1))

    def noted_end(self: Attempt, *words: Any) -> None:
        recorder.note(_MAIN, "exit.json")
        time.sleep(slow)
        ends(self, *words)
        time.sleep(slow)

    def noted_at(at: Callable[..., None]) -> Callable[..., None]:
        def noted(self: object, phase: str, step: int | None = None) -> None:
            recorder.note(_MAIN, phase)
            at(self, phase, step)

        return noted

    StepClock.spending = noted_spending  # type: ignore[method-assign]
    TrainerState.advance = noted_advance  # type: ignore[method-assign]
    Attempt.ends = noted_end  # type: ignore[method-assign]
    for kind in (job.OneProcess, job.Rank):
        kind.at = noted_at(kind.at)  # type: ignore[method-assign]


def _note_saves(recorder: Recorder, chance: random.Random, slow: float) -> None:
    from megatron.checkpoint.joint_save import JointSave
    from megatron.checkpoint.storage import Storage

    run = JointSave.run

    def noted_run(self: JointSave) -> None:
        recorder.note(_SAVE, "waits")
        try:
            run(self)
        finally:
            recorder.note(_SAVE, "")

    def noted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Storage, *words: Any, **more: Any) -> Any:
            path = words[1] if name == "copy_file" else words[0]
            recorder.note(_SAVE, f"{name} {Path(path).name}")
            time.sleep(slow * chance.random() / 2)
            done = operation(self, *words, **more)
            time.sleep(slow * chance.random() / 2)
            recorder.note(_SAVE, "between")
            return done

        return wrapped

    JointSave.run = noted_run  # type: ignore[method-assign]
    for name in STORAGE:
        setattr(Storage, name, noted(name, getattr(Storage, name)))
