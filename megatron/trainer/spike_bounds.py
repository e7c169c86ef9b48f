"""What a step's loss and gradient norm are compared with: the steps before it, kept as state of the run.

The rule is OLMo-core's SkipStepOptimizer (a step whose loss or norm is more than 6 standard deviations above the mean
of the last 128 makes no update, once there are 64), with four changes:

- median and median absolute deviation (times 1.4826, which makes it the standard deviation of normal values) instead of
  mean and standard deviation: a spike in the window widens the latter for 128 steps and hides the next one.
- of the gradient norm its logarithm: norms scatter in proportion to their size, and are skewed.
- a least deviation, so that a window that hardly moves makes no spike of rounding.
- the window begins anew where losses change for a reason that the config names: see `leaps`.

Steps without an update stay in the window where their numbers are finite: values of a few steps do not move a median,
and what lasts half a window is no spike but the way things are. The run's cap comes first, and asks a person.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from megatron.config.spikes_section import SpikesSection
from megatron.data.schedule import Schedule
from megatron.data.weight_function import Segment, WeightFunction
from megatron.engines.base import Bounds

LAG = 2
"""The bounds of step n are made of steps up to n - LAG. Where a device works ahead, step n is launched before the host
has seen n - 1: the same definition everywhere makes the same decisions everywhere."""
NORMAL = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution: 1 / 0.6745."""
LEAST = {"loss": 0.01, "grad_norm": 0.05}
"""Least deviation, in nats, and of the logarithm of the norm."""
LEAST_SHIFT = 0.02
"""A mixture that jumps by less of its weight is no reason to begin the window anew."""


@dataclass
class SpikeState:
    """What `state.json` keeps of spikes.

    since: the sample at which the window began · seen: [step, loss, gradient norm] of the steps in it · steps: of the
    spikes that still count · roll_backs: all of the run, oldest first, each {"step", "stage", "reason", "restart",
    "last", "checkpoint"}: steps restart + 1 to last are passed over.
    """

    since: int = 0
    seen: list[list[float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    roll_backs: list[dict[str, Any]] = field(default_factory=list)

    def passes_over(self, step: int) -> bool:
        """Whether a step is not to be trained."""
        return any(one["restart"] < step <= one["last"] for one in self.roll_backs)

    def remember(self, step: int, loss: float, grad_norm: float, since: int, window: int) -> None:
        """Takes a step of the part of the run that begins at sample `since`."""
        if since != self.since:
            self.since, self.seen = since, []
        if math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm > 0:
            self.seen.append([step, loss, grad_norm])
        del self.seen[: -(window + LAG)]

    def bounds(self, step: int, since: int, section: SpikesSection) -> Bounds | None:
        """Those of a step that lies in the part that begins at sample `since`; None where nothing is judged yet."""
        if step <= section.warm_up or since != self.since:
            return None
        known = [entry for entry in self.seen if entry[0] <= step - LAG][-section.window :]
        if len(known) < max(2, section.window // 2):
            return None
        found: dict[str, Any] = {}
        if "loss" in section.of:
            middle, spread = middle_and_spread([entry[1] for entry in known], LEAST["loss"])
            found["loss"] = middle + section.deviations * spread
            found["loss_words"] = _words(f"{middle:.4g} + {section.deviations:g} x {spread:.3g}", len(known))
        if "grad_norm" in section.of:
            middle, spread = middle_and_spread([math.log(entry[2]) for entry in known], LEAST["grad_norm"])
            found["grad_norm"] = _exp(middle + section.deviations * spread)
            factor = f"{_exp(middle):.4g} x {_exp(spread):.3g}^{section.deviations:g}"
            found["grad_norm_words"] = _words(factor, len(known))
        return Bounds(**found)


def middle_and_spread(values: Sequence[float], least: float) -> tuple[float, float]:
    """Median, and the standard deviation that the median absolute deviation stands for, `least` at the least."""
    middle = median(values)
    return middle, max(least, NORMAL * median(abs(value - middle) for value in values))


def _words(formula: str, count: int) -> str:
    return f"{formula} of {count} steps before"


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def leaps(schedule: Schedule) -> list[int]:
    """Sample numbers of the run at which losses may leap for a known reason, 0 first: a training stage begins, its
    mixture jumps by LEAST_SHIFT of its weight or more, or sequences get another length."""
    found = {0}
    for stage in schedule.stages:
        found.add(stage.start_sample)
        found |= {
            stage.start_sample + at
            for at in (*_jumps(stage.weights), *stage.shapes.change_starts)
            if at < stage.samples
        }
    return sorted(found)


def part_of(sample: int, starts: Sequence[int]) -> int:
    """The last of the sorted starts that is not beyond a sample."""
    return starts[bisect_right(starts, sample) - 1]


def _jumps(function: WeightFunction) -> list[int]:
    jumps = []
    for before, after in zip(function.segments, function.segments[1:], strict=False):
        if _shift(before, after) >= LEAST_SHIFT * function.denominator:
            jumps.append(after.start)
    return jumps


def _shift(before: Segment, after: Segment) -> float:
    then: Mapping[str, int] = before.weights if before.to is None else before.to
    now = after.weights
    return sum(abs(now.get(name, 0) - then.get(name, 0)) for name in {*then, *now}) / 2
