"""Ways to stop or save a real run out of turn: wherever it is then, nothing is lost, and it ends soon."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rank_faults import all_of, asked_to_stop, asleep, at, switched, while_saving
from rank_jobs import start_ranks, train_ranks
from tiny_run import curve_of, exit_record, make_run, rows_of, steps_in, validation_of
from trainer.stand_in import StandIn

from megatron.checkpoint.manager import open_checkpoint
from megatron.launch.attempts import read_attempts, read_exit, read_heartbeat

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora and the run of one process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    train_ranks(1, make_run(folder))
    return folder


@pytest.fixture
def fresh(alone: Path, tmp_path: Path) -> Path:
    """The config of a new run over the same corpora; it writes to tmp_path/run."""
    (tmp_path / "data").symlink_to(alone / "data")
    return make_run(tmp_path)


def order_of(output: Path) -> str:
    """The hash over all samples in their order, of the newest checkpoint's ledger."""
    state = json.loads((output / "checkpoints" / f"step-{steps_in(output)[-1]:09d}" / "state.json").read_text())
    return str(state["data"]["order"])


# Switch files


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_save_now_and_stop_now_disturb_nothing(alone: Path, fresh: Path, asynchronous: str) -> None:
    output = fresh.parent / "run"
    words = ("--set", f"checkpoint.asynchronous={asynchronous}", "--set", "checkpoint.keep=20")
    save, stop = at(4, 0, switched(output / "save-now")), at(11, 0, switched(output / "stop-now"))
    job = start_ranks(1, fresh, *words, fault=all_of(save, stop))
    assert job.wait() == [75], job.text()
    assert set(steps_in(output)) == {3, 4, 6, 8, 9, 11}
    for step in steps_in(output):
        open_checkpoint(output / "checkpoints" / f"step-{step:09d}")
    assert not (output / "save-now").exists() and not (output / "stop-now").exists()
    record = exit_record(output)
    assert (record["code"], record["reason"], record["step"]) == (75, "stop-now", 11)
    assert "stop-now: stopped at step 11" in job.log(0)
    train_ranks(1, fresh, *words)
    assert curve_of(output) == curve_of(alone / "run")
    assert validation_of(output) == validation_of(alone / "run")
    assert order_of(output) == order_of(alone / "run")


def test_switches_reach_all_ranks_and_may_come_with_a_stop(fresh: Path) -> None:
    output = fresh.parent / "run"
    both = all_of(at(4, 0, switched(output / "save-now")), at(4, 1, asked_to_stop))
    job = start_ranks(2, fresh, fault=both)
    assert job.wait() == [75, 75], job.text()
    assert steps_in(output) == [3, 4] and exit_record(output)["reason"] == "SIGUSR1"
    assert not (output / "save-now").exists(), "what the stop saved is what was asked for"


def test_a_stop_now_that_was_left_ends_a_start_once(fresh: Path) -> None:
    output = fresh.parent / "run"
    output.mkdir()
    (output / "stop-now").touch()
    job = start_ranks(1, fresh)
    assert job.wait() == [75], job.text()
    assert exit_record(output)["step"] == 0 and steps_in(output) == []
    (output / "stop-now").mkdir()
    job = train_ranks(1, fresh)
    assert job.log(0).count("stop-now is a folder, and not obeyed") == 1


# Signals, wherever the run is


def _asked_in_validation(rank: int) -> None:
    import megatron.trainer.build as module

    build_engine = module.build_engine

    def build(*arguments: Any) -> Any:
        engine = build_engine(*arguments)
        evaluate = engine.evaluate

        def asking(*batch: Any) -> Any:
            asked_to_stop()
            time.sleep(0.2)
            return evaluate(*batch)

        engine.evaluate = asking
        return engine

    module.build_engine = build


