"""What a run's status is made of: its state by its records, the end of a file of rows, and wall time by cause."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.launch.attempts import Attempt, End, Heartbeat, Launch, Start
from megatron.launch.run_state import state_of
from megatron.launch.wall_time import StepTime, wall_time
from megatron.metrics.row_tail import pace_of, read_tail, seconds_in

NOW = 100_000.0


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "consumed_tokens": step * 8, "tokens": 8, "step_seconds": 0.5, "loss": 1.0, **more}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 80), st.integers(0, 400), st.integers(1, 3000), st.integers(0, 90), st.integers(0, 2**32))
def test_a_tail_is_the_end_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, steps: int, torn: int, at_least: int, since: int, seed: int
) -> None:
    """Rows of all steps after `since` are there, and none is made up; the rest is counted as not read."""
    chance = random.Random(seed)
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    lines = []
    for step in range(1, steps + 1):
        lines.append(json.dumps(row(step, pad="x" * chance.randrange(60))))
        if chance.random() < 0.2:
            lines.append(json.dumps({"step": step, "validation": {"a": 1.0}}))
    content = "".join(line + "\n" for line in lines) + '{"step": 999, "consumed_tokens": 5, "pad": "'[:torn]
    path.write_text(content)
    tail = read_tail(path, since, at_least, 1 << 20)
    numbers = [one["step"] for one in tail.steps]
    assert numbers == list(range(steps - len(numbers) + 1, steps + 1))
    assert tail.reaches(since)
    assert [one["step"] for one in tail.beyond(since)] == list(range(since + 1, steps + 1))
    assert 0 <= tail.unread < max(1, len(content)) and (tail.unread or len(numbers) == steps)
    bounded = read_tail(path, None, at_least, at_least)
    assert bounded.unread == max(0, len(content) - at_least)


def test_no_file_is_an_empty_tail(tmp_path: Path) -> None:
    tail = read_tail(tmp_path / "metrics.jsonl", 5)
    assert (tail.steps, tail.last, tail.modified) == ((), {}, None) and tail.reaches(5)


def test_pace_counts_saves_and_leaves_out_what_was_passed_over() -> None:
    rows = [row(step, loss=None if step == 9 else 2.0, **({"checkpoint_seconds": 5.0} if step == 5 else {}))
            for step in range(1, 11)]  # fmt: skip
    rows.append(row(11, passed_over=True, step_seconds=0.001, loss=None))
    pace = pace_of(rows)
    assert (pace.seconds, pace.tokens, pace.loss, pace.steps) == (0.5, 8.0, 2.0, 10)
    assert pace.aside == {"checkpoint": pytest.approx(5 / 11)}
    assert pace.seconds_per_token == pytest.approx((0.5 + 5 / 11) / 8)
    # no save among the rows: one of 6 seconds every 3 steps
    assert pace_of(rows[5:10], every=3, save_seconds=6.0).aside == {"checkpoint": 2.0}
    assert pace_of([]).tokens_per_second is None and pace_of([]).seconds_per_token is None
    assert seconds_in([row(1), {"step_seconds": None}, {"step_seconds": True}, {}]) == 0.5


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_wall_time_by_a_clock_that_was_watched(seed: int) -> None:
    """A run is played second by second; whoever plays it knows what each second was."""
    chance = random.Random(seed)
    spent = dict.fromkeys(("start", "kept", "redone", "checkpoint", "between", "other"), 0.0)
    now, attempts, step, saved, seconds_since_save = 1000.0, [], 0, 0, 0.0

    def passes(what: str, seconds: float) -> float:
        spent[what] += seconds
        return now + seconds

    recorded = True
    for number in range(1, chance.randrange(2, 7)):
        launch = Launch(number, now)
        now = passes("start", chance.randrange(1, 50))
        start = Start(number, now, step=saved)
        step, seconds_since_save = saved, 0.0
        for _ in range(chance.randrange(0, 30)):
            now, step = passes("kept", 2.0), step + 1
            seconds_since_save += 2.0
            if step % 5 == 0:
                now, saved, seconds_since_save = passes("checkpoint", 3.0), step, 0.0
        if chance.random() < 0.5:  # stops, and saves; no row tells of this save
            now, saved, seconds_since_save = passes("other", 4.0), step, 0.0
        elif chance.random() < 0.5:
            now = passes("other", 1.5)  # in a step that is not finished
        spent["kept"] -= seconds_since_save
        spent["redone"] += seconds_since_save
        end = End(number, now, 75)
        recorded = recorded and (told := chance.random() < 0.7)
        attempts.append(Attempt(number, launch, start, end if told else None))
        last_sign = now
        now = passes("between", chance.randrange(0, 100))
    aside = {"checkpoint": spent["checkpoint"]} if spent["checkpoint"] else {}
    found = wall_time(attempts, now, last_sign, StepTime(spent["kept"], spent["redone"], aside))
    assert found is not None
    assert found.total == pytest.approx(now - 1000.0)
    assert (found.kept, found.redone, found.aside) == (
        pytest.approx(spent["kept"]),
        pytest.approx(spent["redone"]),
        pytest.approx(aside),
    )
    assert found.start == pytest.approx(spent["start"])
    assert found.between + found.other == pytest.approx(spent["between"] + spent["other"])
    if all(one.end for one in attempts[:-1]):
        assert (found.between, found.other) == (pytest.approx(spent["between"]), pytest.approx(spent["other"]))
        assert found.exact
    else:
        assert not found.exact
    parts = found.start + found.kept + found.redone + sum(found.aside.values()) + found.between + found.other
    assert parts == pytest.approx(found.total)
    assert found.goodput == pytest.approx(spent["kept"] / (now - 1000.0))


def test_wall_time_is_never_more_than_there_was() -> None:
    """Rows of a branch tell of time before its first start, and clocks of hosts differ."""
    attempts = [Attempt(1, Launch(1, 100.0), Start(1, 110.0), End(1, 210.0, 0))]
    found = wall_time(attempts, 210.0, 210.0, StepTime(1000.0, 500.0, {"validation": 500.0}))
    assert found is not None and not found.exact
    assert (found.kept, found.redone, found.aside, found.goodput) == (50.0, 25.0, {"validation": 25.0}, 50 / 110)
    assert wall_time([], 5.0, 5.0, StepTime(1.0)) is None


def one(number: int, ago: float, started: bool = True, code: int | None = None) -> Attempt:
    end = None if code is None else End(number, NOW - ago + 50, code, "words")
    start = Start(number, NOW - ago + 10, "n1", ["n1", "n2"], processes=4) if started else None
    return Attempt(number, Launch(number, NOW - ago, "n1"), start, end)


def beat(number: int, ago: float, phase: str = "engine") -> Heartbeat:
    return Heartbeat(NOW - ago, number, 7, phase=phase)


@pytest.mark.parametrize(
    "expected, attempts, record, heart, requeue, modified",
    [
        ("running", [one(1, 500)], None, beat(1, 5), {}, None),
        ("running", [one(1, 500)], None, beat(1, 59), {}, None),
        ("silent", [one(1, 500)], None, beat(1, 61), {}, None),
        ("starting", [one(1, 20, False)], None, beat(1, 5), {}, None),
        ("starting", [one(1, 20, False)], None, None, {}, None),
        ("silent", [one(1, 200, False)], None, None, {}, None),
        ("starting", [one(1, 900, code=75), one(2, 20, False)], End(1, NOW - 850, 75), beat(1, 850), {}, None),
        ("silent", [one(1, 900, code=75), one(2, 800)], End(1, NOW - 850, 75), beat(1, 850), {}, None),
        ("complete", [one(1, 500, code=0)], End(1, NOW - 450, 0, "complete"), beat(1, 5, "ended"), {}, None),
        ("stopped", [one(1, 500, code=75)], End(1, NOW - 450, 75, "SIGTERM"), beat(1, 450), {}, None),
        ("waiting", [one(1, 500, code=75)], End(1, NOW - 450, 75), None, {"attempt": 1, "requeue": True}, None),
        ("stopped", [one(1, 500, code=75)], End(1, NOW - 450, 75), None, {"attempt": 1, "requeue": False}, None),
        ("stopped", [one(2, 500, code=75)], End(2, NOW - 450, 75), None, {"attempt": 1, "requeue": True}, None),
        ("failed", [one(1, 500, code=8)], None, None, {}, None),  # exit.json is torn
        ("failed", [one(1, 500)], None, beat(1, 400), {"attempt": 1, "requeue": False, "code": 137}, None),
        ("waiting", [one(1, 500)], None, beat(1, 400), {"attempt": 1, "requeue": True}, None),
        ("running", [one(2, 500)], None, beat(2, 5), {"attempt": 1, "requeue": True}, None),
        ("complete", [], End(0, NOW - 450, 0), None, {}, NOW - 450),  # an older version's folder
        ("running", [], None, None, {}, NOW - 5),
        ("unknown", [], None, None, {}, NOW - 5000),
    ],
)
def test_the_state_of_a_run(
    expected: str,
    attempts: list[Attempt],
    record: End | None,
    heart: Heartbeat | None,
    requeue: dict[str, Any],
    modified: float | None,
) -> None:
    state = state_of(attempts, record, heart, requeue, modified, NOW)
    assert state.state == expected
    assert state.live == (expected in ("running", "starting"))


def test_a_slow_heartbeat_is_waited_for() -> None:
    assert state_of([one(1, 900)], None, beat(1, 300), {}, None, NOW, interval=60).state == "running"
