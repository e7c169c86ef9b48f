"""Saves by real ranks, some of which kill themselves: what tests of checkpoints have in common."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from checkpoint.cut_tensors import cut, tensors_of
from ranks import start_bodies

from megatron.checkpoint.manager import CheckpointManager, CheckpointRef
from megatron.checkpoint.manifest import Seal
from megatron.checkpoint.storage import Storage, Tensors
from megatron.config.errors import StagemixError
from megatron.config.layout import Layout
from megatron.parallel.mesh import launched, open_mesh
from megatron.parallel.rank_board import RankBoard

PHASES_OF_ALL = ("before writing", "half a file", "after its files", "after posting")
PHASES_OF_RANK_0 = ("before the manifest", "half the manifest", "before the rename", "after the rename", "retiring")


class FatalStorage(Storage):
    """Kills its process at a phase of a save."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def write_tensors(self, path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Seal:
        self._die_at("before writing")
        seal = super().write_tensors(path, tensors, metadata)
        if self.phase == "half a file":
            os.truncate(path, seal["bytes"] // 2)
            die()
        return seal

    def write_bytes(self, path: Path, data: bytes) -> Seal:
        if path.name == "manifest.json":
            self._die_at("before the manifest")
            if self.phase == "half the manifest":
                path.write_bytes(data[: len(data) // 2])
                die()
        return super().write_bytes(path, data)

    def rename(self, source: Path, target: Path) -> None:
        if target.name.startswith("step-"):
            self._die_at("before the rename")
        super().rename(source, target)
        if target.name.startswith("step-"):
            self._die_at("after the rename")

    def remove_folder(self, path: Path) -> None:
        if self.phase == "retiring":
            for file in [file for file in sorted(path.rglob("*")) if file.is_file()][::2]:
                file.unlink()
            die()
        super().remove_folder(path)

    def _die_at(self, phase: str) -> None:
        if self.phase == phase:
            die()


class FatalBoard(RankBoard):
    """Kills its process before or after it has posted that its files are written; rank 0 has nothing to post then."""

    phase = ""

    def post(self, key: str, words: bytes) -> None:
        mine = "/written/" in key or (self.rank == 0 and "/begin" in key)
        if mine and self.phase == "after its files":
            die()
        super().post(key, words)
        if mine and self.phase == "after posting":
            die()


def die() -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def board_here(ranks: int) -> RankBoard:
    """Opens the mesh of a data-parallel layout; the board over its store."""
    mesh = open_mesh(Layout(replicate=ranks), launched(), 60)
    assert mesh.store is not None
    return FatalBoard(mesh.store, mesh.rank, mesh.world_size)


def save_cut(manager: CheckpointManager, board: RankBoard, step: int, way: str, **options: Any) -> Path:
    """Saves `tensors_of(step)`, cut; the optimizer's are twice as large and cut by rows."""
    tensors = tensors_of(step)
    model = cut(tensors, way, board.rank, board.size)
    optimizer = cut({f"{name}/exp_avg": tensor * 2 for name, tensor in tensors.items()}, "rows", board.rank, board.size)
    extra: dict[str, bytes | Path] = {"config.toml": b"[run]\n", "tokenizer/words": Path(__file__)}
    return manager.save(step, model, optimizer, {"cpu": torch.arange(step)}, {"step": step}, extra, **options)


def assert_holds(found: CheckpointRef | None, step: int) -> None:
    """A checkpoint holds what `save_cut` was given, bit for bit."""
    assert found is not None and found.step == step and found.state == {"step": step}
    tensors = tensors_of(step)
    for source, factor, suffix in ((found.model(), 1, ""), (found.optimizer(), 2, "/exp_avg")):
        assert set(source.names()) == {name + suffix for name in tensors}
        for name, tensor in tensors.items():
            read = source.whole(name + suffix)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor * factor), name
    assert torch.equal(found.rng()["cpu"], torch.arange(step))


def save_and_tell(
    ranks: int, folder: Path, step: int, way: str, victim: int, phase: str, asynchronous: bool, seconds: float
) -> tuple[str, float]:
    """A body for ranks: "saved" or the error's words, and the seconds it took."""
    board = board_here(ranks)
    storage = Storage()
    if board.rank == victim:
        board.phase = phase
        storage = FatalStorage(phase)
    manager = CheckpointManager(folder, 1, storage, board, seconds)
    began = time.monotonic()
    try:
        save_cut(manager, board, step, way, asynchronous=asynchronous)
        manager.finish()
    except StagemixError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "saved", time.monotonic() - began


def run_to_the_end(ranks: int, body: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """As run_ranks, but every rank goes on to its own end; None for one that was killed."""
    _store, pipes, processes = start_bodies(ranks, body, args)
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    try:
        while len(results) < ranks:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], end - time.monotonic())
            assert ready, f"ranks {sorted(set(range(ranks)) - results.keys())} gave nothing within {timeout} seconds"
            for pipe in ready:
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())
                    assert kind == "result", value
                except EOFError:
                    value = None
                results[pipes.index(pipe)] = value  # type: ignore[arg-type]
    finally:
        for process in processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
            process.join(10)
    return [results[rank] for rank in range(ranks)]
