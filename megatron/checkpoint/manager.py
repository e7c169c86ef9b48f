"""Saving, finding, opening and retiring checkpoints under one folder (laws C1 and C2).

A checkpoint is a folder `step-000001000`:

    manifest.json               files with bytes and sha256, tensors with shape, dtype and all shards; written last
    state.json                  step, consumed samples and tokens, data position, precision, …: plain JSON
    model/*.safetensors         weights by global name, fp32 masters: model-<rank>-of-<ranks>-<number>, all from 0
    optimizer/*.safetensors     "<parameter>/exp_avg", "<parameter>/exp_avg_sq", "<parameter>/step"
    rng.safetensors             states of the random generators
    config.toml, tokenizer/…    copies of what the run was made with

Every rank writes the shards that it holds, and any rank reads any box of any tensor, whatever cut it was saved in.
torch.distributed.checkpoint's HuggingFaceStorageReader reads and reshards the same files.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.board import Board, LocalBoard, Meeting
from megatron.checkpoint.host_copies import HostCopies
from megatron.checkpoint.joint_save import ASIDE, JointSave, Write
from megatron.checkpoint.manifest import NAME, Seal, read_manifest, verify
from megatron.checkpoint.shard_files import write_shards
from megatron.checkpoint.storage import Storage, Tensors, read_tensors
from megatron.checkpoint.stored_tensors import StoredTensors
from megatron.checkpoint.tensor_shards import TensorShards
from megatron.config.errors import CheckpointError

RETIRED = ".old-"
_STEP = re.compile(r"^step-(\d{9,})$")


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that was found whole. tensors: of its manifest, part -> name -> shape, dtype, shards."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: Mapping[str, Mapping[str, Any]] = field(repr=False, compare=False)

    def model(self) -> StoredTensors:
        """Weights by global name, read when asked for."""
        return StoredTensors(self.path, self.tensors["model"])

    def optimizer(self) -> StoredTensors:
        """Optimizer state, flat, "<parameter>/<field>", read when asked for."""
        return StoredTensors(self.path, self.tensors["optimizer"])

    def rng(self) -> dict[str, torch.Tensor]:
        """States of the random generators, in memory."""
        return read_tensors(self.path / "rng.safetensors")


class _Flight:
    """A save that runs in a thread of its own."""

    def __init__(self, step: int, save: JointSave) -> None:
        self.step = step
        self.error: BaseException | None = None
        self._save = save
        self.thread = threading.Thread(target=self._run, name=f"save of step {step}")
        self.thread.start()

    def _run(self) -> None:
        try:
            self._save.run()
        except BaseException as error:
            self.error = error


class CheckpointManager:
    """The checkpoints of one run. `keep` newest ones stay, and besides them those saved with `keep_forever`.

    Every rank has one, with its board. Methods marked "all ranks" are called by every rank in the same order, from one
    thread, and end alike on all of them.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        storage: Storage | None = None,
        board: Board | None = None,
        seconds: float = 1800,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """board: None for one process. seconds: bound of each wait for other ranks. say: hears notes, on rank 0."""
        self.folder = Path(folder)
        self.keep = keep
        self.storage = storage or Storage()
        self._board = board or LocalBoard()
        self._seconds = seconds
        self._say = say or (lambda words: None)
        self.holds: Callable[[Path], bool] = lambda path: False
        """Rank 0: whether a checkpoint is in use and must not be deleted yet, however old. Asked in any thread."""
        self._damaged: set[Path] = set()
        self._flight: _Flight | None = None
        self._copies = HostCopies()

    def save(
        self,
        step: int,
        model: TensorShards,
        optimizer: TensorShards,
        rng: Tensors,
        state: dict[str, Any],
        extra_files: Mapping[str, bytes | Path] | None = None,
        keep_forever: bool = False,
        retire: bool = True,
        asynchronous: bool = False,
    ) -> Path:
        """All ranks: writes a checkpoint aside, makes it durable, publishes it by one rename; retires surplus old ones.

        model, optimizer: what this rank is to write; over all ranks they cover each tensor exactly once (`whole_shards`
        for plain tensors). They are read once, name by name in sorted order. rng, state and extra_files (path in the
        checkpoint -> bytes, or a file to copy): of rank 0, the others' are not looked at. With `retire=False` no older
        checkpoint is deleted. Returns the folder's path.

        With `asynchronous=True` it returns when everything is copied to host memory: what changes afterwards is not in
        the checkpoint, which is there once `finish` has returned. A save in flight is waited for first.

        Raises StorageError that names rank and path, or the ranks that did not answer, also for the save in flight;
        CheckpointError where shards do not cover a tensor. Whatever was saved before is then still there, untouched.
        """
        self._land(step)
        extra = dict(extra_files or {})
        write: Write
        try:
            parts = {"model": model, "optimizer": optimizer}
            if asynchronous:
                parts = {part: self._copies.of_shards(part, shards) for part, shards in parts.items()}
                rng = {name: tensor.detach().to("cpu", copy=True) for name, tensor in rng.items()}
                self._copies.wait()
                extra = {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in extra.items()}
            words = (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()
            write = partial(self._write, parts=parts, rng=rng, state=words, extra_files=extra)
        except Exception as error:
            # The other ranks are on their way: they must hear of it rather than wait for this one.
            write = partial(_fail, error=error)
        joint = self._joint(step, keep_forever, retire, ["model", "optimizer", *_folders_of(extra)], write)
        if asynchronous:
            self._flight = _Flight(step, joint)
        else:
            joint.run()
        return joint.final

    def finish(self) -> None:
        """All ranks: waits for the save in flight, where there is one. Raises what went wrong in it, as `save` does."""
        flight, self._flight = self._flight, None
        if flight:
            flight.thread.join()
            if flight.error:
                raise flight.error

    @property
    def in_flight(self) -> bool:
        """Whether a save runs beside training, as far as `poll` and `finish` have seen."""
        return self._flight is not None

    def poll(self) -> None:
        """Raises what went wrong in a save that is no longer in flight. Never waits."""
        if self._flight and not self._flight.thread.is_alive():
            self.finish()

    def adopt(self, found: CheckpointRef, keep_forever: bool = True) -> Path:
        """All ranks: makes a copy of a whole checkpoint of another run one of this run's, under the same step.

        Files are copied one by one, each rank its share, and checked on the way; no tensor is decoded and nothing is
        retired. Returns the copy's path. Raises as `save` does, CheckpointError where a file is no longer whole.
        """
        self._land(found.step)
        files: dict[str, Seal] = read_manifest(found.path)["files"]

        def write(aside: Path) -> dict[str, Seal]:
            seals = {}
            for name in sorted(files)[self._board.rank :: self._board.size]:
                seals[name] = self.storage.copy_file(found.path / name, aside / name)
                if seals[name] != files[name]:
                    raise CheckpointError(f"{found.path / name}: expected {files[name]}, found {seals[name]}")
            return seals

        joint = self._joint(found.step, keep_forever, False, ["model", "optimizer", *_folders_of(files)], write)
        joint.run()
        return joint.final

    def steps(self) -> list[tuple[int, Path]]:
        """Every published checkpoint, whole or not, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = [(_STEP.match(path.name), path) for path in self.folder.iterdir() if path.is_dir()]
        return sorted((int(match.group(1)), path) for match, path in matches if match)

    def newest_name(self) -> str:
        """The newest checkpoint's path, for messages."""
        steps = self.steps()
        return str(steps[-1][1]) if steps else "not yet written"

    def newest_whole(self, report: Callable[[str], None], up_to: int | None = None) -> CheckpointRef | None:
        """All ranks: the newest checkpoint that is whole, or None where there is none at all. up_to: the step beyond
        which none is looked at.

        Each damaged one is named to `report` on rank 0 and passed over. Raises CheckpointError where all are damaged.
        """
        problems: list[str] = []
        for path in self._steps_seen_by_rank_0(up_to):
            try:
                found = self.open(path)
            except CheckpointError as error:
                problems.append(str(error))
                self._damaged.add(path)
                if self._board.rank == 0:
                    report(f"damaged checkpoint passed over: {error}")
                continue
            return found
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of its {len(problems)} checkpoints is whole; the newest: {problems[0]}. "
                "Restore one from a copy, or set run.output to another folder to begin again"
            )
        return None

    def open(self, path: Path) -> CheckpointRef:
        """All ranks: the checkpoint at `path`, every byte of it verified by one rank.

        Raises CheckpointError where it is absent or damaged; StorageError where a rank does not answer.
        """
        meeting = self._meet(path)
        problem, found = "", None
        try:
            found = _open(Path(path), meeting.rank, meeting.size)
        except Exception as error:
            problem = str(error) if isinstance(error, CheckpointError) else f"{path}: {type(error).__name__}: {error}"
        verdict = meeting.agree("verified", problem)
        if verdict or found is None:
            raise CheckpointError(verdict)
        return found

    def is_whole_as_far_as_known(self, path: Path) -> bool:
        """False for a checkpoint that this manager has found damaged. Nothing is read."""
        return path not in self._damaged

    def set_aside(self, path: Path) -> Path:
        """Rank 0 only, with no save in flight: moves a checkpoint out of the run's sight without deleting it, to
        `discarded/` beside the others."""
        place = self.folder / "discarded"
        self.storage.make_folder(place)
        number = sum(1 for _ in place.iterdir())
        target = place / f"{path.name}-{number:03d}"
        self.storage.rename(path, target)
        return target

    def _meet(self, about: Path) -> Meeting:
        return Meeting(self._board, self._seconds, str(about))

    def _land(self, step: int) -> None:
        """The save in flight is waited for, with a note if that takes long enough to notice."""
        flight, began = self._flight, time.monotonic()
        self.finish()
        seconds = time.monotonic() - began
        if flight and seconds > 0.1 and self._board.rank == 0:
            self._say(f"waited {seconds:.1f} s for the save of step {flight.step} before that of step {step}")

    def _joint(self, step: int, keep_forever: bool, retire: bool, folders: list[str], write: Write) -> JointSave:
        final = self.folder / f"step-{step:09d}"

        def make_way() -> None:
            if final.exists():
                self.set_aside(final)

        def after_publishing() -> None:
            self._damaged.discard(final)
            if retire:
                self.retire()

        return JointSave(
            self._meet(final),
            self.storage,
            final,
            step,
            keep_forever,
            list(dict.fromkeys(folders)),
            write,
            self.sweep,
            make_way,
            after_publishing,
        )

    def _steps_seen_by_rank_0(self, up_to: int | None) -> list[Path]:
        """The newest first. A rank may see a shared folder late."""
        meeting = self._meet(self.folder)
        names = [path.name for step, path in reversed(self.steps()) if up_to is None or step <= up_to]
        if meeting.rank == 0:
            meeting.announce("steps", json.dumps(names).encode())
        else:
            names = json.loads(meeting.hear("steps"))
        return [self.folder / name for name in names]

    def _write(
        self,
        aside: Path,
        parts: Mapping[str, TensorShards],
        rng: Tensors,
        state: bytes,
        extra_files: Mapping[str, bytes | Path],
    ) -> dict[str, Seal]:
        """This rank's files; rank 0 also writes what there is only one of."""
        seals: dict[str, Seal] = {}
        for part, shards in parts.items():
            seals |= write_shards(self.storage, aside, part, shards, self._board.rank, self._board.size)
        if self._board.rank:
            return seals
        seals["rng.safetensors"] = self.storage.write_tensors(aside / "rng.safetensors", rng)
        seals["state.json"] = self.storage.write_bytes(aside / "state.json", state)
        for name, content in extra_files.items():
            if isinstance(content, bytes):
                seals[name] = self.storage.write_bytes(aside / name, content)
            else:
                seals[name] = self.storage.copy_file(content, aside / name)
        return seals

    def sweep(self) -> None:
        """Rank 0 only, with no other save in flight: removes what killed saves and deletions left behind. Each save
        begins with it; a run that saves nothing any more, or starts on a disk that is nearly full, needs it, too."""
        self.storage.make_folder(self.folder)
        for path in list(self.folder.iterdir()):
            if path.name.startswith((ASIDE, RETIRED)):
                self.storage.remove_folder(path)

    def retire(self) -> None:
        """Rank 0 only, with no other save in flight: deletes surplus old checkpoints, but those that are in use."""
        passing = [path for _, path in self.steps() if path not in self._damaged and not _keeps_forever(path)]
        for path in passing[: -self.keep]:
            if self.holds(path):
                continue
            # Renamed first: a half-deleted folder must never look like a checkpoint.
            retired = path.with_name(f"{RETIRED}{path.name}")
            self.storage.rename(path, retired)
            self.storage.remove_folder(retired)


def open_checkpoint(path: Path) -> CheckpointRef:
    """The checkpoint at `path`, every byte of it verified by this process alone.

    Raises CheckpointError where it is absent or damaged.
    """
    return _open(Path(path), 0, 1)


def _open(path: Path, rank: int, ranks: int) -> CheckpointRef:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    manifest = verify(path, rank, ranks)
    for name in ("state.json", "rng.safetensors"):
        if name not in manifest["files"]:
            raise CheckpointError(f"{path / name}: expected in {NAME}, found no entry")
    state = json.loads((path / "state.json").read_bytes())
    return CheckpointRef(path, manifest["step"], state, manifest["tensors"])


def _keeps_forever(path: Path) -> bool:
    try:
        return bool(read_manifest(path)["keep_forever"])
    except CheckpointError:
        return True  # not ours to delete: its damage is named when the run looks for a checkpoint


def _fail(aside: Path, error: Exception) -> dict[str, Seal]:
    raise error


def _folders_of(files: Mapping[str, Any]) -> list[str]:
    return sorted({Path(name).parent.as_posix() for name in files} - {"."})
