"""Mixtures that other programs learned: a file of sources and weights, and where it came from.

Read are tables (comma, semicolon or tab) with a row for each source, with or without a header; tables with a column for
each source and a row for each mixture, as swarms of proxy runs write them; and JSON: an object of source and number, or
of source and an object with "weight", or a list of objects, itself or under one of the keys of HOLDERS.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.study.sections import WeightsFromSection
from megatron.study.study_file import nearest

HOLDERS = ("train_domain_weights", "domain_weights", "weights", "mixture", "mix")
"""Keys under which programs keep the weights in their JSON."""
_SOURCE = ("source", "domain", "name", "dataset", "domain_name")
_WEIGHT = ("weight", "weights", "ratio", "proportion", "probability", "share")

Rows = list[tuple[str, Decimal, str]]


@dataclass(frozen=True)
class LearnedWeights:
    """weights: as they stand in the file, by the study's names · sha256: of the file · form: what it was read as ·
    absent: sources that it does not name and that so have no share."""

    file: str
    sha256: str
    form: str
    weights: Mapping[str, Decimal]
    absent: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Where a mixture is from, as plain values."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "form": self.form,
            "weights": {name: str(weight) for name, weight in self.weights.items()},
            "absent": list(self.absent),
        }


def read_weights(section: WeightsFromSection, folder: Path, groups: Mapping[str, str], where: str) -> LearnedWeights:
    """The weights of a file.

    Args:
        section: which file, which of its rows, and what its names are called here.
        folder: that its path is relative to.
        groups: the group of each source of the study.
        where: the stage, for messages.

    Raises ConfigError for a file that is not there or no such table, for names that are neither a source nor a group,
    for numbers that are negative or none, for a name that stands twice, and where all weights are zero.
    """
    path = folder / section.file
    where = f"{where}: weights_from {path}"
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot be read: {error.strerror}: name a file, relative to the study file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is no text: CSV or JSON is needed") from None
    if path.suffix == ".json" or text.lstrip()[:1] in ("{", "["):
        if section.row is not None:
            raise ConfigError(f"{where}: row = {section.row}, and JSON has one mixture: leave row out")
        rows, form = _of_json(text, where), "JSON"
    else:
        rows, form = _of_table(text, section.row, where)
    weights = _named(rows, section.names, groups, where)
    covered = {source for source, group in groups.items() if source in weights or group in weights}
    absent = tuple(sorted(set(groups) - covered))
    return LearnedWeights(section.file, hashlib.sha256(content).hexdigest(), form, weights, absent)


def _named(rows: Rows, names: Mapping[str, str], groups: Mapping[str, str], where: str) -> dict[str, Decimal]:
    known = sorted({*groups, *groups.values()})
    if strange := sorted(set(names) - {name for name, _, _ in rows}):
        found = nearest(strange[0], [name for name, _, _ in rows], "the file has")
        raise ConfigError(f"{where}: names has {strange[0]!r}, which the file has not: {found}")
    weights: dict[str, Decimal] = {}
    for name, weight, place in rows:
        here = names.get(name, name)
        if here not in known:
            raise ConfigError(
                f"{where}: {place}: {name!r}{f' = {here!r}' if here != name else ''} is neither a source nor a group "
                f"of the study: {nearest(here, known)}; names = {{ {json.dumps(name)} = … }} says what it is here"
            )
        if here in weights:
            raise ConfigError(f"{where}: {place}: {here!r} stands twice: one weight for each source is needed")
        weights[here] = weight
    if not any(weights.values()):
        raise ConfigError(f"{where}: gives no source a weight above zero")
    return weights


def _number(value: Any, place: str, where: str) -> Decimal:
    try:
        number = Decimal(str(value).strip()) if not isinstance(value, bool) else Decimal("NaN")
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number < 0:
        raise ConfigError(f"{where}: {place}: weight {str(value)!r} must be a number, and not negative")
    return number


# -- JSON --------------------------------------------------------------------------------------------------------------


def _of_json(text: str, where: str) -> Rows:
    try:
        found = json.loads(text, parse_float=Decimal, object_pairs_hook=partial(_object, where))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise ConfigError(f"{where}: cannot be read as weights: {str(error).partition(';')[0]}") from None
    if isinstance(found, dict):
        holders = [key for key in HOLDERS if isinstance(found.get(key), dict | list)]
        if len(holders) > 1:
            raise ConfigError(f"{where}: has weights under {' and under '.join(map(repr, holders))}: leave one")
        found = found[holders[0]] if holders else found
    if isinstance(found, list):
        return [_of_object(item, f"entry {number}", where) for number, item in enumerate(found, 1)]
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'{where}: holds no weights: write {{ "source": weight, … }}')
    rows = []
    for name, value in found.items():
        weight = value.get("weight") if isinstance(value, dict) else value
        rows.append((name, _number(weight, repr(name), where), repr(name)))
    return rows


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's reader would keep the last of two equal keys."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{where}: {twice!r} stands twice in one object: one weight for each source is needed")
    return dict(pairs)


def _of_object(item: Any, place: str, where: str) -> tuple[str, Decimal, str]:
    keys = item if isinstance(item, dict) else {}
    source = next((key for key in _SOURCE if key in keys), None)
    weight = next((key for key in _WEIGHT if key in keys), None)
    if source is None or weight is None:
        raise ConfigError(
            f'{where}: {place}: needs "{_SOURCE[0]}" and "{_WEIGHT[0]}", and has {", ".join(keys) or item}'
        )
    return str(item[source]), _number(item[weight], place, where), place


# -- tables ------------------------------------------------------------------------------------------------------------


def _of_table(text: str, row: int | None, where: str) -> tuple[Rows, str]:
    said = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    first = next(said, "")
    # commas beside one of the others are decimal ones
    delimiter = next((one for one in "\t;" if one in first), ",")
    lines = [
        (number, [_pointed(cell.strip()) if delimiter == ";" else cell.strip() for cell in cells])
        for number, cells in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1)
        if any(cell.strip() for cell in cells) and not cells[0].lstrip().startswith("#")
    ]
    if not lines:
        raise ConfigError(f"{where}: is empty: give a row for each source, source,weight")
    header = [cell.lower() for cell in lines[0][1]]
    source, weight = _column(header, _SOURCE), _column(header, _WEIGHT)
    narrow = len(header) == 2 and (_is_number(header[1]) or _of_sources(lines[1:]))
    if row is not None and (narrow or (source is not None and weight is not None)):
        raise ConfigError(f"{where}: row = {row}, and the file has one mixture, source,weight: leave row out")
    if source is not None and weight is not None:
        return [_cells(number, cells, source, weight, where) for number, cells in lines[1:]], "CSV source,weight"
    if narrow:
        return [_cells(number, cells, 0, 1, where) for number, cells in lines], "CSV source,weight without a header"
    return _wide(lines, row, where)


def _of_sources(lines: list[tuple[int, list[str]]]) -> bool:
    """Whether there are lines and each is a name and a number: what stands above them is no header of sources."""
    return bool(lines) and all(
        len(cells) == 2 and not _is_number(cells[0]) and _is_number(cells[1]) for _, cells in lines
    )


def _wide(lines: list[tuple[int, list[str]]], row: int | None, where: str) -> tuple[Rows, str]:
    """A column for each source, a row for each mixture; a column of row numbers (no name, or "index") is left out."""
    (_, names), mixtures = lines[0], lines[1:]
    if any(_is_number(name) for name in names) or not mixtures:
        raise ConfigError(
            f"{where}: line {lines[0][0]}: neither a header source,weight nor rows of these, nor a header of sources "
            "above a row of weights"
        )
    if row is None and len(mixtures) > 1:
        raise ConfigError(f"{where}: has {len(mixtures)} mixtures: say which, row = 1 to {len(mixtures)}")
    chosen = row or 1
    if chosen > len(mixtures):
        raise ConfigError(f"{where}: row = {chosen}, and the file has {len(mixtures)}")
    number, cells = mixtures[chosen - 1]
    if len(cells) != len(names):
        raise ConfigError(f"{where}: line {number}: {len(cells)} values for {len(names)} columns")
    place = f"line {number}"
    pairs = zip(names, cells, strict=True)
    rows = [(name, _number(cell, place, where), place) for name, cell in pairs if name.lower() not in ("", "index")]
    return rows, f"CSV of mixtures, row {chosen}"


def _cells(number: int, cells: list[str], source: int, weight: int, where: str) -> tuple[str, Decimal, str]:
    place = f"line {number}"
    if len(cells) <= max(source, weight):
        raise ConfigError(f"{where}: {place}: has {len(cells)} values: a source and its weight are needed")
    return cells[source], _number(cells[weight], place, where), place


def _pointed(cell: str) -> str:
    """ "0,5", as programs write it that put semicolons between cells, with a point."""
    return cell.replace(",", ".") if re.fullmatch(r"-?\d+,\d+(e-?\d+)?", cell, re.IGNORECASE) else cell


def _column(header: list[str], names: Iterable[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _is_number(word: str) -> bool:
    try:
        Decimal(word)
    except InvalidOperation:
        return False
    return True
