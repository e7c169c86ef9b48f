"""p <= k N / R: no source gets a share that would make more than k epochs of its N tokens over R tokens.

So learned mixtures are bounded where data are few (a constraint of mixing laws and of swarms of proxy runs). What a cap
takes from a source goes to the others in proportion, until none is above its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from megatron.config.errors import ConfigError
from megatron.config.quantities import format_count
from megatron.data.weights import DENOMINATOR, round_shares


@dataclass(frozen=True)
class Capped:
    """shares: by source, whole millionths that sum to 1 · bound: of the sources that a cap holds down, the share that
    was asked for and k N / R."""

    shares: Mapping[str, Decimal]
    bound: Mapping[str, tuple[Fraction, Fraction]]

    def words(self, epochs: Decimal, tokens: int, stage_tokens: int, of: str = "") -> str:
        """What was done, for people. of: what the shares are of, where that has to be said."""
        head = f"cap of {epochs.normalize():f} epochs over {format_count(tokens)} tokens"
        if tokens < stage_tokens:
            head += f" (of a stage of {format_count(stage_tokens)}, which may so take more epochs)"
        if not self.bound:
            return f"{head}: no source is above it"
        each = ", ".join(
            f"{name} {_percent(asked)} -> {_percent(limit)}{of}" for name, (asked, limit) in sorted(self.bound.items())
        )
        return f"{head}: {each}; the others in proportion"


def capped(
    weights: Mapping[str, Fraction], sizes: Mapping[str, int], epochs: Decimal, tokens: int, where: str
) -> Capped:
    """Shares under the caps.

    Args:
        weights: by source, not normalised.
        sizes: N, tokens of one epoch of each source; of a padded stage, the places of its samples.
        epochs: k. tokens: R.

    Raises ConfigError where all sources together hold less than R tokens in k epochs.
    """
    total = sum(weights.values(), Fraction(0))
    asked = {name: weight / total for name, weight in weights.items() if weight > 0}
    limits = {name: Fraction(epochs) * sizes[name] / tokens for name in asked}
    if sum(limits.values()) < 1:
        needed = Fraction(tokens, sum(sizes[name] for name in asked))
        remedy = Decimal(-(-needed.numerator * 100 // needed.denominator)) / 100
        raise ConfigError(
            f"{where}: cap: {epochs.normalize():f} epochs of its sources are "
            f"{format_count(sum(int(Fraction(epochs) * sizes[name]) for name in asked))} tokens, and "
            f"{format_count(tokens)} are needed: set cap.epochs to at least {remedy}, or add sources"
        )
    held: set[str] = set()
    while True:
        left = 1 - sum((limits[name] for name in held), Fraction(0))
        free = sum((asked[name] for name in asked if name not in held), Fraction(0))
        above = {n for n in asked if n not in held and asked[n] * left > limits[n] * free}
        if not above:
            break
        held |= above
    # Rounded down, so that the cap holds to the millionth; what that leaves goes to the others.
    units = {name: int(limits[name] * DENOMINATOR) for name in held}
    others = {name: asked[name] for name in asked if name not in held}
    rest = DENOMINATOR - sum(units.values())
    if others and rest > 0:
        units |= round_shares(others, rest)
    elif rest:
        units = round_shares({name: limits[name] for name in held})
    shares = {name: Decimal(unit) / DENOMINATOR for name, unit in sorted(units.items()) if unit}
    return Capped(shares, {name: (asked[name], limits[name]) for name in held})


def _percent(share: Fraction) -> str:
    return f"{float(share * 100):.3g} %"
