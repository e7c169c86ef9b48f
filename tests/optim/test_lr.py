"""The learning rate over stages, against closed forms and torch's own schedulers."""

from __future__ import annotations

from decimal import Decimal
from math import cos, pi
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.config.schema import StageSection
from megatron.data.schedule import resolve_schedule
from megatron.data.stage_resolution import SourceFacts
from megatron.optim.lr import LRSchedule, resolve_lr

STEP = 40


def lr_of(*stages: dict[str, Any]) -> LRSchedule:
    tables = [{"name": f"s{i}", "mixture": {"x": 1}, "steps": 10} | stage for i, stage in enumerate(stages)]
    sections = [StageSection.model_validate(table) for table in tables]

    facts = {"x": SourceFacts("x", 10**9, Decimal(1), "error")}
    return resolve_lr(sections, resolve_schedule(sections, facts, seq_length=10, global_batch_size=4))


def rates(schedule: LRSchedule, first: int, last: int) -> list[float]:
    return [schedule.rate(step * STEP) for step in range(first, last + 1)]


def test_warmup_is_linear_and_never_zero() -> None:
    schedule = lr_of({"lr": {"warmup": "5 steps", "peak": 1.0}})
    assert rates(schedule, 1, 7) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_cosine_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    schedule = lr_of({"lr": {"peak": 0.5, "shape": "cosine", "final": 0.1}})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    expected = []
    for _ in range(10):
        optimizer.step()
        theirs.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(schedule, 1, 10) == pytest.approx(expected)


def test_a_stage_without_lr_goes_on_with_the_law_before_it() -> None:
    lr = {"warmup": "10%", "peak": 1.0, "shape": "cosine", "final": 0.0, "horizon": "20 steps"}
    two, one = lr_of({"lr": lr}, {}), lr_of({"lr": lr | {"warmup": "1 steps"}, "steps": 20})
    assert rates(two, 1, 20) == pytest.approx(rates(one, 1, 20))
    assert two.rate(20 * STEP) == 0.0


def test_a_cosine_may_stop_short_of_its_horizon() -> None:
    schedule = lr_of({"lr": {"peak": 1.0, "shape": "cosine", "final": 0.0, "horizon": "40 steps"}})
    assert schedule.rate(10 * STEP) == pytest.approx(0.5 * (1 + cos(pi / 4)))


def test_cooldown_starts_from_the_current_rate_and_reaches_final() -> None:
    schedule = lr_of({"lr": {"peak": 0.3}}, {"lr": {"start": "current", "shape": "linear", "final": 0.0}})
    assert rates(schedule, 10, 20) == pytest.approx([0.3 * (1 - k / 10) for k in range(11)])


def test_rewarming_and_a_fraction_of_the_current_rate() -> None:
    again = {"lr": {"start_factor": 0.5, "warmup": "5 steps", "peak": 0.8, "shape": "1-sqrt", "final": 0.0}}
    schedule = lr_of({"lr": {"peak": 0.4}}, again)
    assert schedule.rate(11 * STEP) == pytest.approx(0.2 + 0.6 / 5)
    assert schedule.rate(15 * STEP) == pytest.approx(0.8)
    assert schedule.rate(16 * STEP) == pytest.approx(0.8 * (1 - (1 / 5) ** 0.5))


def test_exponential_halves_evenly() -> None:
    schedule = lr_of({"lr": {"peak": 1.0, "shape": "exponential", "final": 1 / 1024}})
    assert rates(schedule, 1, 10) == pytest.approx([2.0**-k for k in range(1, 11)])


def test_M5_a_constant_law_is_the_same_in_a_longer_stage() -> None:
    lr = {"lr": {"warmup": "2 steps", "peak": 1.0}}
    assert lr_of(lr).laws == lr_of(lr | {"steps": 30}).laws
    decays = {"lr": {"peak": 1.0, "shape": "cosine", "final": 0.0}}
    assert lr_of(decays).laws != lr_of(decays | {"steps": 30}).laws


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (None, "has no lr"),
        ({}, "neither peak nor start"),
        ({"start": "current"}, "no stage comes before"),
        ({"peak": 1.0, "final": 0.1}, "never reached"),
        ({"peak": 1.0, "shape": "cosine", "warmup": "10 steps"}, "not after its warmup"),
        ({"peak": 1.0, "shape": "exponential", "final": 0.0}, "above 0"),
        ({"start": 0.1, "start_factor": 0.5, "peak": 1.0}, "both start"),
        ({"start": 0.1, "peak": 1.0}, "without a warmup"),
    ],
)
def test_B1_a_law_that_contradicts_itself_is_refused(lr: dict[str, Any] | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lr_of({} if lr is None else {"lr": lr})
