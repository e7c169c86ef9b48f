"""How long a pipeline's ranks wait, against each schedule's formula (megatron/planner/bubble.py).

Real processes on gloo run torch's schedules through megatron's own Pipeline. Stages sleep for a fixed time in their
forward pass, for the gradient of their inputs and for that of their weights, so that two cores run four ranks without
disturbing each other. A step is timed at two lengths of this unit; the difference divided by the difference of the
units is the step's length in units, free of what Python and messages cost besides. Of several runs the quickest counts,
since noise only adds.

    python benchmarks/pipeline_bubble.py [--pipelines 2,4] [--microbatches 4,8,16] [--repeat 3]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ranks import run_ranks

from megatron.config.layout import Layout
from megatron.config.layout_sizes import MICROBATCHES
from megatron.config.partition import stage_count, stage_numbers
from megatron.config.schema import ParallelSection
from megatron.parallel.mesh import Mesh, close_mesh, launched, open_mesh
from megatron.parallel.pipeline import Pipeline, Rows, StageShape
from megatron.planner.bubble import bubble_fraction

BOUND = 0.1
SCHEDULES = ("1f1b", "interleaved", "zero-bubble", "zbv")
_UNITS = (0.04, 0.16)
_HIDDEN, _LENGTH = 4, 2


@dataclass(frozen=True)
class Measured:
    """A step of one schedule. units: its length; work: what a rank computes in it. Both in units of a stage's part."""

    schedule: str
    pipeline: int
    microbatches: int
    units: float
    work: int

    @property
    def waiting(self) -> float:
        """Units that a rank waits."""
        return self.units - self.work

    @property
    def bubble(self) -> float:
        """The measured share of the step."""
        return self.waiting / self.units

    @property
    def formula(self) -> float:
        """The share by formula."""
        return float(bubble_fraction(self.schedule, self.pipeline, 2, self.microbatches))

    @property
    def off(self) -> float:
        """How far the measured bubble is from the formula, relative to it."""
        return self.bubble / self.formula - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", default="2,4", help="ranks, separated by commas")
    parser.add_argument("--microbatches", default="4,8,16", help="in a step, separated by commas")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each step, of which the quickest counts")
    args = parser.parse_args()
    counts = [int(words) for words in args.microbatches.split(",")]
    print("| schedule | ranks | microbatches | bubble | formula | off by |\n|---|---:|---:|---:|---:|---:|")
    worst = 0.0
    for ranks in (int(words) for words in args.pipelines.split(",")):
        for row in measure(ranks, counts, args.repeat):
            worst = max(worst, abs(row.off))
            figures = f"{row.bubble:.2%} | {row.formula:.2%} | {row.off:+.1%}"
            print(f"| {row.schedule} | {ranks} | {row.microbatches} | {figures} |", flush=True)
    print(f"\nworst {worst:.1%} (bound {BOUND:.0%})")
    return int(worst > BOUND)


def measure(
    ranks: int, microbatches: Sequence[int], repeat: int, schedules: Sequence[str] = SCHEDULES
) -> list[Measured]:
    """Every schedule that runs so many microbatches over so many ranks."""
    cases = [(name, count) for name in schedules for count in microbatches if MICROBATCHES[name](count, ranks)]
    times = run_ranks(ranks, _times_of_rank, cases, repeat, timeout=1800)
    return [_measured(ranks, case, [times[rank][number] for rank in range(ranks)]) for number, case in enumerate(cases)]


def _measured(ranks: int, case: tuple[str, int], spans: Sequence[Sequence[Sequence[tuple[float, float]]]]) -> Measured:
    """spans: by rank, by unit, by repetition: when the rank began and ended its step."""
    schedule, count = case
    seconds = [
        min(
            max(ends) - min(starts)
            for starts, ends in (
                zip(*(rank[unit][run] for rank in spans), strict=True) for run in range(len(spans[0][0]))
            )
        )
        for unit in range(len(_UNITS))
    ]
    section = ParallelSection.model_validate({"pipeline": ranks, "schedule": schedule})
    work = 3 * count * stage_count(section) // ranks
    return Measured(schedule, ranks, count, (seconds[1] - seconds[0]) / (_UNITS[1] - _UNITS[0]), work)


def _times_of_rank(cases: Sequence[tuple[str, int]], repeat: int) -> list[list[list[tuple[float, float]]]]:
    """By case, by unit, by repetition: (start, end) of this rank's step, on the machine's one clock."""
    mesh = open_mesh(Layout(pipeline=launched().world_size), launched(), 600)
    found = []
    for schedule, count in cases:
        section = ParallelSection.model_validate({"pipeline": mesh.pipeline.size, "schedule": schedule})
        pipeline, stages = _pipeline(section, mesh)
        step = _Step(pipeline, stages, count)
        step.run(0.0)  # torch's first step opens connections and does more than the others
        found.append([list(step.runs(unit, repeat)) for unit in _UNITS])
    close_mesh()
    return found


class _Step:
    def __init__(self, pipeline: Pipeline, stages: Sequence[SleepingStage], microbatches: int) -> None:
        self._pipeline, self._stages, self._count = pipeline, stages, microbatches
        ids = torch.zeros(microbatches, _LENGTH, dtype=torch.int64)
        self._rows = Rows(ids, ids, ids, torch.zeros(microbatches, dtype=torch.int64))

    def runs(self, unit: float, repeat: int) -> Iterator[tuple[float, float]]:
        for _ in range(repeat):
            yield self.run(unit)

    def run(self, unit: float) -> tuple[float, float]:
        for stage in self._stages:
            stage.unit = unit
        dist.barrier()
        begin = time.monotonic()
        self._pipeline.train(self._rows, self._count, 1.0)
        return begin, time.monotonic()


def _pipeline(section: ParallelSection, mesh: Mesh) -> tuple[Pipeline, list[SleepingStage]]:
    count, axis = stage_count(section), mesh.pipeline
    numbers = stage_numbers(section, axis.rank)
    owners = [0] * count
    for rank in range(axis.size):
        for number in stage_numbers(section, rank):
            owners[number] = rank
    stages = [SleepingStage(number == 0, number == count - 1) for number in numbers]
    shape = StageShape(_HIDDEN, torch.float32, 1)
    return Pipeline(stages, numbers, owners, axis, section.schedule, shape, mesh.device), stages


class SleepingStage(nn.Module):
    """A pipeline stage with a decoder's interface, whose forward pass and two gradients each take one `unit` (s)."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last, self.unit = first, last, 0.0
        self.weight = nn.Parameter(torch.zeros(_HIDDEN))

    def forward(self, x: Tensor, scale: float = 1.0, **given: Any) -> Tensor | tuple[Tensor, Tensor]:
        time.sleep(self.unit)
        # Apart, so that schedules which run the two gradients apart find each on its own path. Tokens have no
        # gradient: the first stage, which has weights beneath everything it computes, takes both times for weights.
        hidden = x.float().unsqueeze(-1).expand(*x.shape, _HIDDEN) if self.first else _Sleep.apply(x, self.unit)
        hidden = hidden + _Sleep.apply(self.weight, 2 * self.unit if self.first else self.unit)
        if self.last:
            rows = hidden.sum((1, 2))
            return (rows.sum() * scale).view(1), rows.detach().double()
        return hidden


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient.contiguous(), None


if __name__ == "__main__":
    sys.exit(main())
