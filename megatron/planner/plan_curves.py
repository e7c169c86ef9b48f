"""Learning rate and epochs over tokens as points, for the page and the picture."""

from __future__ import annotations

from megatron.data.schedule import Schedule, TrainingStage
from megatron.optim.lr import LRSchedule
from megatron.planner.positions import samples_at, tokens_at, used_at

Point = tuple[float, float]
_POINTS = 60


def rate_curves(schedule: Schedule, lr: LRSchedule) -> list[list[Point]]:
    """(token, rate) of each stage by its own law, both ends and the law's corners included: a jump between two stages
    is a gap between two lists."""
    curves = []
    for stage in schedule.stages:
        law, start, length = lr.law_at(stage.index), stage.start_token, stage.tokens
        places = {start + length * number // _POINTS for number in range(_POINTS + 1)}
        places |= {law.origin + corner for corner in (law.warmup, law.horizon)}
        curves.append([(float(at), law.rate(at)) for at in sorted(places) if start <= at <= start + length])
    return curves


def epoch_curve(schedule: Schedule, source: str, epoch_tokens: int) -> list[Point]:
    """(token, lifetime epochs) of a source over the run: straight lines, or parabolas where its weight is ramped."""
    points: list[Point] = []
    for stage in schedule.stages if epoch_tokens else ():
        for offset in _offsets(stage):
            epochs = float(used_at(stage, source, offset)) / epoch_tokens
            # A stage ends in whole samples, up to one from the target that is drawn within it.
            epochs = max(epochs, points[-1][1]) if points else epochs
            points.append((float(stage.start_token + tokens_at(stage, offset)), epochs))
    return points


def _offsets(stage: TrainingStage) -> list[int]:
    corners = {part.start for part in stage.weights.segments if part.start < stage.samples}
    if any(part.to is not None for part in stage.weights.segments):
        total = stage.tokens
        corners |= {samples_at(stage, total * number // 24) for number in range(25)}
    return sorted(corners | {0, stage.samples})
