"""What a killed job leaves and the next start meets: half-deleted checkpoints, half a save, a rank that still lives."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kills.laws import rows_in, whole_steps
from rank_faults import at, killed
from rank_jobs import start_ranks, train_ranks
from ranks import run_ranks
from tiny_run import STEPS, make_run, train

from megatron.checkpoint.storage import Storage
from megatron.config.errors import StorageError

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


def _killed_at(operation: str, words: str, _: int) -> None:
    """Dies in a file operation on a path of such words, half done where it deletes."""
    original = getattr(Storage, operation)

    def fatal(self: Storage, path: Path, *more: Any) -> Any:
        if words in str(path):
            for file in [file for file in sorted(path.rglob("*")) if file.is_file()][::2]:
                file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, path, *more)

    setattr(Storage, operation, fatal)


def test_a_run_killed_in_its_very_last_deletion_leaves_nothing_behind(tmp_path: Path) -> None:
    config, output = make_run(tmp_path), tmp_path / "run"
    words = ("--set", "checkpoint.keep=1", "--set", "checkpoint.every=4")
    job = start_ranks(1, config, *words, fault=_killed_in_the_last_deletion)
    assert job.wait() == [-signal.SIGKILL], job.text()
    assert max(whole_steps(output)) == STEPS and list((output / "checkpoints").glob(".old-*"))
    done = train(config, *words)
    assert done.returncode == 0 and "is complete" in done.stdout, done.stderr
    assert not list((output / "checkpoints").glob(".*")) and whole_steps(output) == [8, 14, 20, 24]


def _killed_in_the_last_deletion(_: int) -> None:
    """The deletion of step 16 waits for the save of step 24, and is torn."""
    from megatron.checkpoint.manager import CheckpointManager

    retire = CheckpointManager.retire

    def late(self: CheckpointManager) -> None:
        if (self.folder / f"step-{STEPS:09d}").exists():
            _killed_at("remove_folder", ".old-step", 0)
            retire(self)
        elif not (self.folder / "step-000000020").exists():
            retire(self)

    CheckpointManager.retire = late  # type: ignore[method-assign]


def test_a_complete_run_deletes_what_a_kill_left_to_be_deleted(tmp_path: Path) -> None:
    config, output = make_run(tmp_path), tmp_path / "run"
    words = ("--set", "checkpoint.keep=1", "--set", "checkpoint.every=4")
    job = start_ranks(1, config, *words, fault=_killed_when_published)
    assert job.wait() == [-signal.SIGKILL], job.text()
    assert whole_steps(output) == [8, 14, 16, 20, 24]
    assert train(config, *words).returncode == 0
    assert whole_steps(output) == [8, 14, 20, 24] and not list((output / "checkpoints").glob(".*"))


def _killed_when_published(_: int) -> None:
    """As soon as the last checkpoint has its name; older ones were not deleted either, from step 20 on."""
    from megatron.checkpoint.manager import CheckpointManager

    retire = CheckpointManager.retire

    def fatal(self: CheckpointManager) -> None:
        if (self.folder / f"step-{STEPS:09d}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if not (self.folder / "step-000000020").exists():
            retire(self)

    CheckpointManager.retire = fatal  # type: ignore[method-assign]


def test_a_start_sweeps_what_a_killed_save_left(tmp_path: Path) -> None:
    """Before it trains: on a disk that is nearly full that room is what the next save needs."""
    config, output = make_run(tmp_path), tmp_path / "run"
    job = start_ranks(1, config, fault=partial(_killed_at, "sync_folder", ".tmp-step-000000012"))
    assert job.wait() == [-signal.SIGKILL], job.text()
    assert list((output / "checkpoints").glob(".tmp-step-000000012*"))
    job = start_ranks(1, config, fault=at(1, 0, killed))
    assert job.wait() == [-signal.SIGKILL], job.text()
    assert not list((output / "checkpoints").glob(".*"))
    assert train(config).returncode == 0


def test_a_folder_goes_even_while_somebody_still_writes_in_it(tmp_path: Path) -> None:
    folder = tmp_path / ".tmp-step"
    (folder / "model").mkdir(parents=True)
    end = time.monotonic() + 0.7

    def write() -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            try:
                (folder / "model" / str(number)).write_bytes(b"x")
                (folder / "optimizer").mkdir(exist_ok=True)
            except FileNotFoundError:
                return

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    Storage().remove_folder(folder)
    for writer in writers:
        writer.join()
    assert not folder.exists()


def test_B1_a_folder_that_cannot_go_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match=r"\.old-step: cannot remove: Input/output error"):
        Storage().remove_folder(tmp_path / ".old-step")


def _slow_tensors(killed: int, mine: int) -> None:
    """The save of step 9: one rank dies in it, the others write for seconds."""
    write = Storage.write_tensors

    def slowly(self: Storage, path: Path, *words: Any) -> Any:
        if "step-000000009" in str(path):
            if mine == killed:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            for _ in range(40):
                time.sleep(0.05)
                (path.parent / f"{path.name}.part-{time.monotonic_ns()}").write_bytes(b"x")
        return write(self, path, *words)

    Storage.write_tensors = slowly  # type: ignore[method-assign]


def test_C1_a_second_start_while_a_rank_of_the_first_still_writes(tmp_path: Path) -> None:
    config, output = make_run(tmp_path), tmp_path / "run"
    first = start_ranks(2, config, fault=partial(_slow_tensors, 0))
    try:
        first.processes[0].join(60)
        assert first.processes[0].exitcode == -signal.SIGKILL, first.text()
        train_ranks(2, config)
    finally:
        codes = first.wait(60)
    assert codes == [-signal.SIGKILL, 10], first.text()
    steps = [row["step"] for row in rows_in(output / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, STEPS + 1)) and max(whole_steps(output)) == STEPS
    assert not list((output / "checkpoints").glob(".*"))


def test_rank_0_that_is_killed_before_it_comes_is_waited_for_once(tmp_path: Path) -> None:
    """It would have held the store: torch's own retries go on for more than twice the bound that they are given."""
    bound = 10
    run_ranks(1, os.getpid)  # so that the fork server has loaded torch
    began = time.monotonic()
    job = start_ranks(2, make_run(tmp_path), "--set", f"health.start_seconds={bound}", missing=[0])
    assert job.wait(120) == [10], job.text()
    assert time.monotonic() - began < 2 * bound
    assert f"within {bound} seconds (health.start_seconds)" in job.text() and "Traceback" not in job.text()
