"""From weights in a user's words to exact integers: groups flattened, normalised, rounded once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fractions import Fraction

from megatron.config.errors import ConfigError

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


def flatten(
    mixture: Mapping[str, Fraction],
    groups: Mapping[str, str],
    sizes: Mapping[str, int],
    where: str,
) -> dict[str, Fraction]:
    """Weights of sources from weights of groups or sources; within a group by size in tokens.

    Args:
        mixture: weight by group name or source name, as the user wrote it.
        groups: the group of each source (its own name where none was said).
        sizes: tokens of one epoch of each source.
        where: the training stage, for messages.

    Returns weights by source, not normalised; a source that is not named is absent. Raises ConfigError for an unknown
    name, a name of both a source and a group of others, a source named both directly and through its group, and weights
    that are all zero.
    """
    result: dict[str, Fraction] = {}
    said_by: dict[str, str] = {}
    for name, weight in mixture.items():
        grouped = sorted(source for source, group in groups.items() if group == name)
        if name in groups and set(grouped) - {name}:
            raise ConfigError(
                f"{where}: mixture names {name!r}, which is a source and also the group of {', '.join(grouped)}: "
                "give the group another name"
            )
        members = [name] if name in groups else grouped
        if not members:
            known = sorted({*groups, *groups.values()})
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"{where}: mixture names {name!r}, which is neither a source nor a group: {hint}")
        size = sum(sizes[member] for member in members)
        if weight > 0 and size == 0:
            raise ConfigError(f"{where}: mixture gives weight to {name!r}, which holds no tokens to train on")
        for member in members:
            if member in said_by:
                raise ConfigError(
                    f"{where}: source {member!r} is named twice, by {said_by[member]!r} and by {name!r}: "
                    "name the group, or each of its sources"
                )
            said_by[member] = name
            result[member] = Fraction(weight) * sizes[member] / size if len(members) > 1 and size else Fraction(weight)
    if not any(weight > 0 for weight in result.values()):
        raise ConfigError(f"{where}: every weight of the mixture is zero: give at least one source a weight above zero")
    return result