def _asked_while_saving() -> None:
    if not os.environ.get("ASKED"):
        os.environ["ASKED"] = "1"
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("fault", "step", "saved"),
    [(_asked_in_validation, 5, [3, 5]), (while_saving(_asked_while_saving, step=6), 6, [3, 6])],
    ids=["validation", "save"],
)
def test_asked_in_a_validation_or_a_save_it_stops_right_after(
    alone: Path, fresh: Path, fault: Any, step: int, saved: list[int]
) -> None:
    output = fresh.parent / "run"
    job = start_ranks(1, fresh, fault=fault)
    assert job.wait() == [75], job.text()
    assert exit_record(output)["step"] == step and steps_in(output) == saved
    assert not (output / "checkpoints" / "discarded").exists(), "no step was saved twice"
    train_ranks(1, fresh)
    assert curve_of(output) == curve_of(alone / "run") and order_of(output) == order_of(alone / "run")


def _stuck_in_the_start(rank: int) -> None:
    import megatron.trainer.build as module

    def load(*arguments: Any) -> Any:
        if rank == 1 or os.environ["WORLD_SIZE"] == "1":
            asked_to_stop()
        asleep()

    module.load_tokenizer = load


@pytest.mark.parametrize("ranks", [1, 2])
def test_asked_in_the_start_up_all_leave_at_once(fresh: Path, ranks: int) -> None:
    output = fresh.parent / "run"
    job = start_ranks(ranks, fresh, fault=_stuck_in_the_start)
    assert job.wait() == [75] * ranks, job.text()
    assert exit_record(output)["code"] == 75
    assert exit_record(output)["reason"].startswith("SIGUSR1: stopped before the first step")
    assert "Traceback" not in job.text() and "error" not in job.text()
    attempt = read_attempts(output)[0]
    assert attempt.launch is not None and attempt.start is None and attempt.end is not None
    train_ranks(ranks, fresh)


def test_asked_while_the_run_waits_for_an_evaluation_it_gives_it_back(fresh: Path, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, "time.sleep(600)")
    output = tmp_path / "run"
    words = [f"evaluation.{key}" for key in ("suite=heldout", "where=here", "every=6")]
    job = start_ranks(2, fresh, *(f"--set={word}" for word in words), fault=all_of(stand_in, _without_the_harness))
    try:
        end = time.monotonic() + 90
        while stand_in.steps != [6]:
            assert time.monotonic() < end and job.processes[0].is_alive(), job.text()
            time.sleep(0.05)
        job.send(1, signal.SIGTERM)
    finally:
        codes = job.wait()
    assert codes == [75, 75], job.text()
    assert exit_record(output)["step"] == 6 and steps_in(output) == [3, 6]
    assert (output / "evaluations" / "requests" / "step-000000006.json").exists()
    stand_in.becomes("")
    train_ranks(2, fresh, *(f"--set={word}" for word in words), fault=all_of(stand_in, _without_the_harness))
    assert stand_in.steps[:2] == [6, 6]


def _without_the_harness(rank: int) -> None:
    import megatron.trainer.build as module

    module.check_can_evaluate = lambda section: None


# The timer


@pytest.mark.parametrize(("ranks", "asked"), [(1, "signal"), (2, "signal"), (1, "stop-now")])
def test_a_save_that_hangs_holds_a_stop_no_longer_than_the_timer(fresh: Path, ranks: int, asked: str) -> None:
    output = fresh.parent / "run"
    asks = asked_to_stop if asked == "signal" else switched(output / "stop-now")
    fault = all_of(while_saving(asleep, rank=ranks - 1, step=5), at(5, ranks - 1, asks))
    job = start_ranks(ranks, fresh, "--set", "health.stop_seconds=3", fault=fault)
    assert job.wait(60) == [9] * ranks, job.text()
    record = exit_record(output)
    assert record["code"] == 9 and "health.stop_seconds" in record["reason"] and record["step"] == 5
    assert steps_in(output) == [3] and "stacks of process" in job.text()
    if asked == "signal":
        train_ranks(ranks, fresh)


# The allocation's end


