"""From shares to exact integers, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

DENOMINATOR = 10**6


def round_shares(weights: Mapping[str, Fraction], denominator: int = DENOMINATOR) -> dict[str, int]:
    """Integers proportional to `weights` that sum to `denominator`, by largest remainder, ties by name.

    A weight above zero gets at least one unit; a weight of zero is left out. Raises ValueError when no weight is above
    zero, or when there are more sources than units.
    """
    positive = {name: Fraction(weight) for name, weight in weights.items() if weight > 0}
    total = sum(positive.values())
    if not positive:
        raise ValueError("no weight is above zero")
    if len(positive) > denominator:
        raise ValueError(f"{len(positive)} sources cannot share {denominator} units")
    exact = {name: weight * denominator / total for name, weight in positive.items()}
    units = {name: max(1, int(share)) for name, share in exact.items()}
    spare = denominator - sum(units.values())
    # Rounding up to one unit can overdraw; what is too much is taken where the rounding gave most.
    while spare:
        step = 1 if spare > 0 else -1
        candidates = [name for name in exact if step > 0 or units[name] > 1]
        order = sorted(candidates, key=lambda name: (step * (units[name] - exact[name]), name))
        for name in order[: abs(spare)]:
            units[name] += step
        spare = denominator - sum(units.values())
    return dict(sorted(units.items()))
