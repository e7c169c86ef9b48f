"""Where a run goes on from, and making its folder agree with that before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.board import Board
from megatron.checkpoint.imported import ORIGIN
from megatron.checkpoint.manager import CheckpointManager, CheckpointRef
from megatron.config.errors import ChangedPastError, CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape
from megatron.metrics.sinks import cut_after
from megatron.trainer.run_folder import RunFolder

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """How a start was asked for. Without either: the newest whole checkpoint, or step 0 where there is none."""

    fresh: bool = False
    resume_from: Path | None = None


def find_checkpoint(
    start: Start, folder: RunFolder, manager: CheckpointManager, say: Say, writes: bool = True
) -> CheckpointRef | None:
    """All ranks: the checkpoint to go on from, or None for a new run. writes: for the rank that owns the folder.

    Raises CheckpointError where the one asked for is damaged or no checkpoint is whole, ConfigError for a fresh start
    in an occupied folder and for a foreign checkpoint in one.
    """
    if start.fresh:
        if writes:
            folder.refuse_occupied()
        return None
    if start.resume_from is None:
        return manager.newest_whole(say)
    if (start.resume_from / "checkpoints").is_dir():
        raise ConfigError(
            f"--resume-from {start.resume_from}: is a run's folder: name one of its checkpoints/step-…, or leave the "
            "option out to go on from the newest"
        )
    if writes and not _is_own(start.resume_from, manager) and manager.steps():
        raise ConfigError(
            f"--resume-from {start.resume_from}: is not of this run, and {folder.path} already holds checkpoints of "
            "its own: set run.output to another folder"
        )
    try:
        found = manager.open(start.resume_from)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. --resume-from needs a whole checkpoint: name another, or leave it out to go on from the newest "
            "whole one"
        ) from None
    if ORIGIN in found.state:
        raise ConfigError(
            f"--resume-from {start.resume_from}: is an imported model, not a checkpoint of a run: say "
            f'take = {{ weights = "{start.resume_from}" }} in the first stage instead'
        )
    return found


def check_shape(found: CheckpointRef, shape: ModelShape) -> None:
    """Raises ChangedPastError that names each field in which the model differs from the checkpoint's."""
    # Fields that are younger than the checkpoint have their defaults in it.
    then, now = ModelShape.from_json(found.state["model"]).to_json(), shape.to_json()
    # A longer training stage may be added later: the length limit of rotary positions is no weight, nor is what an
    # export is to be.
    free = {"family", "max_position_embeddings"} if shape.position_embedding == "rope" else {"family"}
    names = sorted((then.keys() | now.keys()) - free)
    differences = [
        f"{name} was {then.get(name)} and is now {now.get(name)}" for name in names if then.get(name) != now.get(name)
    ]
    if differences:
        raise ChangedPastError(
            f"{found.path}: the config's model is not the one that was trained: {'; '.join(differences)}: "
            "put it back, or start another run in another run.output"
        )


def settle(
    found: CheckpointRef | None, folder: RunFolder, manager: CheckpointManager, say: Say, writes: bool = True
) -> None:
    """All ranks: sets aside what lies beyond the checkpoint that the run goes on from: rows of metrics, and newer
    checkpoints where an older one was asked for by name; the rank that writes does so. Nothing is deleted but what
    killed saves left half written. A foreign checkpoint becomes the run's first."""
    step = found.step if found else 0
    if writes:
        manager.sweep()
        for number, path in manager.steps():
            if number > step and manager.is_whole_as_far_as_known(path):
                say(f"set aside {path} as {manager.set_aside(path)}: the run goes on from step {step}")
        if rows := cut_after(folder.metrics, step):
            say(f"set aside {rows} rows of metrics beyond step {step} in {folder.path / 'metrics.discarded.jsonl'}")
    if found and not _is_own(found.path, manager):
        # Else a kill before the first save would start the run over from nothing.
        manager.adopt(found)
    if writes and found and step and not folder.metrics.exists():
        say(f"note: {folder.metrics} is not there: rows up to step {step} are missing from it")


def whole_checkpoint_at(path: Path, board: Board | None = None) -> CheckpointRef:
    """All ranks of the board: the checkpoint that a user means by a path: a checkpoint folder, or a run's folder and
    its newest whole one.

    Raises CheckpointError.
    """
    if (path / "checkpoints").is_dir():
        found = CheckpointManager(path / "checkpoints", board=board).newest_whole(lambda _: None)
        if found is None:
            raise CheckpointError(f"{path}: holds no checkpoint yet")
        return found
    return CheckpointManager(path.parent, board=board).open(path)


def _is_own(path: Path, manager: CheckpointManager) -> bool:
    return path.resolve().parent == manager.folder.resolve()
