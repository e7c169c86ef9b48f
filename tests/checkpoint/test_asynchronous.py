"""Asynchronous saves: of the step they were asked at, whole or absent, one at a time, no error lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint.cut_tensors import tensors_of
from checkpoint.rank_saves import assert_holds, board_here, save_cut
from ranks import run_ranks

from megatron.checkpoint.manager import CheckpointManager
from megatron.checkpoint.manifest import Seal
from megatron.checkpoint.storage import Storage, Tensors, io_errors
from megatron.checkpoint.tensor_shards import TensorShards, whole_shards
from megatron.config.errors import StorageError


def silent(_: str) -> None:
    raise AssertionError("nothing should have been reported")


class HeldStorage(Storage):
    """Writes no tensor before it is let go; then fails, where it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.go, self.fails = threading.Event(), fails

    def write_tensors(self, path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Seal:
        assert self.go.wait(60)
        if self.fails:
            with io_errors(path, "write"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write_tensors(path, tensors, metadata)


def save(manager: CheckpointManager, step: int, tensors: dict[str, torch.Tensor], asynchronous: bool = True) -> Path:
    twice: TensorShards = whole_shards({f"{name}/exp_avg": tensor * 2 for name, tensor in tensors.items()})
    rng, state = {"cpu": torch.arange(step)}, {"step": step}
    path = manager.save(step, whole_shards(tensors), twice, rng, state, asynchronous=asynchronous)
    rng["cpu"].zero_()
    state["step"] = -1
    return path


def test_the_state_is_that_of_the_step_it_was_called_at(tmp_path: Path) -> None:
    storage = HeldStorage()
    manager = CheckpointManager(tmp_path, storage=storage)
    tensors = tensors_of(5)
    path = save(manager, 5, tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert not path.exists() and not manager.steps()
    manager.poll()
    storage.go.set()
    manager.finish()
    assert_holds(manager.newest_whole(silent), 5)
    manager.finish()


def test_the_next_save_waits_for_the_last_and_says_so(tmp_path: Path) -> None:
    storage, said = HeldStorage(), []
    manager = CheckpointManager(tmp_path, keep=1, storage=storage, say=said.append)
    save(manager, 1, tensors_of(1))
    threading.Timer(0.5, storage.go.set).start()
    save(manager, 2, tensors_of(2))
    assert len(said) == 1 and said[0].startswith("waited 0.") and "step 1 before that of step 2" in said[0]
    save(manager, 3, tensors_of(3), asynchronous=False)
    assert [step for step, _ in manager.steps()] == [3]
    assert_holds(manager.newest_whole(silent), 3)


@pytest.mark.parametrize("how", ["finish", "poll", "save"])
def test_an_error_surfaces_once_at_the_next_call(tmp_path: Path, how: str) -> None:
    storage = HeldStorage()
    manager = CheckpointManager(tmp_path, storage=storage)
    storage.go.set()
    save(manager, 1, tensors_of(1))
    manager.finish()
    storage.fails = True
    path = save(manager, 2, tensors_of(2))
    with pytest.raises(StorageError, match="No space left"):
        if how == "finish":
            manager.finish()
        elif how == "save":
            save(manager, 3, tensors_of(3))
        for _ in range(600):
            manager.poll()
            time.sleep(0.1)
    manager.finish()
    manager.poll()
    assert not path.exists() and [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    assert_holds(manager.newest_whole(silent), 1)
    storage.fails = False
    save(manager, 3, tensors_of(3))
    manager.finish()
    assert_holds(manager.newest_whole(silent), 3)


def test_a_failed_copy_to_the_host_is_an_error_of_the_save(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    shards = whole_shards({"a": torch.zeros(3, device="meta")})
    manager.save(1, shards, {}, {"cpu": torch.zeros(1)}, {"step": 1}, asynchronous=True)
    with pytest.raises(NotImplementedError, match="meta"):
        manager.finish()
    assert not list(tmp_path.iterdir())


def train_on(ranks: int, folder: Path) -> None:
    board = board_here(ranks)
    manager = CheckpointManager(folder, keep=2, board=board, seconds=60)
    total = torch.zeros(4)
    for step in range(1, 41):
        total += 1
        dist.all_reduce(total)
        total /= ranks
        if step % 8 == 0:
            save_cut(manager, board, step, "flat", asynchronous=True)
        manager.poll()
    manager.finish()
    assert total.tolist() == [40.0] * 4
    assert [step for step, _ in manager.steps()] == [32, 40]
    assert_holds(manager.newest_whole(silent), 40)


def test_ranks_train_on_with_their_collectives_meanwhile(tmp_path: Path) -> None:
    run_ranks(3, train_on, 3, tmp_path)


END_AMID_A_SAVE = """
import sys, threading, torch
from megatron.checkpoint.board import LocalBoard
from megatron.checkpoint.manager import CheckpointManager
from megatron.checkpoint.tensor_shards import whole_shards
class Lonely(LocalBoard):
    size = 2
import megatron.checkpoint.board as board
board._AT_EXIT = 1.0
manager = CheckpointManager(sys.argv[1], board=Lonely(), seconds=3600)
manager.save(1, whole_shards({"a": torch.zeros(3)}), {}, {"cpu": torch.zeros(1)}, {}, asynchronous=True)
raise SystemExit(42)
"""


def test_a_process_that_ends_amid_a_save_does_not_wait_for_others_for_long(tmp_path: Path) -> None:
    """Its thread waits for rank 1, which never was; the exit code is that of the main thread."""
    done = subprocess.run([sys.executable, "-c", END_AMID_A_SAVE, str(tmp_path / "run")], timeout=60, check=False)
    assert done.returncode == 42 and not list((tmp_path / "run").iterdir())


@pytest.mark.soak
def test_time_that_the_training_thread_is_blocked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {f"layers.{number}.weight": torch.randn(4096, 4096) for number in range(12)}
    seconds = {}
    for name, asynchronous in (("synchronous", False), ("asynchronous", True)):
        manager = CheckpointManager(tmp_path / name, keep=1)
        for step in (1, 2, 3):
            began = time.perf_counter()
            manager.save(step, whole_shards(tensors), {}, {"cpu": torch.zeros(1)}, {}, asynchronous=asynchronous)
            seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - began)
            manager.finish()
    with capsys.disabled():
        words = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        print(f"\nsave of {sum(t.numel() * 4 for t in tensors.values()) / 1e6:.0f} MB blocks training for: {words}")
