"""Hooks on their own: what was loaded is compared with what the ledger says; what is logged of a start."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.data.ledger import hash_words
from megatron.engines.base import MicrobatchLike, StepResult
from megatron.metrics.meters import StepClock
from megatron.metrics.report_data import read_metrics
from megatron.metrics.sinks import JsonlSink, cut_after, flat_numbers
from megatron.trainer.hooks import CompareOrder, Log
from megatron.trainer.state import Step, TrainerState


@dataclass
class Batch:
    microbatches: Sequence[MicrobatchLike] = ()
    training_stage: str = "balanced"
    samples: int = 1
    tokens: int = 4
    padding: int = 0
    digest: str = "0"
    loaded: tuple[int, int] = (0, 0)
    samples_by_source: Mapping[str, int] = field(default_factory=dict)
    position: dict[str, Any] = field(default_factory=dict)
    step: int = 1
    passed_over: bool = False


def step(number: int, loaded: tuple[int, int], order: list[int]) -> SimpleNamespace:
    batch = SimpleNamespace(loaded=loaded, position={"order": hash_words(order)})
    return SimpleNamespace(state=SimpleNamespace(step=number), batch=batch)


def test_M3_other_samples_than_the_ledger_says_stop_the_run() -> None:
    compare = CompareOrder([5, 2**64 - 1])
    compare(step(1, (7, 3), [12, 2]))  # sums wrap at 2^64
    compare(step(2, (1, 1), [13, 3]))
    with pytest.raises(RuntimeError, match="step 3: the samples that were loaded have the order hash"):
        compare(step(3, (1, 1), [14, 5]))


def test_the_first_row_after_a_start_says_what_runs_from_there_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first, layout in ((1, "2 processes: data 2"), (3, "one process")):
        sink = JsonlSink(path)
        log = Log([sink], ["code"], StepClock(), {"layout": layout})
        for number in (first, first + 1):
            log(Step(TrainerState(step=number), Batch(), StepResult(1.0, {}, 1.0, 4, True), 0.1, False, ""))
        sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    said = [row.get("start") for row in rows]
    assert said == [{"layout": "2 processes: data 2"}, None, {"layout": "one process"}, None]
    assert not [name for row in rows for name in flat_numbers(row) if "start" in name], "no curve for dashboards"
    assert cut_after(path, 2) == 2 and [*read_metrics(path)[0][0]["start"]] == ["layout"]
