"""Quantities in a user's words: "100B", "2.5M", "500 steps", "10%". K is 1000, never 1024."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["tokens", "steps", "samples", "share"]

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)\s*(tokens?|steps?|samples?)?\s*$", re.IGNORECASE)
_SHARE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*$")


@dataclass(frozen=True)
class Quantity:
    """An amount and its unit. A share is a fraction of the training stage, 0 to 1."""

    amount: Decimal
    unit: Unit


def parse_count(value: object) -> int:
    """A whole number from an int or from words such as "100B" or "2.5M". Raises ValueError otherwise."""
    quantity = parse_quantity(value)
    if quantity.unit == "share":
        raise ValueError(f'{value!r} is a share, a count such as "100B" is needed')
    if quantity.amount != int(quantity.amount):
        raise ValueError(f"{value!r} is not a whole number")
    return int(quantity.amount)


def parse_quantity(value: object, default_unit: Unit = "tokens") -> Quantity:
    """An int, or a string with an optional suffix K, M, B, T and an optional unit; "N%" is a share of the stage."""
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal | Quantity):
        raise ValueError(f'{value!r} is not a quantity: write a whole number, "100B", "500 steps" or "10%"')
    if isinstance(value, Quantity):
        return value
    if isinstance(value, int | Decimal):
        if value < 0:
            raise ValueError(f"{value} is negative")
        return Quantity(Decimal(value), default_unit)
    if share := _SHARE.match(value):
        return Quantity(Decimal(share.group(1)) / 100, "share")
    match = _COUNT.match(value)
    if not match:
        raise ValueError(f'{value!r} is not a quantity: write a whole number, "100B", "500 steps" or "10%"')
    amount = Decimal(match.group(1).replace("_", "")) * _SUFFIX[match.group(2).upper()]
    unit = match.group(3)
    if unit is None:
        return Quantity(amount, default_unit)
    named: dict[str, Unit] = {"t": "tokens", "st": "steps", "sa": "samples"}
    return Quantity(amount, named["t" if unit[0] in "tT" else unit[:2].lower()])


def format_count(number: int | Decimal | float) -> str:
    """A number for people: 1234567 -> "1.23M"."""
    value = float(number)
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}" if abs(value) < 999.5 * scale else f"{value / scale:.0f}{suffix}"
    return f"{value:.3g}" if value != int(value) else str(int(value))
