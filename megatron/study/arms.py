"""The arms of a study in words: axes multiplied out, stages taken from the library, overrides applied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any

from megatron.config.errors import ConfigError
from megatron.study.overrides import Override, StageWords, apply_to_stages, apply_to_tables
from megatron.study.sections import ArmSection, AxisSection
from megatron.study.study_file import Study, check_stage, nearest


@dataclass(frozen=True)
class ArmWords:
    """One arm. table: its [arms.…], of which axes make several · parent: "arm/stage" it branches from · tables: of its
    config, without run and stages · stages: its own · templates: stages of the library that its own refer to ·
    overrides: what `set` and axes changed."""

    name: str
    table: str
    experiment: str
    parent: str | None
    tables: dict[str, Any]
    stages: tuple[StageWords, ...]
    templates: tuple[StageWords, ...]
    overrides: tuple[Override, ...]
    place: str


def arms_of(study: Study) -> dict[str, ArmWords]:
    """Every arm by its name, in the file's order. Raises ConfigError."""
    arms: dict[str, ArmWords] = {}
    for table, section in study.words.arms.items():
        for suffix, overrides in _points(study, table, section):
            arm = _arm(study, table, section, table + suffix, overrides)
            if arm.name in arms:
                raise ConfigError(
                    f"{arm.place}: arms.{table}: gives an arm {arm.name!r}, and arms.{arms[arm.name].table} does, too: "
                    "rename one, or the labels of its axis"
                )
            arms[arm.name] = arm
    baseline = study.words.study.baseline
    if baseline is not None and baseline not in arms:
        raise ConfigError(
            f"{study.place('study', 'baseline')}: study.baseline = {baseline!r} is no arm: {nearest(baseline, arms)}"
        )
    return arms


def unused_words(study: Study, arms: dict[str, ArmWords]) -> list[str]:
    """Notes on stages and axes of the file that no arm uses."""
    used = {stage.library for arm in arms.values() for stage in (*arm.stages, *arm.templates)}
    for section in study.words.arms.values():
        used |= {str(stage["use"]) for stage in section.stages if isinstance(stage, dict) and "use" in stage}
    axes = {name for section in study.words.arms.values() for name in section.axes}
    notes = [f"[stages.{name}] is used by no arm" for name in study.stages if name not in used]
    return notes + [f"[axes.{name}] is used by no arm" for name in study.words.axes if name not in axes]


# -- axes --------------------------------------------------------------------------------------------------------------


def _points(study: Study, table: str, section: ArmSection) -> list[tuple[str, list[Override]]]:
    """What is added to the table's name, and the overrides, for each point of its axes."""
    place = study.place("arms", table, "axes")
    columns = []
    for name in section.axes:
        if name not in study.words.axes:
            raise ConfigError(f"{place}: arms.{table}.axes names {name!r}: {nearest(name, study.words.axes)}")
        columns.append(_values(study, name, study.words.axes[name]))
    if section.combine == "grid":
        return [(_suffix(point), _overrides(point)) for point in product(*columns)]
    lengths = {name: len(column) for name, column in zip(section.axes, columns, strict=True)}
    if len(set(lengths.values())) != 1:
        said = ", ".join(f"{name} has {length}" for name, length in lengths.items()) or "there are none"
        raise ConfigError(
            f'{place}: arms.{table}.combine = "zip" needs axes of the same length: {said}: give each as many values, '
            'or combine = "grid"'
        )
    return [(_suffix(point), _overrides(point)) for point in zip(*columns, strict=True)]


Point = tuple[tuple[str, list[Override]], ...]


def _suffix(point: Point) -> str:
    return "".join(f"-{label}" for label, _ in point)


def _overrides(point: Point) -> list[Override]:
    return [override for _, overrides in point for override in overrides]


def _values(study: Study, name: str, axis: AxisSection) -> list[tuple[str, list[Override]]]:
    place = study.place("axes", name)
    rows = axis.rows if axis.rows is not None else [[value] * len(axis.set) for value in axis.values or []]
    labels = axis.labels or _labels(rows, axis.rows is not None)
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{place}: axes.{name}: two values are called {twice[0]!r}: give labels, or other values")
    return [
        (
            label,
            [Override(key, deepcopy(value), f"axis {name}", place) for key, value in zip(axis.set, row, strict=True)],
        )
        for label, row in zip(labels, rows, strict=True)
    ]


