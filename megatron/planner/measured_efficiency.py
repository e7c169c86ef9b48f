"""What a run really reached, from its metrics.jsonl, to plan other layouts and longer runs with."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.config.errors import DataError
from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape
from megatron.config.load import load_config
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import RunConfig
from megatron.metrics.report_data import read_metrics
from megatron.planner.hardware import Accelerator, Efficiency, default_efficiency
from megatron.planner.step_time import step_time
from megatron.tokenizers.load import load_tokenizer

WARM_UP = 3
"""Steps after a start that count for nothing: compiling, caches, the first gathers."""
FEWEST = 5
"""Steps that a measurement needs besides."""


@dataclass(frozen=True)
class MeasuredBatch:
    """Steps of one batch. measured: the median of their seconds; predicted: by the planner."""

    batch: BatchShape
    steps: int
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Above 1: slower than predicted."""
        return self.measured / self.predicted


@dataclass(frozen=True)
class MeasuredRun:
    """A run's steps since its last start, beside the planner's. layout: in words. efficiency: that of the prediction,
    with `step` such that the median step comes out right."""

    layout: str
    processes: int
    batches: tuple[MeasuredBatch, ...]
    efficiency: Efficiency

    @property
    def ratio(self) -> float:
        """Measured / predicted seconds of a step, the median over all steps."""
        return statistics.median(one.ratio for one in self.batches for _ in range(one.steps))


def measured_efficiency(run: Path, accelerator: Accelerator, efficiency: Efficiency | None = None) -> Efficiency:
    """The efficiency to plan with on the device that the run had; see `measure_run`."""
    return measure_run(run, accelerator, efficiency).efficiency


def measure_run(run: Path, accelerator: Accelerator, efficiency: Efficiency | None = None) -> MeasuredRun:
    """A run's folder (config.toml, metrics.jsonl) beside the planner's steps for its layout. accelerator: its device.

    Only steps since the last start count, since a start may change the layout, and of these none of the first WARM_UP.
    Saving and validation are in no step's seconds; waiting for data is. Raises DataError where too few steps are there
    or rows lack what a step took, ConfigError for a config.toml that is none.
    """
    if not (run / "config.toml").is_file():
        raise DataError(f"{run} holds no config.toml, so it is no run's output: name the folder that run.output says")
    config = load_config(run / "config.toml")
    steps, _ = read_metrics(run / "metrics.jsonl")
    start, rows = _since_last_start(run, steps)
    by = efficiency or default_efficiency(accelerator)
    processes = processes_of(start)
    layout = resolve_layout(config.parallel, processes)
    train = config.train
    if (word := str(start.get("precision", "")).split(",")[0]) in ("fp64", "fp32", "bf16"):
        train = train.model_copy(update={"precision": word})
    by_batch: dict[BatchShape, list[float]] = {}
    for row in rows:
        by_batch.setdefault(_batch_of(run, row), []).append(float(row["step_seconds"]))
    shape = _shape(config, max(batch.seq_length for batch in by_batch))
    found = []
    for batch, seconds in by_batch.items():
        predicted = step_time(shape, config.parallel, layout, train, config.optimizer, batch, accelerator, by).total
        found.append(MeasuredBatch(batch, len(seconds), statistics.median(seconds), predicted))
    measured = MeasuredRun(_words(layout), processes, tuple(found), by)
    words = f"{by.words}, x {measured.ratio:.3g} as {len(rows)} steps of {run} took"
    return replace(measured, efficiency=replace(by, step=by.step * measured.ratio, words=words))


def processes_of(start: Mapping[str, Any]) -> int:
    """How many ran, from the record of a start; one has no layout to speak of."""
    found = re.match(r"(\d+) processes", str(start.get("layout", "")))
    return int(found.group(1)) if found else 1


def _since_last_start(
    run: Path, steps: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    starts = [number for number, row in enumerate(steps) if isinstance(row.get("start"), Mapping)]
    first = starts[-1] if starts else 0
    rows = [row for row in steps[first + WARM_UP :] if not row.get("skipped")]
    if len(rows) < FEWEST:
        raise DataError(
            f"{run / 'metrics.jsonl'} has {max(0, len(steps) - first)} steps since the run's last start, and "
            f"{WARM_UP + FEWEST} are needed to say how long one takes: train on, or name another run"
        )
    return (steps[first]["start"] if starts else {}), rows


def _batch_of(run: Path, row: Mapping[str, Any]) -> BatchShape:
    try:
        samples = sum(row["samples_by_source"].values())
        return BatchShape(int(row["tokens"]) // samples, samples)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise DataError(
            f"{run / 'metrics.jsonl'}, step {row.get('step')}: the row does not say tokens and samples_by_source: this "
            "version's `train` did not write it"
        ) from None


def _shape(config: RunConfig, longest: int) -> ModelShape:
    words = config.model.vocab_size or load_tokenizer(config.tokenizer.path).vocab_size
    return resolve_model(config.model, words, max(longest, config.model.seq_length))


def _words(layout: Layout) -> str:
    return layout.words()
