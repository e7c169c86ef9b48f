"""Loss spikes: runs that skip or roll back equal twins that leave the same batches out by other means."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rank_jobs import start_ranks, train_ranks
from tiny_run import Done, curve_of, rows_of, steps_in
from trainer.planted_spikes import (
    SPIKE,
    assert_same_weights,
    left_out,
    make_spiky_run,
    planted,
    ran,
    stop_at,
)

import megatron.trainer.build as build_module
from megatron.config.load import load_config
from megatron.config.spikes_section import SpikesSection, check_spikes
from megatron.data.ledger_events import event_words, not_trained
from megatron.engines.base import Bounds
from megatron.planner.ledger_files import read_ledger
from megatron.planner.resolve import resolve_run
from megatron.trainer.spike_bounds import SpikeState, leaps, part_of
from megatron.trainer.state import TrainerState

pytestmark = pytest.mark.timeout(300)


# Bounds


def by_numpy(losses: Sequence[float], norms: Sequence[float], deviations: float) -> tuple[float, float]:
    def above(values: Any, least: float) -> float:
        middle = np.median(values)
        return float(middle + deviations * max(least, 1.4826 * np.median(np.abs(values - middle))))

    return above(np.array(losses), 0.01), math.exp(above(np.log(np.array(norms)), 0.05))


@pytest.mark.parametrize("late", [0, 1])
def test_bounds_are_those_of_the_steps_up_to_two_before_however_far_the_host_has_seen(late: int) -> None:
    section, drawn = SpikesSection(policy="skip", window=10, deviations=4, warm_up=8), random.Random(3)
    steps = [(drawn.gauss(3, 0.1), drawn.lognormvariate(0, 0.3)) for _ in range(40)]
    state = SpikeState()
    for number in range(1, 41):
        found = state.bounds(number, 0, section)
        known = steps[: number - 2][-10:]
        if number <= 8 or len(known) < 5:
            assert found is None
        else:
            assert found is not None
            assert (found.loss, found.grad_norm) == pytest.approx(by_numpy(*zip(*known, strict=True), 4), rel=1e-12)
        if number > late:
            state.remember(number - late, *steps[number - late - 1], 0, section.window)


def test_a_window_begins_anew_and_takes_no_step_without_numbers() -> None:
    section, state = SpikesSection(policy="skip", window=4, of=("loss",)), SpikeState()
    for number in range(1, 9):
        state.remember(number, 2.0, 1.0 if number % 2 else math.nan, 0, section.window)
    assert [entry[0] for entry in state.seen] == [1, 3, 5, 7]
    assert state.bounds(9, 0, section) == Bounds(loss=2.06, loss_words="2 + 6 x 0.01 of 4 steps before")
    assert state.bounds(9, 64, section) is None
    state.remember(9, 5.0, 1.0, 64, section.window)
    assert (state.since, [entry[0] for entry in state.seen]) == (64, [9])
    kept = TrainerState(spikes=state)
    assert TrainerState.from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_a_state_from_before_there_was_a_policy_is_read() -> None:
    record = TrainerState(step=5, skipped=2).to_json()
    del record["spikes"], record["passed_over"]
    assert TrainerState.from_json(record) == TrainerState(step=5, skipped=2)


def test_losses_may_leap_where_the_config_says_why(tmp_path: Path) -> None:
    path = make_spiky_run(tmp_path)
    stages = """
[[stages]]
name = "phases"
steps = 40
phases = [{ mixture = { code = 0.5, text = 0.5 } }, { mixture = { code = 0.51, text = 0.49 } },
  { mixture = { code = 0.9, text = 0.1 } }, { mixture = { code = 0.2, text = 0.8 }, ramp_to = { code = 1 } }]
lr = { peak = 1e-3 }

