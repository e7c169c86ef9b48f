"""`train` as several processes: the same samples on any number of ranks, and one end for all when one of them ends."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rank_faults import asked_to_stop, asleep, at, killed, raises, refuses, stopped
from rank_jobs import RankJob, start_ranks, train_ranks
from tiny_run import ROOT, curve_of, exit_record, make_run, rows_of, steps_in, train, validation_of

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora and the run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = train(make_run(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def fresh(alone: Path, tmp_path: Path) -> Path:
    """The config of a new run over the same corpora; it writes to tmp_path/run."""
    shutil.copytree(alone / "data", tmp_path / "data")
    return make_run(tmp_path)


def samples_of(output: Path) -> list[tuple[Any, ...]]:
    """What law M3 speaks of: which samples each step consumed."""
    keys = ("step", "training_stage", "consumed_samples", "consumed_tokens", "batch_digest")
    return [(*(row[key] for key in keys), sorted(row["samples_by_source"].items())) for row in rows_of(output)]


def wait_for_step(job: RankJob, output: Path, step: int, seconds: float = 60) -> None:
    """Until metrics.jsonl has a row of that step."""
    end, path = time.monotonic() + seconds, output / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},'.encode() in path.read_bytes()):
        assert time.monotonic() < end and job.processes[0].is_alive(), job.text()
        time.sleep(0.01)


# Ways to go wrong in one rank


def _another_rows(mine: int) -> None:
    if mine != 1:
        return
    from megatron.data.loader import BatchLoader

    rows = BatchLoader._rows
    BatchLoader._rows = lambda self, size: range(rows(self, size).stop - rows(self, size).start)  # type: ignore[method-assign]


def _other_tokens(mine: int) -> None:
    if mine != 1:
        return
    import megatron.data.loader as module

    read = module.read_microbatch

    def damaged(*arguments: Any) -> Any:
        micro = read(*arguments)
        micro.tokens[0, 0] ^= 1
        return micro

    module.read_microbatch = damaged


# The laws


def test_M3_two_data_ranks_see_the_samples_of_one_process(alone: Path, fresh: Path) -> None:
    job = train_ranks(2, fresh)
    output = fresh.parent / "run"
    assert samples_of(output) == samples_of(alone / "run")
    losses = [row["loss"] for row in rows_of(output)]
    assert losses == pytest.approx([row["loss"] for row in rows_of(alone / "run")], rel=1e-4)
    assert [step for step, _ in validation_of(output)] == [5, 8, 10, 14, 15, 20, 24]
    assert steps_in(output) == steps_in(alone / "run")
    assert exit_record(output)["code"] == 0 and "is complete" in job.log(0)
    assert "step" not in job.log(1), "rank 0 alone speaks"


def test_M3_a_resume_on_another_number_of_ranks_goes_on_with_the_same_samples(alone: Path, fresh: Path) -> None:
    output = fresh.parent / "run"
    small = ("--set", "train.micro_batch_size=2")
    for ranks, number in ((2, signal.SIGTERM), (4, signal.SIGUSR1), (1, None)):
        if number is None:
            assert train(fresh, *small).returncode == 0
            break
        already = max(steps_in(output), default=0)
        job = start_ranks(ranks, fresh, *small, fault=at(4, ranks - 1, asked_to_stop))
        assert job.wait() == [75] * ranks, job.text()
        assert exit_record(output)["code"] == 75 and exit_record(output)["step"] == already + 4
        assert max(steps_in(output)) == already + 4
    assert samples_of(output) == samples_of(alone / "run")
    losses = [row["loss"] for row in rows_of(output)]
    assert losses == pytest.approx([row["loss"] for row in rows_of(alone / "run")], rel=1e-4)


def test_T2_killed_and_resumed_on_two_ranks_equals_the_undisturbed_run(fresh: Path, tmp_path: Path) -> None:
    train_ranks(2, fresh)
    other = make_run(tmp_path, "other")
    choose = random.Random(3)
    job = start_ranks(2, other, fault=at(choose.randint(5, 20), choose.randint(0, 1), killed))
    codes = job.wait()
    assert sorted(codes) == [-signal.SIGKILL, 10], job.text()
    train_ranks(2, other)
    assert curve_of(tmp_path / "other") == curve_of(tmp_path / "run")


# Ends


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bug_in_one_rank_ends_all_and_is_shown_first(fresh: Path, rank: int) -> None:
    began = time.monotonic()
    job = start_ranks(2, fresh, fault=at(6, rank, raises))
    assert job.wait() == [1, 1], job.text()
    assert time.monotonic() - began < 40
    assert job.log(rank).count("Traceback") == 1 and "ValueError: planted in one rank" in job.log(rank)
    other = job.log(1 - rank)
    assert ("rank 1 failed first, with exit code 1: see its own message\n" in other) == (rank == 1), other
    assert all(words not in other for words in ("Traceback", "Connection closed", "planted")), other
    if rank == 1:
        failing = job.log(1).splitlines()
        assert all(line.startswith("[rank 1] ") for line in failing if "planted" in line or "Traceback" in line)
    record = exit_record(fresh.parent / "run")
    assert record["code"] == 1 and "planted in one rank" in record["reason"] and record["step"] == 5


def test_an_error_for_the_user_ends_all_with_its_code_and_no_traceback(fresh: Path) -> None:
    job = start_ranks(3, fresh, "--set", "train.global_batch_size=12", fault=at(2, 2, refuses))
    assert job.wait() == [3, 3, 3], job.text()
    assert "[rank 2] error: planted.bin: cannot be read" in job.log(2)
    assert "rank 2 failed first, with exit code 3: see its own message" in job.log(0) and not job.log(1)
    assert "Traceback" not in job.text() and job.text().count("planted.bin") == 1
    record = exit_record(fresh.parent / "run")
    assert record["code"] == 3 and record["reason"].startswith("rank 2 failed first: planted.bin")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_others_with_10(fresh: Path, rank: int) -> None:
    job = start_ranks(3, fresh, "--set", "train.global_batch_size=12", fault=at(5, rank, killed))
    codes = job.wait(60)
    assert codes[rank] == -signal.SIGKILL and set(codes) == {-signal.SIGKILL, 10}, job.text()
    assert job.text().count("Start the same command again") == 1, job.text()
    assert rank or all("another process of the job was lost" in job.log(other) for other in (1, 2))
    if rank:
        assert re.search(rf"\(rank {rank}: step \d, [a-z ]+, host ", job.text()), job.text()
        assert exit_record(fresh.parent / "run")["code"] == 10


def _killed_while_saving(mine: int) -> None:
    if mine == 1:
        import megatron.checkpoint.manager as module

        module.write_shards = lambda *_: killed()  # type: ignore[assignment]


def test_a_rank_killed_while_saving_ends_the_rest_as_its_launcher_asks_them_to_stop(fresh: Path) -> None:
    output = fresh.parent / "run"
    job = start_ranks(2, fresh, fault=_killed_while_saving)
    job.processes[1].join(60)
    job.send(0, signal.SIGTERM)  # as torchrun and srun do with those that are left
    assert job.wait(60) == [10, -signal.SIGKILL], job.text()
    assert "another process of the job was lost" in job.log(0) and "rank 1" in job.log(0)
    assert exit_record(output)["code"] == 10 and steps_in(output) == []
    train_ranks(2, fresh)
    assert rows_of(output)[-1]["step"] == 24


def test_a_signal_to_one_rank_stops_all_at_one_step(alone: Path, fresh: Path) -> None:
    output = fresh.parent / "run"
    longer = ("--set", "stages.cooldown.steps=2000", "--set", "sources.prose.dry=repeat", "--set", "log.every=1")
    job = start_ranks(2, fresh, *longer, "--set", "sources.python.dry=repeat")
    try:
        wait_for_step(job, output, 3)
        job.send(1, signal.SIGTERM)
    finally:
        codes = job.wait()
    assert codes == [75, 75], job.text()
    record = exit_record(output)
    assert (record["code"], record["reason"]) == (75, "SIGTERM")
    assert record["step"] == max(steps_in(output)) == rows_of(output)[-1]["step"]
    assert "SIGTERM: stopped at step" in job.log(0)


def test_a_second_signal_to_one_rank_ends_all_at_once(fresh: Path) -> None:
    job = start_ranks(2, fresh, fault=at(3, 1, asleep))
    try:
        wait_for_step(job, fresh.parent / "run", 2)
        time.sleep(1)
        job.send(1, signal.SIGTERM)
        time.sleep(1)  # sooner, it is SLURM's echo
        job.send(1, signal.SIGTERM)
    finally:
        codes = job.wait(30)
    assert codes == [143, 143], job.text()
    assert exit_record(fresh.parent / "run")["code"] == 143


# The watchdog


@pytest.mark.parametrize(("act", "rank"), [(asleep, 1), (stopped, 1), (stopped, 0)], ids=["asleep", "stop-1", "stop-0"])
def test_a_rank_that_hangs_is_found_and_named(fresh: Path, act: Callable[[], None], rank: int) -> None:
    job = start_ranks(2, fresh, "--set", "health.watchdog_seconds=4", fault=at(4, rank, act))
    still = act is stopped
    other = 1 - rank
    process = job.processes[other]
    process.join(60)
    if still:
        job.send(rank, signal.SIGKILL)
    codes = job.wait(30)
    assert codes[other] == 9, job.text()
    assert codes[rank] == (-signal.SIGKILL if still else 9), job.text()
    told = job.log(other)
    assert "watchdog" in job.text() and f"stacks of process {process.pid}" in told and "launch_step" in told
    if not still:
        assert "time.sleep" in job.log(1) or "asleep" in job.log(1), "the stack that hangs is shown"
    if rank == 1:
        assert exit_record(fresh.parent / "run")["code"] == 9
        assert job.text().count("step 3, engine") >= 1, "the first of them to notice says where each was"
        assert not still or "rank 1: step 3, engine (no sign of life" in told


# Agreement


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_with_another_config_is_refused_by_name(fresh: Path, rank: int) -> None:
    other = ["--set", "train.micro_batch_size=2"]
    job = start_ranks(3, fresh, "--set", "train.global_batch_size=12", of_rank={rank: other})
    assert job.wait() == [2, 2, 2], job.text()
    words = "train.micro_batch_size is 2, rank 0 has 4"
    assert f"rank {rank} (" in job.log(rank) and words in job.log(rank) and job.text().count(words) == 1
    assert "Traceback" not in job.text()
    assert not (fresh.parent / "run" / "metrics.jsonl").exists()


def test_a_rank_with_other_data_is_refused_by_name(fresh: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    for path in (tmp_path / "data").iterdir():
        if path.is_file():
            shutil.copy(path, elsewhere / "data" / path.name)
    from tiny_run import write_corpus

    for path in (elsewhere / "data").glob("prose.*"):
        path.unlink()
    write_corpus(elsewhere / "data" / "prose", 99)
    text = fresh.read_text().replace(str(tmp_path / "data"), "data")
    fresh.write_text(text)
    job = start_ranks(2, fresh, fault=partial(_in_folder, tmp_path, elsewhere))
    assert job.wait() == [3, 3], job.text()
    assert "rank 1 (" in job.log(1) and "the fingerprint of source 'prose' is" in job.log(1)
    assert exit_record(tmp_path / "run")["code"] == 3


def _in_folder(home: Path, elsewhere: Path, rank: int) -> None:
    os.chdir(elsewhere if rank == 1 else home)


def test_a_rank_that_never_comes_is_named_after_the_bound(fresh: Path) -> None:
    began = time.monotonic()
    job = start_ranks(2, fresh, "--set", "health.start_seconds=3", missing=[1])
    assert job.wait(60) == [10], job.text()
    assert time.monotonic() - began < 30
    assert "found not all 2 processes within 3 seconds (health.start_seconds)" in job.log(0)


# Loaded samples are checked over all ranks


def test_a_data_rank_that_reads_another_ones_rows_is_noticed(fresh: Path) -> None:
    job = start_ranks(2, fresh, fault=_another_rows)
    assert job.wait() == [1, 1], job.text()
    assert "step 1: the samples that were loaded have the order hash" in job.text()


def test_a_rank_that_reads_something_else_than_its_twin_is_named(fresh: Path) -> None:
    job = start_ranks(2, fresh, "--set", "parallel.tensor=2", fault=_other_tokens)
    assert job.wait() == [1, 1], job.text()
    assert "rank 1 read something else than rank 0" in job.text()


# A real launcher


def test_torchrun_hands_on_a_stop_and_trains_on(alone: Path, fresh: Path) -> None:
    output = fresh.parent / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", str(ROOT / "tools" / "train.py"), str(fresh)]
    with open(fresh.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 90
            while not (output / "metrics.jsonl").exists() or not rows_of(output):
                assert time.monotonic() < end and process.poll() is None, fresh.with_suffix(".log").read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(60) != 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    record = exit_record(output)
    assert record["code"] == 75 and 0 < record["step"] == max(steps_in(output)) < 24
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert samples_of(output) == samples_of(alone / "run")
