"""From weights in a user's words to weights by source: groups, shares within a group, the mixture before adjusted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction

from megatron.config.errors import ConfigError

Weights = Mapping[str, Fraction]


class MixtureWords:
    """Reads the mixtures of one training stage.

    groups: the group of each source, its own name where none was said · sizes: tokens of one epoch of each source ·
    within: by group, weights of its sources among themselves, instead of by size · where: the stage, for messages.
    """

    def __init__(
        self,
        groups: Mapping[str, str],
        sizes: Mapping[str, int],
        within: Mapping[str, Mapping[str, Decimal]],
        where: str,
    ) -> None:
        self._groups = groups
        self._sizes = sizes
        self._where = where
        self._within = {group: self._inner(group, table) for group, table in within.items()}

    def flat(self, mixture: Weights) -> dict[str, Fraction]:
        """Weights by source, not normalised; a source that is not named is absent.

        Raises ConfigError for an unknown name, a name of both a source and a group of others, a source named both
        directly and through its group, a weight on what holds no tokens, and weights that are all zero.
        """
        result: dict[str, Fraction] = {}
        for name, members in self._members(mixture).items():
            result |= self._spread(mixture[name], name, members)
        if not any(weight > 0 for weight in result.values()):
            raise ConfigError(
                f"{self._where}: every weight of the mixture is zero: give at least one source a weight above zero"
            )
        return result

    def adjusted(self, shares: Weights, before: Weights) -> dict[str, Fraction]:
        """`before`, normalised, with some shares set and the others scaled in proportion; sums to 1.

        The sources of a group that is set keep their proportions of before, unless `within` says others. Raises
        ConfigError as `flat` does, and where the shares leave something and no other source has a weight to take it.
        """
        total = sum(shares.values(), Fraction(0))
        if total > 1:
            raise ConfigError(f"{self._where}: the shares of adjust sum to {float(total):g}, which is above 1")
        result: dict[str, Fraction] = {}
        for name, members in self._members(shares).items():
            had = {member: before.get(member, Fraction(0)) for member in members}
            known = name not in self._within and sum(had.values()) > 0
            result |= scaled(had, shares[name]) if known else self._spread(shares[name], name, members)
        others = {name: weight for name, weight in before.items() if name not in result and weight > 0}
        if total < 1 and not others:
            raise ConfigError(
                f"{self._where}: adjust sets shares of {float(total):g} in all, and no other source had a weight "
                "before that could take the rest"
            )
        return result | scaled(others, 1 - total)

    def members(self, name: str, key: str) -> list[str]:
        """The sources of a name that stands under `key` of the stage. Raises ConfigError for an unknown name."""
        return self._members([name], key)[name]

    def size(self, name: str) -> int:
        """Tokens of one epoch of a source, or of a group together. Raises ConfigError for an unknown name."""
        return sum(self._sizes[member] for member in self._members([name])[name])

    def _spread(self, weight: Fraction, name: str, members: list[str]) -> dict[str, Fraction]:
        """The weight of a name over its sources."""
        size = sum(self._sizes[member] for member in members)
        if weight > 0 and size == 0:
            raise ConfigError(f"{self._where}: mixture gives weight to {name!r}, which holds no tokens to train on")
        if weight == 0:
            return dict.fromkeys(members, Fraction(0))
        if name in self._within:
            return scaled(self._within[name], weight)
        return scaled({member: Fraction(self._sizes[member]) for member in members}, weight)

    def _inner(self, group: str, table: Mapping[str, Decimal]) -> dict[str, Fraction]:
        members = [source for source, its in self._groups.items() if its == group]
        if not members:
            hint = _near(group, self._groups.values())
            raise ConfigError(f"{self._where}: within names {group!r}, which is no group of sources: {hint}")
        strangers = sorted(set(table) - set(members))
        if strangers or not any(table.values()):
            wrong = f"names {strangers[0]!r}" if strangers else "gives every source the weight 0"
            raise ConfigError(
                f"{self._where}: within.{group} {wrong}; the sources of that group are: {', '.join(sorted(members))}"
            )
        return {name: Fraction(table.get(name, Decimal(0))) for name in sorted(members)}

    def _members(self, names: Iterable[str], key: str = "mixture") -> dict[str, list[str]]:
        result: dict[str, list[str]] = {}
        said_by: dict[str, str] = {}
        for name in names:
            grouped = sorted(source for source, group in self._groups.items() if group == name)
            if name in self._groups and set(grouped) - {name}:
                raise ConfigError(
                    f"{self._where}: {key} names {name!r}, which is a source and also the group of "
                    f"{', '.join(grouped)}: give the group another name"
                )
            members = [name] if name in self._groups else grouped
            if not members:
                hint = _near(name, [*self._groups, *self._groups.values()])
                raise ConfigError(f"{self._where}: {key} names {name!r}, which is neither a source nor a group: {hint}")
            for member in members:
                if member in said_by:
                    raise ConfigError(
                        f"{self._where}: source {member!r} is named twice, by {said_by[member]!r} and by {name!r}: "
                        "name the group, or each of its sources"
                    )
                said_by[member] = name
            result[name] = members
        return result


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"


def scaled(weights: Weights, total: Fraction) -> dict[str, Fraction]:
    """The weights in the same proportions, with another sum."""
    now = sum(weights.values(), Fraction(0))
    return {name: weight * total / now for name, weight in weights.items()} if now else dict(weights)
