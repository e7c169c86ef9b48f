"""Quantities in a user's words: "100B", "2.5M", "500 steps", "10%". K is 1000, never 1024."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["tokens", "steps", "samples", "share"]

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MOST = 10**18
_COUNT = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)\s*(tokens?|steps?|samples?)?\s*$", re.IGNORECASE)
_SHARE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*$")


@dataclass(frozen=True)
class Quantity:
    """An amount and its unit. A share is a fraction of the training stage, 0 to 1."""

    amount: Decimal
    unit: Unit


class WrongUnitError(ValueError):
    """Of a count in another unit than its own. quantity: what was said."""

    def __init__(self, quantity: Quantity, words: str) -> None:
        super().__init__(words)
        self.quantity = quantity


def parse_count(value: object, of: Unit | None = None) -> int:
    """A whole number from an int or from words such as "100B" or "2.5M". of: what it counts, which may be said behind
    it, "100B tokens". Raises ValueError otherwise, WrongUnitError for the name of another unit and for a share."""
    what, example = (f"a count of {of}", f"100K {of}") if of else ("a count", "100K")
    said = f'write a whole number, or one as "{example}"'
    amount, unit = _parsed(value, said)
    if unit == "share":
        raise WrongUnitError(Quantity(amount, unit), f"this is {what}, and {value!r} a share: {said}")
    if unit not in (None, of):
        raise WrongUnitError(Quantity(amount, unit), f"this is {what}, and {value!r} counts {unit}: {said}")
    if amount != int(amount):
        raise ValueError(f"{str(value)!r} is not a whole number")
    return int(amount)


def parse_quantity(value: object, default_unit: Unit = "tokens") -> Quantity:
    """An int, or a string with an optional suffix K, M, B, T and an optional unit; "N%" is a share of the stage."""
    amount, unit = _parsed(value, 'write a whole number, "100B", "500 steps" or "10%"')
    return Quantity(amount, unit or default_unit)


def _parsed(value: object, said: str) -> tuple[Decimal, Unit | None]:
    """An amount and the unit that is named. said: what may be written. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal | Quantity):
        raise ValueError(f"{value!r} is not a quantity: {said}")
    if isinstance(value, Quantity):
        return value.amount, value.unit
    if isinstance(value, int | Decimal):
        return _within_reason(Decimal(value), value), None
    if share := _SHARE.match(value):
        return Decimal(share.group(1)) / 100, "share"
    match = _COUNT.match(value)
    if not match:
        raise ValueError(f"{value!r} is not a quantity: {said}")
    amount = Decimal(match.group(1).replace("_", "")) * _SUFFIX[match.group(2).upper()]
    _within_reason(amount, value)
    unit = match.group(3)
    if unit is None:
        return amount, None
    named: dict[str, Unit] = {"t": "tokens", "st": "steps", "sa": "samples"}
    return amount, named["t" if unit[0] in "tT" else unit[:2].lower()]


def _within_reason(amount: Decimal, value: object) -> Decimal:
    """Raises ValueError for what no count can be."""
    if amount.is_nan() or amount < 0:
        raise ValueError(f"{value} is {'no number' if amount.is_nan() else 'negative'}")
    if amount > _MOST:
        raise ValueError(f"{value} is more than {_MOST:,}, the most that is counted here")
    return amount


def format_count(number: int | Decimal | float) -> str:
    """A number for people: 1234567 -> "1.23M"."""
    value = float(number)
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}" if abs(value) < 999.5 * scale else f"{value / scale:.0f}{suffix}"
    return f"{value:.3g}" if value != int(value) else str(int(value))
