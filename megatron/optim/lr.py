"""The learning rate over tokens. A training stage may say a law of its own; one that says none continues the last.

A law has a position, tokens since the stage that said it began, measured at the end of the step that uses the rate: so
the first step of a warm-up is above zero, and the last step before the horizon gets exactly `final`. Torch-free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import cos, pi, sqrt
from typing import Any, Literal

from megatron.config.errors import ConfigError
from megatron.config.quantities import parse_quantity
from megatron.config.schema import LRSection, StageSection
from megatron.data.schedule import Schedule, TrainingStage

Shape = Literal["constant", "linear", "cosine", "1-sqrt", "exponential"]


@dataclass(frozen=True)
class LRLaw:
    """start → peak over `warmup` tokens, then peak → final by `shape` up to `horizon`, then final for ever.

    Positions are tokens from `origin`, the first token of the training stage that said the law. The horizon of a
    constant one is its warmup.
    """

    origin: int
    start: float
    warmup: int
    peak: float
    shape: Shape
    final: float
    horizon: int

    def rate(self, tokens: int) -> float:
        """The rate of the step that ends when `tokens` tokens of the whole run are consumed."""
        position = tokens - self.origin
        if position < self.warmup:
            return self.start + (self.peak - self.start) * max(0, position) / self.warmup
        if self.shape == "constant":
            return self.peak
        if position >= self.horizon:
            return self.final
        progress = (position - self.warmup) / (self.horizon - self.warmup)
        return self.final + (self.peak - self.final) * _remaining(self.shape, progress, self.peak, self.final)

    def to_json(self) -> dict[str, Any]:
        """As plain values, for the ledger."""
        return asdict(self)


def _remaining(shape: Shape, progress: float, peak: float, final: float) -> float:
    """The part of the way from final to peak that is left at `progress` 0 to 1."""
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return 0.5 * (1.0 + cos(pi * progress))
    if shape == "1-sqrt":
        return 1.0 - sqrt(progress)
    if peak == final:
        return 0.0
    return float((peak * (final / peak) ** progress - final) / (peak - final))


@dataclass(frozen=True)
class LRSchedule:
    """The law in force in every training stage."""

    origins: tuple[int, ...]
    laws: tuple[LRLaw, ...]

    def law_at(self, stage: int) -> LRLaw:
        """The law in force in a training stage, by its index."""
        return self.laws[stage]

    def rate(self, tokens: int) -> float:
        """The rate of the step that ends when `tokens` tokens of the whole run are consumed; a step that ends on a
        stage's boundary belongs to the stage it ends."""
        return self.laws[max(0, bisect_right(self.origins, tokens - 1) - 1)].rate(tokens)


def resolve_lr(sections: Sequence[StageSection], schedule: Schedule) -> LRSchedule:
    """The laws of all training stages. Raises ConfigError where the first says none, or a law contradicts itself."""
    laws: list[LRLaw] = []
    for section, stage in zip(sections, schedule.stages, strict=True):
        if section.lr is None:
            if not laws:
                raise ConfigError(
                    f"stage {section.name!r} is the first and has no lr: give it one, for example "
                    'lr = { warmup = "2%", peak = 3e-4, shape = "cosine", final = 3e-5 }'
                )
            laws.append(laws[-1])
            continue
        current = laws[-1].rate(stage.start_token) if laws else None
        laws.append(_resolve_law(section.lr, stage, current))
    return LRSchedule(tuple(stage.start_token for stage in schedule.stages), tuple(laws))


def _resolve_law(section: LRSection, stage: TrainingStage, current: float | None) -> LRLaw:
    where = f"stage {stage.name!r}: lr"
    warmup = _tokens(section.warmup, stage)
    horizon = stage.tokens if section.horizon is None else _tokens(section.horizon, stage)
    start = _start(section, where, current)
    if start is None and section.peak is None:
        raise ConfigError(f'{where}: says neither peak nor start: give peak = a rate, or start = "current"')
    peak = section.peak if section.peak is not None else start
    assert peak is not None
    if start is None:
        start = 0.0 if warmup else peak
    if not warmup and section.peak is not None and section.peak != start:
        raise ConfigError(
            f"{where}: start is {start:g} and peak is {peak:g} without a warmup between them: "
            "give warmup, or leave one out"
        )
    final = section.final if section.final is not None else peak
    if section.shape == "constant" and final != peak:
        raise ConfigError(f'{where}: final = {final:g} is never reached with shape = "constant": choose a shape')
    if section.shape == "exponential" and (final <= 0 or peak <= 0):
        raise ConfigError(f"{where}: an exponential shape needs peak and final above 0")
    if section.shape == "constant":
        horizon = warmup  # a constant rate has none: a longer stage does not change its law
    elif horizon <= warmup:
        raise ConfigError(f"{where}: its horizon of {horizon} tokens is not after its warmup of {warmup} tokens")
    return LRLaw(stage.start_token, start, warmup, peak, section.shape, final, horizon)


def _start(section: LRSection, where: str, current: float | None) -> float | None:
    if section.start is not None and section.start_factor is not None:
        raise ConfigError(f"{where}: says both start and start_factor: give one")
    wants_current = section.start == "current" or section.start_factor is not None
    if wants_current and current is None:
        raise ConfigError(f"{where}: starts from the current rate, and no stage comes before it: give start = a rate")
    if section.start_factor is not None:
        assert current is not None
        return current * section.start_factor
    if section.start == "current":
        return current
    return float(section.start) if section.start is not None else None


def _tokens(words: int | str, stage: TrainingStage) -> int:
    tokens = stage.shapes.tokens_of(parse_quantity(words), stage.samples)
    return int(tokens + Fraction(1, 2))
