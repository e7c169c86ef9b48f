"""Asynchronous saves of a whole run on several ranks: the checkpoints of a synchronous one, whole whoever is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import start_ranks, train_ranks
from safetensors.torch import load_file
from tiny_run import curve_of, exit_record, make_run, rows_of, steps_in

from megatron.checkpoint.manager import open_checkpoint

pytestmark = pytest.mark.timeout(300)
FULL_SHARD = ("parallel.data_shard='full'", "checkpoint.keep=100", "stages.cooldown.steps=2")
BEFORE = tuple(word for change in FULL_SHARD for word in ("--set", change))
BESIDE = (*BEFORE, "--set", "checkpoint.asynchronous=true")
SAVED = [3, 6, 8, 9, 12, 14, 15, 16]
KILLED_AT, GOES_ON_FROM = 12, 9


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora and the run of two ranks that saves before it trains on."""
    folder = tmp_path_factory.mktemp("synchronous")
    train_ranks(2, make_run(folder), *BEFORE)
    assert steps_in(folder / "run") == SAVED
    return folder


@pytest.fixture
def fresh(synchronous: Path, tmp_path: Path) -> Path:
    """The config of a new run over the same corpora; it writes to tmp_path/run."""
    shutil.copytree(synchronous / "data", tmp_path / "data")
    return make_run(tmp_path)


def without_what_differs(state: dict[str, Any]) -> dict[str, Any]:
    """All of state.json but which run it is, and what was measured."""
    return {key: value for key, value in state.items() if key not in ("run_id", "seconds", "precision", "kernels")}


def assert_same_checkpoints(output: Path, reference: Path) -> None:
    """Each checkpoint of both is whole, and holds the same files with the same tensors."""
    assert steps_in(output) == steps_in(reference)
    for step in steps_in(reference):
        ours, theirs = (open_checkpoint(run / "checkpoints" / f"step-{step:09d}") for run in (output, reference))
        assert ours.tensors == theirs.tensors
        assert without_what_differs(ours.state) == without_what_differs(theirs.state)
        names = [sorted(str(p.relative_to(ref.path)) for p in ref.path.rglob("*.*")) for ref in (ours, theirs)]
        assert names[0] == names[1] and sum(name.startswith(("model", "optimizer")) for name in names[0]) == 4
        for name in names[0]:
            if name.endswith(".safetensors"):
                tensors, expected = load_file(ours.path / name), load_file(theirs.path / name)
                assert tensors.keys() == expected.keys() and tensors, name
                assert all(torch.equal(tensors[key], expected[key]) for key in expected), (step, name)


def _slow_files(_: int) -> None:
    """A disk so slow that training is steps ahead while files are written, and waits before the next save."""
    from megatron.checkpoint.storage import Storage

    write = Storage.write_tensors

    def slowly(self: Storage, path: Path, *words: Any) -> Any:
        time.sleep(0.1)
        return write(self, path, *words)

    Storage.write_tensors = slowly  # type: ignore[method-assign]


def test_C1_checkpoints_saved_beside_training_are_those_saved_before_it_goes_on(synchronous: Path, fresh: Path) -> None:
    output = fresh.parent / "run"
    job = train_ranks(2, fresh, *BESIDE, fault=_slow_files)
    assert re.search(r"waited \d+\.\d s for the save of step \d+ before that of step \d+", job.log(0))
    assert curve_of(output) == curve_of(synchronous / "run")
    assert_same_checkpoints(output, synchronous / "run")


def _killed_amid(metrics: Path, victim: int, mine: int) -> None:
    """The victim's save of step KILLED_AT stops in its first file until training is two steps ahead, then kills it."""
    if mine != victim:
        return
    from megatron.checkpoint.storage import Storage

    write = Storage.write_tensors

    def fatal(self: Storage, path: Path, tensors: Mapping[str, Any], *words: Any) -> Any:
        seal = write(self, path, tensors, *words)
        if f"step-{KILLED_AT:09d}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            while f'"step": {KILLED_AT + 2},'.encode() not in metrics.read_bytes():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
        return seal

    Storage.write_tensors = fatal  # type: ignore[method-assign]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("victim", [0, 1])
def test_T2_a_rank_killed_amid_an_asynchronous_save_loses_no_more_than_that_save(
    synchronous: Path, fresh: Path, victim: int
) -> None:
    output = fresh.parent / "run"
    job = start_ranks(2, fresh, *BESIDE, fault=partial(_killed_amid, output / "metrics.jsonl", victim))
    # Mostly a collective fails at once. Where the other already waits for the victim's share of the save, nothing
    # tells it but the missing signs of life, in 120 seconds.
    codes = job.wait(200)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 10, job.text()
    if victim == 1:
        assert exit_record(output)["code"] == 10
    assert rows_of(output)[-1]["step"] >= KILLED_AT + 2, "training went on meanwhile"
    assert steps_in(output) == [step for step in SAVED if step < KILLED_AT]
    assert [path.name[:19] for path in (output / "checkpoints").glob(".tmp-*")] == [f".tmp-step-{KILLED_AT:09d}"]
    again = train_ranks(2, fresh, *BESIDE)
    assert re.search(rf"goes on from \S+/step-{GOES_ON_FROM:09d} ", again.log(0)) and "damaged" not in again.log(0)
    assert curve_of(output) == curve_of(synchronous / "run")
    assert not list((output / "checkpoints").glob(".tmp-*")), "the next save sweeps"
    assert_same_checkpoints(output, synchronous / "run")
    assert json.loads((output / "exit.json").read_text())["code"] == 0
