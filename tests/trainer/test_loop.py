"""The loop and its hooks, on an engine and batches that are counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from megatron.config.errors import NonFiniteError
from megatron.engines.base import DoneStep, LaunchedStep, StepResult
from megatron.metrics.meters import StepClock
from megatron.trainer.decisions import reasons_of
from megatron.trainer.held_out import HeldOut
from megatron.trainer.hooks import Checkpoint, Log, StopWhereNothingIsLearnt, Validate
from megatron.trainer.loop import Run, train
from megatron.trainer.over_ranks import OneRank
from megatron.trainer.signals import HANDLED
from megatron.trainer.state import Step, TrainerState

STAGES = {"balanced": 3, "text": 2, "cooldown": 4}
BATCH, LENGTH = 4, 8


@dataclass
class FakeMicrobatch:
    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor
    source_ids: torch.Tensor


@dataclass
class FakeBatch:
    microbatches: list[FakeMicrobatch]
    training_stage: str
    position: dict[str, Any]
    samples: int = BATCH
    tokens: int = BATCH * LENGTH
    digest: str = ""
    samples_by_source: dict[str, int] = field(default_factory=lambda: {"code": 1, "text": 3})
    passed_over: bool = False
    padding: int = 0


def batches(done: int = 0) -> Iterator[FakeBatch]:
    number = 0
    for stage, steps in STAGES.items():
        for _ in range(steps):
            number += 1
            if number > done:
                tokens = torch.full((BATCH, LENGTH), number)
                ids = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
                whole = FakeMicrobatch(tokens, tokens, ids, torch.tensor([0, 1, 1, 1]))
                halves = [FakeMicrobatch(*(getattr(whole, f)[s] for f in vars(whole))) for s in (slice(2), slice(2, 4))]
                yield FakeBatch(halves, stage, {"n": number * BATCH}, digest=f"{number:x}")


class LateStep:
    """A step of a device that works by itself: `events` shows when it is waited for."""

    ready = False

    def __init__(self, engine: FakeEngine, number: int, done: StepResult) -> None:
        self._engine, self._number, self._done = engine, number, done

    def result(self) -> StepResult:
        self._engine.events.append(f"wait {self._number}")
        return self._done


@pytest.fixture(params=[False, True], ids=["at once", "late"], autouse=True)
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The loop shows hooks the same, whether the device waits for the host after each step or works ahead."""
    monkeypatch.setattr(FakeEngine, "late", request.param)
    return bool(request.param)


