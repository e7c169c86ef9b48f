"""A roll-back equals a run that never had the batches, wherever it is cut; and where it is none."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Done, curve_of, exit_record, rows_of
from trainer.planted_spikes import (
    PASSED,
    assert_same_weights,
    make_spiky_run,
    never_run,
    planted,
    ran,
    stop_at,
)

import megatron.trainer.build as build_module
from megatron.data.ledger import Ledger
from megatron.data.ledger_events import event_words, not_trained
from megatron.planner.ledger_files import read_ledger

pytestmark = pytest.mark.timeout(300)


def test_roll_back_equals_a_run_that_never_had_those_batches(
    folder: Path, rolled_back: tuple[Path, Done], undisturbed: Path
) -> None:
    output, done = rolled_back
    assert ran(make_spiky_run(folder, "never"), never_run, PASSED).returncode == 0
    trained = [row for row in curve_of(output) if row[0] not in PASSED]
    assert trained == [row for row in curve_of(folder / "never") if row[0] not in PASSED] and len(trained) == 21
    assert trained[:11] == curve_of(undisturbed)[:11]
    assert_same_weights(output, folder / "never")
    assert f"goes back to step 11, by way of {output}/checkpoints/step-000000009; steps 12 to 18" in done.stdout


def test_what_is_passed_over_is_consumed_and_on_record(rolled_back: tuple[Path, Done], undisturbed: Path) -> None:
    output, _ = rolled_back
    rows, plain = rows_of(output), rows_of(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 29))
    for key in ("training_stage", "consumed_samples", "consumed_tokens", "lr", "samples_by_source"):
        assert [row[key] for row in rows] == [row[key] for row in plain], key
    assert [row["step"] for row in rows if row.get("passed_over")] == list(PASSED)
    assert all(row["loss"] is None and row["skipped"] for row in rows if row.get("passed_over"))
    assert rows[-1]["skipped_total"] == 7
    ledger = read_ledger(output)
    assert ledger.order_hash == read_ledger(undisturbed).order_hash
    assert ledger.to_json() | {"events": []} == read_ledger(undisturbed).to_json()
    back, passed = ledger.events
    assert (back["event"], back["step"], back["restart"], back["last"], back["checkpoint"]) == (
        "rolled-back", 15, 11, 18, 9
    )  # fmt: skip
    by_source: dict[str, int] = {}
    for row in plain[11:18]:
        for name, count in row["samples_by_source"].items():
            by_source[name] = by_source.get(name, 0) + 16 * count
    assert passed == {
        "event": "passed-over",
        "stage": "first",
        "steps": [12, 18],
        "samples": [88, 144],
        "tokens": by_source,
        "spike": 15,
    }
    assert not_trained(ledger.events) == by_source
    assert "went back to step 11 (by way of the checkpoint of step 9): spike: " in event_words(back)
    assert "steps 12 to 18 of stage 'first' were passed over" in event_words(passed)
    discarded = [json.loads(line) for line in (output / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [row["step"] for row in discarded if "loss" in row] == list(range(10, 16))
    assert any("spike" in row.get("skip_reason", "") for row in discarded)
    assert [path.name for path in (output / "checkpoints" / "discarded").iterdir()] == ["step-000000012-000"]
    assert Ledger.from_json(ledger.to_json()).events == ledger.events


# (step, which time it is shown): before the spike, trained again, passed over, and after
CUTS = [(10, 1), (10, 2), (11, 2), (12, 2), (14, 2), (18, 1), (21, 1)]


@pytest.mark.parametrize("how", ["asked", "killed"])
@pytest.mark.parametrize(("step", "turn"), CUTS)
def test_T2_a_roll_back_cut_anywhere_and_resumed(
    tmp_path: Path,
    folder: Path,
    rolled_back: tuple[Path, Done],
    step: int,
    turn: int,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    config = make_spiky_run(tmp_path, "cut", "roll-back")
    with stop_at(monkeypatch, step, turn, RuntimeError if how == "killed" else None):
        assert ran(config, planted).returncode == (1 if how == "killed" else 75)
    done = ran(config, planted)
    assert done.returncode == 0, done.stderr
    pending = (step, turn) != (10, 1) and (how == "killed" or step < 18)
    assert ("are passed over, as decided at step 15" in done.stdout) == pending
    assert curve_of(tmp_path / "cut") == curve_of(rolled_back[0])
    assert_same_weights(tmp_path / "cut", rolled_back[0])
    mine, theirs = (read_ledger(output).to_json() for output in (tmp_path / "cut", rolled_back[0]))
    if (step, turn, how) == (10, 1, "asked"):  # it was saved when it stopped, and so there is a later one to go back to
        assert mine["events"][0].pop("checkpoint") in (10, 11) and theirs["events"][0].pop("checkpoint") == 9
    assert mine == theirs


def test_another_policy_trains_on_what_was_still_to_be_passed_over(
    tmp_path: Path, folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    config = make_spiky_run(tmp_path, "changed", "roll-back")
    with stop_at(monkeypatch, 14, 2):
        assert ran(config, planted).returncode == 75
    saved = rows_of(tmp_path / "changed")[-1]["step"]
    done = ran(config, words=("--set", "spikes.policy=none"))
    assert done.returncode == 0 and f"steps {saved + 1} to 18 are trained on" in done.stdout
    rows = rows_of(tmp_path / "changed")
    assert [row["step"] for row in rows if row.get("passed_over")] == list(range(12, saved + 1))
    back, passed = read_ledger(tmp_path / "changed").events
    assert back["last"] == 18 and passed["steps"] == [12, saved], "what has happened stays on record"


def test_where_nothing_lies_far_enough_back_the_step_is_left_out_alone(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    config = make_spiky_run(tmp_path, "early", "roll-back")
    done = ran(config, planted, [6])
    assert done.returncode == 0, done.stderr
    assert "step 6: no whole checkpoint is 4 steps (spikes.back) before it" in done.stdout
    assert [event["event"] for event in read_ledger(tmp_path / "early").events] == ["spike"]
    assert [row["step"] for row in rows_of(tmp_path / "early") if row["skipped"]] == [6]


@pytest.mark.parametrize("policy", ["skip", "roll-back"])
def test_B1_too_many_spikes_end_the_run(tmp_path: Path, folder: Path, policy: str) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    config = make_spiky_run(tmp_path, "many", policy)
    spikes = [13, 15, 18] if policy == "skip" else [15, 19]
    words = ("--set", f"spikes.at_most={len(spikes) - 1}")
    done = ran(config, planted, spikes, words)
    assert done.returncode == 8 and exit_record(tmp_path / "many")["code"] == 8
    assert f"{len(spikes)} spikes within 40 steps, at steps {', '.join(map(str, spikes))}" in done.stderr
    first = 8 * (spikes[-1] - 1)
    assert f"--samples {first}:{first + 8}" in done.stderr and "losses by source: prose " in done.stderr


def test_steps_that_are_not_finite_are_rolled_back_from_where_the_run_would_end(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    config = make_spiky_run(tmp_path, "broken", "roll-back")
    done = ran(config, not_finite, [14, 15, 16], ("--set", "train.max_non_finite=3"))
    assert done.returncode == 0, done.stderr
    assert "step 16: 3 steps in a row without an update, the last: loss" in done.stdout
    rows = rows_of(tmp_path / "broken")
    assert [row["step"] for row in rows if row["skipped"]] == list(range(11, 18))
    done = ran(make_spiky_run(tmp_path, "ends", "skip"), not_finite, [14, 15, 16], ("--set", "train.max_non_finite=3"))
    assert done.returncode == 8 and "3 steps in a row without an update" in done.stderr


def not_finite(steps: Sequence[int], rank: int) -> None:
    """Losses of these steps are infinite."""
    from trainer.planted_spikes import step_of

    make = build_module.build_engine

    def build(*arguments: Any) -> Any:
        engine: Any = make(*arguments)
        launch, run, now = engine.launch_step, engine._run, [0]
        engine._run = lambda *a: [t + (math.inf if now[0] in steps else 0.0) for t in run(*a)]

        def launch_step(microbatches: Any, *rest: Any) -> Any:
            now[0] = step_of(microbatches)
            return launch(microbatches, *rest)

        engine.launch_step = launch_step
        return engine

    build_module.build_engine = build