[[stages]]
name = "long"
steps = 10
mixture = { code = 1 }
shapes = [{ length = "4 steps", seq_length = 8 }, { seq_length = 16, global_batch_size = 16 }]
"""
    text = path.read_text()
    path.write_text(text[: text.index("[[stages]]")] + stages + text[text.index("[spikes]") :])
    found = leaps(resolve_run(load_config(path)).schedule)
    assert found == [0, 160, 240, 320, 352]
    assert [part_of(sample, found) for sample in (0, 159, 160, 319, 320, 9999)] == [0, 0, 160, 240, 320, 352]


# Skipping


def test_skip_equals_a_run_whose_step_was_put_back(folder: Path, skipping: tuple[Path, Done]) -> None:
    output, done = skipping

    def both(rank: Sequence[int], number: int) -> None:
        left_out(rank, number)
        planted(rank, number)

    assert ran(make_spiky_run(folder, "twin"), both).returncode == 0
    assert curve_of(output) == curve_of(folder / "twin")
    assert_same_weights(output, folder / "twin")
    rows = rows_of(output)
    assert [row["step"] for row in rows if row["skipped"]] == [SPIKE] and rows[-1]["skipped_total"] == 1
    reason = rows[SPIKE - 1]["skip_reason"]
    assert reason.startswith("spike: ") and f"step {SPIKE}: no update: {reason}" in done.stdout


def test_skip_is_in_the_ledger_whose_counts_and_order_are_as_undisturbed(
    skipping: tuple[Path, Done], undisturbed: Path
) -> None:
    ledger, plain = read_ledger(skipping[0]), read_ledger(undisturbed)
    (event,) = ledger.events
    assert (event["event"], event["steps"], event["samples"]) == ("spike", [15, 15], [112, 120])
    assert sum(not_trained(ledger.events).values()) == 8 * 16
    assert "step 15 of stage 'first' made no update: spike" in event_words(event)
    assert "consumed and not trained on" in event_words(event)
    record = ledger.to_json() | {"events": []}
    assert record == plain.to_json()


@pytest.mark.parametrize("policy", ["skip", "roll-back"])
def test_without_a_spike_a_policy_changes_nothing(folder: Path, undisturbed: Path, policy: str) -> None:
    assert ran(make_spiky_run(folder, f"quiet-{policy}", policy)).returncode == 0
    assert curve_of(folder / f"quiet-{policy}") == curve_of(undisturbed)
    assert_same_weights(folder / f"quiet-{policy}", undisturbed)


@pytest.mark.parametrize("cut", [9, 14, 15, 16])
def test_T2_skipping_cut_anywhere_and_resumed(
    tmp_path: Path, folder: Path, skipping: tuple[Path, Done], cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    config = make_spiky_run(tmp_path, "cut", "skip")
    with stop_at(monkeypatch, cut):
        assert ran(config, planted).returncode == 75
    assert ran(config, planted).returncode == 0
    assert curve_of(tmp_path / "cut") == curve_of(skipping[0])
    assert_same_weights(tmp_path / "cut", skipping[0])


# Ranks

LAYOUTS = {
    "dp2, full shard": ["parallel.data_shard=full"],
    "tp2": ["parallel.tensor=2"],
    "pp2": ["parallel.pipeline=2"],
    "deepspeed, zero 1": ["parallel.engine=deepspeed", "parallel.data_shard=optimizer"],
}


@pytest.mark.parametrize("policy", ["skip", "roll-back"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_T1_ranks_do_as_one_process_does(
    tmp_path: Path, folder: Path, skipping: tuple[Path, Done], rolled_back: tuple[Path, Done], layout: str, policy: str
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    words = [word for setting in LAYOUTS[layout] for word in ("--set", setting)]
    train_ranks(2, make_spiky_run(tmp_path, "run", policy), *words, fault=partial(planted, [SPIKE]))
    alone = (skipping if policy == "skip" else rolled_back)[0]
    mine, theirs = rows_of(tmp_path / "run"), rows_of(alone)
    for key in ("step", "consumed_samples", "batch_digest", "skipped", "lr"):
        assert [row[key] for row in mine] == [row[key] for row in theirs], key
    for key in ("loss", "grad_norm"):
        for one, other in zip(mine, theirs, strict=True):
            assert one[key] == (None if other[key] is None else pytest.approx(other[key], rel=1e-4))
    events = [{k: v for k, v in event.items() if k != "reason"} for event in read_ledger(tmp_path / "run").events]
    assert events == [{k: v for k, v in event.items() if k != "reason"} for event in read_ledger(alone).events]
    assert read_ledger(tmp_path / "run").order_hash == read_ledger(alone).order_hash
    assert steps_in(tmp_path / "run") == steps_in(alone)


def working_ahead(steps: Sequence[int], rank: int) -> None:
    """An engine as on a GPU: steps are launched before the host has seen the ones ahead of them. Spikes are planted."""
    make = build_module.build_engine

    def build(*arguments: Any) -> Any:
        engine: Any = make(*arguments)
        engine._stays_on_device = True
        return engine

    build_module.build_engine = build
    planted(steps, rank)


@pytest.mark.parametrize("policy", ["skip", "roll-back"])
def test_T1_a_device_that_works_ahead_decides_as_one_that_is_waited_for(
    tmp_path: Path, folder: Path, skipping: tuple[Path, Done], rolled_back: tuple[Path, Done], policy: str
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    done = ran(make_spiky_run(tmp_path, "ahead", policy), working_ahead)
    assert done.returncode == 0, done.stderr
    alone = (skipping if policy == "skip" else rolled_back)[0]
    mine, theirs = rows_of(tmp_path / "ahead"), rows_of(alone)
    assert [row["skipped"] for row in mine] == [row["skipped"] for row in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one["loss"] == (None if other["loss"] is None else pytest.approx(other["loss"], rel=1e-4))
    assert read_ledger(tmp_path / "ahead").events[-1] | {"reason": ""} == read_ledger(alone).events[-1] | {"reason": ""}


def lost_while_passing_over(rank: int) -> None:
    """Rank 1 is killed as soon as a step is passed over."""
    planted([SPIKE], rank)
    if rank != 1:
        return
    from megatron.trainer.spikes import SpikeWatch

    launch = SpikeWatch.launch

    def watched(watch: Any, engine: Any, batch: Any, lr: float) -> Any:
        if batch.passed_over and batch.step == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return launch(watch, engine, batch, lr)

    SpikeWatch.launch = watched  # type: ignore[method-assign]


def test_T2_a_rank_is_lost_on_the_way_and_the_run_goes_on_elsewhere(
    tmp_path: Path, folder: Path, rolled_back: tuple[Path, Done]
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    config = make_spiky_run(tmp_path, "lost", "roll-back")
    job = start_ranks(2, config, fault=lost_while_passing_over)
    assert job.wait()[0] == 10, job.text()
    done = ran(config, planted)
    assert done.returncode == 0 and "steps 12 to 18 are passed over, as decided at step 15" in done.stdout, done.stderr
    mine, theirs = rows_of(tmp_path / "lost"), rows_of(rolled_back[0])
    assert [row["batch_digest"] for row in mine] == [row["batch_digest"] for row in theirs]
    assert mine[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-4)
    assert read_ledger(tmp_path / "lost").order_hash == read_ledger(rolled_back[0]).order_hash


def parted_decisions(rank: int) -> None:
    """Rank 1 alone sees a bound that bites."""
    if rank != 1:
        return
    make = SpikeState.bounds

    def bounds(state: SpikeState, step: int, since: int, section: SpikesSection) -> Bounds | None:
        return Bounds(loss=0.0) if step == 12 else make(state, step, since, section)

    SpikeState.bounds = bounds  # type: ignore[method-assign]


def test_ranks_that_decide_differently_are_noticed_at_once(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    job = start_ranks(2, make_spiky_run(tmp_path, "parted", "skip"), fault=parted_decisions)
    assert job.wait()[0] == 1, job.text()
    assert "different numbers of steps without an update (0, 1, by rank)" in job.text()
    assert rows_of(tmp_path / "parted")[-1]["step"] == 11 and 12 not in steps_in(tmp_path / "parted")


# Config


def test_B1_a_policy_that_cannot_work_is_refused() -> None:
    def refused(**fields: Any) -> Iterator[str]:
        with pytest.raises(ValidationError) as error:
            SpikesSection(**fields)
        yield str(error.value)

    assert "set spikes.pass_over to at least 100" in next(refused(pass_over=99))
    assert "names one thing twice" in next(refused(of=("loss", "loss")))
    assert "of" in next(refused(of=()))
    check_spikes(SpikesSection(policy="skip"), 10, 2)
    check_spikes(SpikesSection(policy="roll-back"), 50, 3)
    with pytest.raises(ValueError, match=r"reaches 98 steps back.*set checkpoint\.keep to 4"):
        check_spikes(SpikesSection(policy="roll-back"), 49, 3)