@dataclass
class FakeEngine:
    bad_steps: Sequence[int] = ()
    calls: list[tuple[int, float]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    late: ClassVar[bool] = False

    def launch_step(self, microbatches: Sequence[FakeMicrobatch], lr: float) -> LaunchedStep:
        result = self.train_step(microbatches, lr)
        number = self.calls[-1][0]
        self.events.append(f"launch {number}")
        return LateStep(self, number, result) if self.late else DoneStep(result)

    def train_step(self, microbatches: Sequence[FakeMicrobatch], lr: float) -> StepResult:
        number = int(microbatches[0].tokens[0, 0])
        self.calls.append((number, lr))
        good = number not in self.bad_steps
        loss = 1.0 / number if good else math.nan
        reason = "" if good else "the loss is nan"
        return StepResult(loss, {0: (loss * 8, 8), 1: (loss * 24, 24)}, 2.0, 32, good, reason)

    def evaluate(self, microbatches: Sequence[FakeMicrobatch]) -> dict[int, tuple[float, int]]:
        return {1: (0.0, 0), 0: (6.0, 4)}


class FakeTimeline:
    ends = (3 * BATCH, 5 * BATCH, 9 * BATCH)

    def learning_rate(self, consumed_tokens: int) -> float:
        return 1.0 / consumed_tokens

    def ends_training_stage(self, consumed_samples: int) -> bool:
        return consumed_samples in self.ends


class ListSink:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def write(self, row: Any) -> None:
        self.rows.append(row)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Bench:
    """A run whose stop is requested while step `stop_at` runs."""

    stop_at: int = 0
    bad_steps: Sequence[int] = ()
    state: TrainerState = field(default_factory=TrainerState)
    begun: list[str] = field(default_factory=list)
    seen: list[Step] = field(default_factory=list)

    def run(self, *hooks: Any, looks_at: Callable[[int], bool] = lambda step: False) -> FakeEngine:
        engine = FakeEngine(self.bad_steps)
        train(
            Run(
                state=self.state,
                engine=engine,  # type: ignore[arg-type]
                batches=batches(self.state.step),
                timeline=FakeTimeline(),
                begin_training_stage=self.begun.append,
                asked=lambda: ("SIGTERM",) if engine.calls and engine.calls[-1][0] >= self.stop_at > 0 else (),
                over_ranks=OneRank(reasons_of(HANDLED)),
                hooks=[*hooks, self.seen.append],
                clock=StepClock(),
                looks_at=looks_at,
            )
        )
        return engine


def test_every_batch_once_in_order_at_its_learning_rate() -> None:
    bench = Bench()
    engine = bench.run()
    assert engine.calls == [(n, 1 / (n * BATCH * LENGTH)) for n in range(1, 10)]
    assert bench.begun == ["balanced", "text", "cooldown"]
    state = bench.state
    assert (state.step, state.consumed_samples, state.consumed_tokens) == (9, 36, 288)
    assert (state.training_stage, state.data, state.skipped) == ("cooldown", {"n": 36}, 0)


def test_a_late_step_is_looked_at_after_the_next_launch_but_where_weights_are_wanted(late: bool) -> None:
    engine = Bench().run(looks_at=lambda step: step == 7)
    if not late:
        assert engine.events == [f"launch {n}" for n in range(1, 10)]
        return
    # stages end after 3, 5 and 9; a hook looks at the weights after 7
    expected = "l1 l2 w1 l3 w2 w3 l4 l5 w4 w5 l6 l7 w6 w7 l8 l9 w8 w9"
    assert [f"{event[0]}{event.split()[1]}" for event in engine.events] == expected.split()


def test_a_stage_begins_once_however_the_run_is_cut() -> None:
    for cut in range(1, 9):
        first = Bench(stop_at=cut)
        first.run()
        assert first.state.step == cut and first.seen[-1].stop
        second = Bench(state=TrainerState.from_json(first.state.to_json()))
        second.run()
        assert first.begun + second.begun == ["balanced", "text", "cooldown"]
        assert second.state.consumed_samples == 36


def test_a_stop_before_the_first_step_trains_nothing() -> None:
    bench = Bench()
    run = Run(
        state=bench.state,
        engine=FakeEngine(),  # type: ignore[arg-type]
        batches=batches(),
        timeline=FakeTimeline(),
        begin_training_stage=bench.begun.append,
        asked=lambda: ("SIGINT",),
        over_ranks=OneRank(reasons_of(HANDLED)),
        hooks=[],
        clock=StepClock(),
    )
    assert train(run) == "SIGINT"
    assert bench.state == TrainerState() and not bench.begun


def test_rows_say_what_was_learnt_and_what_it_took() -> None:
    sink, clock = ListSink(), StepClock()
    Bench(bad_steps=[2]).run(Log([sink], ["code", "text"], clock))
    first, second, third = sink.rows[:3]
    assert first["step"] == 1 and first["training_stage"] == "balanced" and first["tokens"] == 32
    assert first["consumed_samples"] == 4 and first["consumed_tokens"] == 32
    assert first["loss"] == 1.0 and first["loss_by_source"] == {"code": 1.0, "text": 1.0}
    assert first["samples_by_source"] == {"code": 1, "text": 3} and first["grad_norm"] == 2.0
    assert not first["skipped"] and first["skipped_total"] == 0 and "skip_reason" not in first
    assert second["skipped"] and second["skipped_total"] == 1 and second["skip_reason"] == "the loss is nan"
    assert math.isnan(second["loss"])
    assert not third["skipped"] and third["skipped_total"] == 1
    assert [row["batch_digest"] for row in sink.rows] == list("123456789")
    for row in sink.rows:
        assert row["tokens_per_second"] > 0 and row["step_seconds"] >= row["engine_seconds"] >= 0


def test_validation_by_source_every_n_steps_and_at_stage_ends() -> None:
    sink = ListSink()
    parts = HeldOut([next(batches()).microbatches[0]])  # type: ignore[arg-type]
    held_out = dict.fromkeys(STAGES, parts) | {"cooldown": HeldOut(parts.microbatches, ("text",))}
    Bench().run(Validate(4, FakeEngine(), held_out, ["code", "text"], [sink], StepClock()))
    assert [row["step"] for row in sink.rows] == [3, 4, 5, 8, 9]
    assert sink.rows[0]["validation"] == {"code": 1.5, "text": None}
    assert sink.rows[0]["training_stage"] == "balanced" and sink.rows[0]["consumed_tokens"] == 96
    assert [row.get("validation_masked") for row in sink.rows] == [None, None, None, ["text"], ["text"]]


def test_checkpoints_every_n_steps_at_stage_ends_and_at_a_stop() -> None:
    saves: list[tuple[int, bool, bool]] = []
    bench = Bench(stop_at=7)
    bench.run(Checkpoint(2, lambda keep, retire: saves.append((bench.state.step, keep, retire)), StepClock()))
    assert saves == [(2, False, True), (3, True, True), (4, False, True), (5, True, True), (6, False, True)] + [
        (7, False, True)
    ]


def test_while_nothing_is_learnt_old_checkpoints_are_safe() -> None:
    saves: list[tuple[int, bool, bool]] = []
    bench = Bench(stop_at=7, bad_steps=[2, 3, 4, 6, 7])
    bench.run(Checkpoint(1, lambda keep, retire: saves.append((bench.state.step, keep, retire)), StepClock()))
    assert saves == [(1, False, True), (3, True, False), (5, True, True), (7, False, False)]


def test_B1_too_many_steps_without_an_update_end_the_run() -> None:
    bench = Bench(bad_steps=[2, 4, 5, 6, 7])
    with pytest.raises(NonFiniteError, match="step 6: 3 steps in a row.*step-000000003.*--samples 20:24") as error:
        bench.run(StopWhereNothingIsLearnt(3, lambda: "step-000000003"))
    assert error.value.exit_code == 8 and bench.state.step == 6
    Bench(bad_steps=[2, 4, 5, 6, 7]).run(StopWhereNothingIsLearnt(5, lambda: ""))


def test_the_loop_fits_on_one_screen() -> None:
    import inspect

    assert len(inspect.getsource(train).splitlines()) <= 30
