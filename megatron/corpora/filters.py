"""Quality filters by name: which there are, which a user chose, and the function that applies them."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.config.errors import ConfigError
from megatron.corpora import code_filters, text_filters
from megatron.corpora.document import Document
from megatron.corpora.filter_rule import DocumentView, Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (*code_filters.RULES, *text_filters.RULES)}
SETS: dict[str, tuple[str, ...]] = {
    "stack": code_filters.STACK,
    "starcoder2": code_filters.STARCODER2,
    "gopher-quality": text_filters.GOPHER_QUALITY,
    "gopher-repetition": text_filters.GOPHER_REPETITION,
    "c4": text_filters.C4,
}


@dataclass(frozen=True, slots=True)
class ChosenFilter:
    """A filter and all its parameters, defaults included, in the order in which the filter names them."""

    name: str
    parameters: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Name and parameters."""
        return {"name": self.name, "parameters": dict(self.parameters)}


class DocumentFilter:
    """`DocumentFilter(chosen)(document)`: the name of the first filter that rejects a document, None if none does."""

    def __init__(self, chosen: Sequence[ChosenFilter]) -> None:
        self._checks = [(one.name, partial(RULES[one.name].check, **dict(one.parameters))) for one in chosen]

    def __call__(self, document: Document) -> str | None:
        if not self._checks:
            return None
        view = DocumentView(document)
        for name, check in self._checks:
            if check(view):
                return name
        return None


def parse_filters(words: Sequence[str]) -> tuple[ChosenFilter, ...]:
    """The filters that command-line words choose, in the order of the words.

    A word is the name of a filter or of a set; NAME=VALUE sets a filter's first parameter, NAME=KEY=VALUE,KEY=VALUE
    any of them, and NAME=off takes one out. A filter named again, or named after its set, keeps its place and gets
    the new parameters. Raises ConfigError for an unknown name, with the nearest one, and for values that do not fit.
    """
    chosen: dict[str, ChosenFilter] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in SETS:
            if value not in ("", "off") or word.endswith("="):
                raise ConfigError(f"--filter {word}: {name} is a set of filters and takes no value: name one of them")
            for member in SETS[name]:
                _choose(chosen, member, value, word)
        elif name in RULES:
            _choose(chosen, name, value, word)
        else:
            near = difflib.get_close_matches(name, [*SETS, *RULES], n=1, cutoff=0.5)
            hint = f"the nearest is {near[0]}" if near else f"there are the sets {', '.join(SETS)} and their filters"
            raise ConfigError(f"--filter {word}: no filter or set is named {name!r}; {hint}")
    return tuple(chosen.values())


def describe_filters() -> str:
    """All sets and filters with their parameters, defaults and sources, for a command's help."""
    lines = ["sets:"]
    for name, members in SETS.items():
        lines += textwrap.wrap(f"{name}: {', '.join(members)}", 110, initial_indent="  ", subsequent_indent="    ")
    lines.append("filters (each rejects a document with):")
    for rule in RULES.values():
        parameters = ",".join(f"{key}={value}" for key, value in rule.defaults.items())
        lines.append(f"  {rule.name}" + (f"={parameters}" if parameters else ""))
        lines += textwrap.wrap(" ".join(rule.description.split()), 110, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _choose(chosen: dict[str, ChosenFilter], name: str, value: str, word: str) -> None:
    if value == "off":
        chosen.pop(name, None)
        return
    rule = RULES[name]
    parameters = dict(rule.defaults)
    for number, piece in enumerate(value.split(",") if value else []):
        key, separator, said = piece.rpartition("=")
        if not separator and number == 0 and rule.defaults:
            key = next(iter(rule.defaults))
        if key not in parameters:
            takes = f"it takes {', '.join(rule.defaults)}" if rule.defaults else "it takes none"
            raise ConfigError(f"--filter {word}: {name} has no parameter {key or piece!r}; {takes}")
        parameters[key] = _number(said, rule.defaults[key], f"--filter {word}: {key}")
    chosen[name] = ChosenFilter(name, tuple(parameters.items()))


def _number(said: str, default: float, place: str) -> float:
    kind = type(default)
    try:
        value = kind(said)
        if value >= 0:  # false for NaN too
            return value
    except ValueError:
        pass
    what = "a whole number" if kind is int else "a number"
    raise ConfigError(f"{place} is {said!r}: give {what} that is not negative, such as {default}")
