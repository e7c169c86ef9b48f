"""Places of a run in a user's words: sample numbers, "2B tokens", "500 steps", "25%", and ranges between them."""

from __future__ import annotations

from megatron.config.errors import ConfigError
from megatron.config.quantities import parse_quantity
from megatron.data.schedule import Schedule
from megatron.planner.positions import (
    samples_after_steps,
    samples_at,
    stage_of_step,
    stage_of_token,
    steps_at,
    tokens_at,
)

_HOW = 'write A:B, for example 0:10, "2B tokens:+5", "500 steps:+1 steps" or "50%:+10"'


def sample_range(words: str, schedule: Schedule, option: str = "--samples") -> tuple[int, int]:
    """First sample number and the one after the last. Raises ConfigError for words that say none, or an empty range."""
    start, colon, end = words.partition(":")
    if not colon or not start.strip():
        raise ConfigError(f"{option} {words}: {_HOW}")
    first = sample_number(start, schedule, option)
    if not end.strip():
        last = schedule.samples
    elif end.strip().startswith("+"):
        last = _further(first, end.strip()[1:], schedule, option)
    else:
        last = sample_number(end, schedule, option)
    last = min(last, schedule.samples)
    if first >= last:
        raise ConfigError(
            f"{option} {words}: no sample lies there; the run has samples 0 to {schedule.samples - 1}, "
            f"{schedule.tokens:,} tokens and {schedule.steps:,} steps"
        )
    return first, last


def sample_number(words: str, schedule: Schedule, option: str = "--samples") -> int:
    """The sample at a place: a plain number is a sample number; so many tokens, steps or percent of the run in."""
    try:
        quantity = parse_quantity(words.strip(), default_unit="samples")
    except ValueError as error:
        raise ConfigError(f"{option} {words}: {error}; {_HOW}") from None
    amount = quantity.amount
    if quantity.unit == "samples":
        return int(amount)
    if quantity.unit == "steps":
        if amount >= schedule.steps:
            return schedule.samples
        stage = stage_of_step(schedule, int(amount))
        return stage.start_sample + samples_after_steps(stage, int(amount) - stage.start_step)
    tokens = int(amount * schedule.tokens) if quantity.unit == "share" else int(amount)
    if tokens >= schedule.tokens:
        return schedule.samples
    # The sample that holds the token: the last one that begins at or before it.
    stage = stage_of_token(schedule, tokens)
    return stage.start_sample + samples_at(stage, tokens - stage.start_token + 1) - 1


def _further(first: int, words: str, schedule: Schedule, option: str) -> int:
    """The sample number that lies so many samples, tokens or steps after another."""
    try:
        quantity = parse_quantity(words, default_unit="samples")
    except ValueError as error:
        raise ConfigError(f"{option} +{words}: {error}; {_HOW}") from None
    if quantity.unit == "samples":
        return first + int(quantity.amount)
    stage, offset = schedule.locate(min(first, schedule.samples - 1))
    if quantity.unit == "steps":
        goal = stage.start_step + steps_at(stage, offset) + int(quantity.amount)
        return sample_number(f"{goal} steps", schedule, option)
    tokens = int(quantity.amount * (schedule.tokens if quantity.unit == "share" else 1))
    return sample_number(f"{stage.start_token + tokens_at(stage, offset) + tokens} tokens", schedule, option)