def _labels(rows: list[list[Any]], several: bool) -> list[str]:
    plain = all(isinstance(row[0], str | int | Decimal) for row in rows) and not several
    return [_label(row[0]) if plain else str(number) for number, row in enumerate(rows, 1)]


def _label(value: Any) -> str:
    words = format(value.normalize(), "f") if isinstance(value, Decimal) else str(value)
    return re.sub(r"[\s/*?\[\]{}]", "_", words)


# -- stages ------------------------------------------------------------------------------------------------------------


def _arm(study: Study, table: str, section: ArmSection, name: str, axes: list[Override]) -> ArmWords:
    place = study.place("arms", table)
    own = [
        Override(key, value, f"arms.{table}.set", study.place("arms", table, "set"))
        for key, value in section.set.items()
    ]
    overrides = [*own, *axes]
    _check_once(overrides)
    tables = deepcopy(study.base)
    stages = [_stage(study, table, entry) for entry in section.stages]
    for override in overrides:
        if override.key.split(".")[0] == "stages":
            stages = apply_to_stages(stages, override, section.from_)
        else:
            apply_to_tables(tables, override)
    for stage in stages:
        check_stage(stage.tables, f"stages.{stage.name}", place)
    return ArmWords(
        name,
        table,
        section.experiment,
        section.from_,
        tables,
        tuple(stages),
        tuple(_templates(study, stages, place)),
        tuple(overrides),
        place,
    )


def _check_once(overrides: Sequence[Override]) -> None:
    """Raises ConfigError where an arm says one key twice: it would be called by one value and have the other."""
    first: dict[str, Override] = {}
    for override in overrides:
        if (before := first.setdefault(override.key, override)) is not override:
            also = "twice" if before.by == override.by else f"by {before.by}, too"
            raise ConfigError(f"{override}: is set {also}: leave one, since an arm has one value of a key")


def _stage(study: Study, table: str, entry: str | dict[str, Any]) -> StageWords:
    place, key = study.place("arms", table, "stages"), f"arms.{table}.stages"
    if isinstance(entry, str):
        if entry not in study.stages:
            raise ConfigError(f"{place}: {key} names {entry!r}: {nearest(entry, study.stages, 'stages are')}")
        return StageWords(entry, deepcopy(study.stages[entry]), entry)
    tables = deepcopy(entry)
    base = tables.pop("use", None)
    if base is not None:
        if base not in study.stages:
            raise ConfigError(f"{place}: {key}: use = {base!r}: {nearest(str(base), study.stages, 'stages are')}")
        tables = {"name": base} | deepcopy(study.stages[base]) | tables
    name = tables.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{place}: {key}: a stage that is written in the arm needs a name of its own: name = …")
    return StageWords(name, tables, "")


def _templates(study: Study, stages: list[StageWords], place: str) -> list[StageWords]:
    """The stages of the library that the arm's own refer to and that are not among them, those referred to first."""
    found: dict[str, StageWords] = {}
    own = {stage.name for stage in stages}

    def visit(tables: dict[str, Any], path: tuple[str, ...]) -> None:
        for name in _references(tables):
            if name in path:
                raise ConfigError(f"{place}: stages refer to each other in a circle: {' -> '.join([*path, name])}")
            if name in own or name in found or name not in study.stages:
                continue
            visit(study.stages[name], (*path, name))
            found[name] = StageWords(name, deepcopy(study.stages[name]), name)

    for stage in stages:
        visit(stage.tables, (stage.name,))
    return list(found.values())


def _references(tables: dict[str, Any]) -> list[str]:
    names = [tables[key] for key in ("like", "reverse") if isinstance(tables.get(key), str)]
    aggregate = tables.get("aggregate_of")
    names += [name for name in aggregate if isinstance(name, str)] if isinstance(aggregate, list) else []
    blend = tables.get("blend")
    parts = blend if isinstance(blend, list) else []
    return names + [part["like"] for part in parts if isinstance(part, dict) and isinstance(part.get("like"), str)]