def _ends_now() -> None:
    import gc

    from megatron.trainer.stopping import WallTime

    for wall in gc.get_objects():
        if isinstance(wall, WallTime):
            wall._end = time.time() + 2


def _until(seconds: str, rank: int) -> None:
    os.environ["STAGEMIX_END_TIME"] = str(time.time() + float(seconds)) if seconds[0] in "-0123456789" else seconds


def test_the_allocations_end_stops_all_ranks_with_everything_saved(fresh: Path) -> None:
    output = fresh.parent / "run"
    job = start_ranks(2, fresh, fault=all_of(partial(_until, "3600"), at(7, 0, _ends_now)))
    assert job.wait() == [75, 75], job.text()
    record = exit_record(output)
    assert (record["reason"], record["step"], steps_in(output)) == ("wall time", 7, [6, 7])
    assert "wall time: stopped at step 7" in job.log(0)
    train_ranks(2, fresh)


@pytest.mark.parametrize(
    ("seconds", "code", "words"),
    [
        ("55", 75, "the allocation is too short: 5"),
        ("-5", 2, "is past (STAGEMIX_END_TIME"),
        ("soon", 2, "environment variable STAGEMIX_END_TIME is 'soon'"),
    ],
)
def test_an_allocation_without_time_for_a_step_says_so(fresh: Path, seconds: str, code: int, words: str) -> None:
    job = start_ranks(2, fresh, fault=partial(_until, seconds))
    assert job.wait() == [code, code], job.text()
    assert words in job.log(0) and job.text().count("error: ") == (code != 75), job.text()
    assert exit_record(fresh.parent / "run")["code"] == code and steps_in(fresh.parent / "run") == []


# On record


def test_starts_ends_and_the_heartbeat_are_on_record(fresh: Path) -> None:
    output = fresh.parent / "run"
    job = start_ranks(2, fresh, fault=at(7, 1, asked_to_stop))
    assert job.wait() == [75, 75], job.text()
    train_ranks(1, fresh)
    first, second = read_attempts(output)
    assert first.launch and first.start and first.end and second.launch and second.start and second.end
    assert (first.start.processes, first.start.step, second.start.processes, second.start.step) == (2, 0, 1, 7)
    assert (first.end.code, first.end.reason, first.end.step) == (75, "SIGUSR1", 7)
    assert (second.end.code, second.end.step, second.end.suspects, second.end.rank) == (0, 24, [], None)
    assert second.start.consumed_samples == first.end.consumed_samples == 56
    assert first.launch.time <= first.start.time <= first.end.time <= second.launch.time
    assert read_exit(output) == second.end and exit_record(output)["attempt"] == 2
    beat = read_heartbeat(output)
    assert beat is not None and (beat.step, beat.steps, beat.phase, beat.attempt) == (24, 24, "ended", 2)
    assert beat.tokens == beat.consumed_tokens == rows_of(output)[-1]["consumed_tokens"]
    assert beat.step_seconds and beat.save_seconds


def _beats_in_a_save(output: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        beat = read_heartbeat(output)
        if beat is not None and beat.phase == "checkpoint":
            (output / "seen").touch()
            return
        time.sleep(0.1)


def test_it_beats_while_a_save_runs(fresh: Path) -> None:
    output = fresh.parent / "run"
    fault = while_saving(partial(_beats_in_a_save, output), step=3)
    train_ranks(1, fresh, "--set", "health.heartbeat_seconds=1", fault=fault)
    assert (output / "seen").exists()


def test_a_heartbeat_that_cannot_be_written_is_named_once_and_ends_nothing(fresh: Path) -> None:
    output = fresh.parent / "run"
    (output / ".heartbeat.json.tmp").mkdir(parents=True)
    pause = at(5, 0, partial(time.sleep, 2.5))
    job = train_ranks(1, fresh, "--set", "health.heartbeat_seconds=1", fault=pause)
    assert job.log(0).count("heartbeat.json is not written") == 1, job.log(0)
