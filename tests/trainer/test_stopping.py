"""What asks a run to stop or to save, and what all ranks make of it."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.trainer.decisions import Decision, decision_of, reasons_of
from megatron.trainer.over_ranks import AllRanks
from megatron.trainer.pace import Pace
from megatron.trainer.stopping import WallTime
from megatron.trainer.switches import Switches

SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


# One decision of all ranks


class _OnPaper:
    """A mesh whose sums are made by hand: 2^20 - 1 ranks, of which some were asked."""

    def __init__(self, asked: list[list[str]], reasons: tuple[str, ...]) -> None:
        self.layout = SimpleNamespace(data=1)
        self.place = SimpleNamespace(pipeline=0, context=0, tensor=0)
        self.world_size, self.rank = len(asked), 0
        self.votes = [AllRanks._counted(SimpleNamespace(_reasons=reasons), one) for one in asked]  # type: ignore[arg-type]

    def sum_on_host(self, numbers: list[int]) -> list[int]:
        assert numbers == self.votes[0]
        total = [sum(column) for column in zip(*self.votes, strict=True)]
        assert all(number < 2**63 for number in total)
        return total


def test_all_ranks_do_what_counts_most_of_all_that_any_was_asked() -> None:
    reasons, choose = reasons_of(SIGNALS), random.Random(4)
    assert reasons[0] == "stop-now" and reasons[-2:] == ("wall time", "save-now")
    for _ in range(200):
        asked = [[reason for reason in reasons if choose.random() < 0.1] for _ in range(choose.randint(1, 9))]
        together = set(itertools.chain(*asked))
        mesh: Any = _OnPaper(asked, reasons)
        decision = AllRanks(mesh, reasons).decide(asked[0])
        stop = next((reason for reason in reasons[:-1] if reason in together), "")
        assert decision == Decision(stop, "save-now" in together)


def test_a_million_ranks_may_be_asked_by_everything_at_once() -> None:
    reasons, many = reasons_of(SIGNALS), 2**20 - 1
    mesh: Any = _OnPaper([list(reasons)], reasons)
    mesh.votes = [[many * number for number in mesh.votes[0]]]
    total = AllRanks(SimpleNamespace(**vars(mesh), sum_on_host=lambda numbers: mesh.votes[0]), reasons)  # type: ignore[arg-type]
    assert all(number < 2**63 for number in mesh.votes[0])
    assert total.decide(reasons) == Decision("stop-now", True)


def test_a_stop_for_good_counts_before_one_that_is_requeued() -> None:
    reasons = reasons_of(SIGNALS)
    assert decision_of(["SIGUSR1", "stop-now"], reasons).stop == "stop-now"
    assert decision_of(["wall time", "SIGUSR1"], reasons).stop == "SIGUSR1"
    assert decision_of(["save-now"], reasons) == Decision("", True)
    assert decision_of([], reasons) == Decision()


# The allocation's end


def test_a_run_that_follows_the_rule_always_has_its_save_before_the_end() -> None:
    """Simulated runs: steps, validations and saves whose lengths vary up to twice; the margin takes what they grow."""
    choose = random.Random(5)
    for _ in range(300):
        clock, pace = [1000.0], Pace()
        step_seconds, save_seconds = choose.uniform(0.1, 50), choose.uniform(0.1, 300)
        validation_seconds, every, ahead = choose.uniform(0.1, 100), choose.randint(1, 20), choose.randint(1, 2)
        save_every = choose.randint(1, 30)
        margin = 2 * step_seconds * ahead + 4 * validation_seconds
        end = 1000.0 + choose.uniform(0, 5000)
        wall = WallTime(end, margin, pace, lambda clock=clock: clock[0])  # type: ignore[misc]
        pace.expect(0, 1, 1.0)
        pace.measured_before(2 * step_seconds, 2 * save_seconds)
        pace.validation_took(2 * validation_seconds)
        wall.plan(lambda number, every=every: number % every == 0, ahead)  # type: ignore[misc]

        def spend(seconds: float, clock: list[float] = clock) -> float:
            took = seconds * choose.uniform(1, 2)
            clock[0] += took
            return took

        step = 0
        while not wall.is_over(step):
            step += 1
            pace.step_took(spend(step_seconds))
            if step % every == 0:
                pace.validation_took(spend(validation_seconds))
            if step % save_every == 0:
                pace.save_took(spend(save_seconds))
        if step:  # else too short, and refused
            for _ in range(ahead - 1):
                spend(step_seconds)
            spend(save_seconds)
            assert clock[0] <= end


def test_no_time_is_given_away() -> None:
    """Where nothing varies, one more step and save would not have fitted beside the margin and the second save."""
    clock, pace = [0.0], Pace()
    wall = WallTime(1000.0, 60, pace, lambda: clock[0])
    wall.plan(lambda step: False, 1)
    pace.measured_before(7, 20)
    step = 0
    while not wall.is_over(step):
        clock[0] += 7
        step += 1
        pace.step_took(7)
        pace.save_took(20)
    assert step == (1000 - 60 - 2 * 20) // 7


def test_before_anything_was_measured() -> None:
    pace = Pace()
    pace.expect(7_000_000_000, 8, 3.0)
    assert pace.longest_save == 5 + 12 * 7e9 / 8 / 100e6 and pace.measured_save is None
    assert pace.longest_step == 0 and pace.median_step is None
    pace.measured_before(4.0, 400.0)
    assert (pace.longest_step, pace.longest_save, pace.longest_validation) == (4.0, 400.0, 12.0)
    pace.step_took(2.0)
    pace.save_took(30.0)
    assert (pace.longest_step, pace.longest_save, pace.longest_validation) == (2.0, 30.0, 6.0)
    for seconds in (9.0, *[1.0] * 19):
        pace.step_took(seconds)
    assert pace.longest_step == 9.0 and pace.median_step == 1.0
    pace.step_took(1.0)
    assert pace.longest_step == 1.0, "a step that compiled is forgotten"


def test_an_end_that_is_past_is_refused_and_a_short_one_named() -> None:
    with pytest.raises(ConfigError, match="is past"):
        WallTime(999.0, 60, Pace(), lambda: 1000.0)
    wall = WallTime(1050.0, 60, Pace(), lambda: 1000.0)
    assert wall.is_over(0)
    words = str(wall.too_short(0))
    assert "too short: 50 s" in words and "(an estimate)" in words and "health.end_margin_seconds = 60" in words


# Switch files


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_switch_file_is_seen_served_and_removed(tmp_path: Path, said: list[str]) -> None:
    switches = Switches(tmp_path, said.append)
    switches.look()
    assert switches.asked == ()
    for name in ("save-now", "stop-now"):
        (tmp_path / name).touch()
    assert switches.asked == (), "only a look sees it"
    switches.look()
    assert switches.asked == ("stop-now", "save-now")
    switches.serve("save-now")
    switches.look()
    assert switches.asked == ("stop-now",), "what is being served is not asked for again"
    switches.served()
    switches.look()
    assert switches.asked == ("stop-now",) and not (tmp_path / "save-now").exists()
    (tmp_path / "save-now").touch()
    switches.look()
    assert switches.asked == ("stop-now", "save-now"), "a new file is a new request"
    switches.served()
    assert (tmp_path / "stop-now").exists() and said == []


def test_a_file_that_vanishes_is_no_request_and_no_trouble(tmp_path: Path, said: list[str]) -> None:
    switches = Switches(tmp_path, said.append)
    (tmp_path / "stop-now").touch()
    switches.look()
    switches.serve("stop-now")
    (tmp_path / "stop-now").unlink()
    switches.served()
    switches.look()
    assert switches.asked == () and said == []


def test_a_folder_is_named_once_and_never_obeyed(tmp_path: Path, said: list[str]) -> None:
    switches = Switches(tmp_path, said.append)
    (tmp_path / "save-now").mkdir()
    for _ in range(3):
        switches.look()
        assert switches.asked == ()
        (tmp_path / "save-now" / "x").touch()
    assert len(said) == 1 and "save-now is a folder, and not obeyed" in said[0]
    (tmp_path / "save-now" / "x").unlink()
    (tmp_path / "save-now").rmdir()
    (tmp_path / "save-now").touch()
    switches.look()
    assert switches.asked == ("save-now",)


def test_a_link_to_nothing_is_a_file_like_any_other(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "save-now").symlink_to(tmp_path / "nowhere")
    switches = Switches(tmp_path, said.append)
    switches.look()
    assert switches.asked == ("save-now",)
    switches.serve("save-now")
    switches.served()
    assert not (tmp_path / "save-now").is_symlink() and said == []


@pytest.mark.parametrize("name", ["save-now", "stop-now"])
def test_what_cannot_be_removed_is_obeyed_once_and_named(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    switches = Switches(tmp_path, said.append)
    (tmp_path / name).touch()

    def unlink(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "unlink", unlink)
    switches.look()
    assert switches.asked == (name,)
    switches.serve(name)
    switches.served()
    for _ in range(3):
        switches.look()
        assert switches.asked == ()
    assert len(said) == 1 and f"{name} cannot be removed (Operation not permitted)" in said[0]
    again = Switches(tmp_path, said.append)
    again.at_start()
    assert again.asked == (() if name == "stop-now" else (name,)), "a start must not end at once, over and over"


def test_a_stop_that_an_earlier_attempt_left_is_taken_and_removed(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "stop-now").touch()
    switches = Switches(tmp_path, said.append)
    switches.at_start()
    assert switches.asked == ("stop-now",) and not (tmp_path / "stop-now").exists()
    switches.look()
    assert switches.asked == ("stop-now",), "removed, and still to be obeyed"
    switches.serve("stop-now")
    switches.served()
    assert switches.asked == () and said == []
