"""A stage's exact weights for people: "text 50 %, web_code 40 %"; its steps with where they begin, a ramp by ->."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.data.weight_function import WeightFunction

_MOST = 6


def mixture_in_words(weights: WeightFunction | Mapping[str, Any], samples: int | None = None) -> str:
    """Shares of each source, the largest first, to a hundredth of a percent. samples: of the stage, where it is known;
    steps then say where in it they begin."""
    function = weights if isinstance(weights, WeightFunction) else WeightFunction.from_json(weights)
    parts: list[str] = []
    for segment in function.segments:
        words = _shares(segment.weights, function.denominator)
        if segment.to is not None:
            words += f" -> {_shares(segment.to, function.denominator)}"
        elif parts and segment is function.segments[-1] and parts[-1].endswith(f"-> {words}"):
            continue  # a ramp's end, held
        at = f"from {_percent(segment.start / samples)} on: " if samples and len(function.segments) > 1 else ""
        parts.append(at + words)
    return " | ".join(parts)


def _shares(units: Mapping[str, int], denominator: int) -> str:
    order = sorted(units, key=lambda name: (-units[name], name))
    shown = [f"{name} {_percent(units[name] / denominator)}" for name in order[:_MOST]]
    if len(order) > _MOST:
        rest = sum(units[name] for name in order[_MOST:])
        shown.append(f"{len(order) - _MOST} more {_percent(rest / denominator)}")
    return ", ".join(shown)


def _percent(share: float) -> str:
    return f"{round(share * 100, 2):g} %"
