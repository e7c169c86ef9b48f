"""One key of an arm's config set to another value, as `set` and axes say it: "optimizer.weight_decay" = 0.05."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.load import Location, known_keys
from megatron.config.schema import RunConfig
from megatron.study.sections import StudyStage
from megatron.study.study_file import OF_THE_STUDY, nearest


@dataclass(frozen=True)
class Override:
    """A key and its value. by: who says it, in words · place: FILE:LINE."""

    key: str
    value: Any
    by: str
    place: str

    @property
    def stage(self) -> str | None:
        """The stage that it is about, by name; None for a key of the whole run."""
        steps = self.key.split(".")
        return steps[1] if steps[0] == "stages" and len(steps) > 1 else None

    def __str__(self) -> str:
        return f"{self.place}: {self.by}: {self.key}"


@dataclass(frozen=True)
class StageWords:
    """A stage of an arm, as its words are before anything is resolved. library: its name in [stages.…], where it is
    taken from there as it stands; "" where the arm writes or changes it."""

    name: str
    tables: dict[str, Any]
    library: str


def apply_to_tables(tables: dict[str, Any], override: Override) -> None:
    """Sets a key of the whole run in its tables. Raises ConfigError for a key that does not exist."""
    steps = override.key.split(".")
    known = [name for name in RunConfig.model_fields if name not in OF_THE_STUDY] + ["stages"]
    if steps[0] in OF_THE_STUDY:
        raise ConfigError(f"{override}: an arm cannot set it: {OF_THE_STUDY[steps[0]]}")
    if steps[0] not in known or len(steps) < 2:
        hint = nearest(steps[0], known)
        if steps[0] in known:
            key = next(iter(override.value), "KEY") if isinstance(override.value, dict) else "KEY"
            hint = f'{steps[0]} is a table: name a key in it, in quotes: "{steps[0]}.{key}" = …'
        raise ConfigError(f"{override}: no such key: {hint}")
    _set(tables, steps, override, RunConfig)


def apply_to_stages(stages: Sequence[StageWords], override: Override, trunk: str | None) -> list[StageWords]:
    """The stages with a key of one of them set. trunk: "arm/stage" that the arm branches from. Raises ConfigError for a
    stage or key that does not exist."""
    steps = override.key.split(".")
    names = [stage.name for stage in stages]
    if len(steps) < 3:
        raise ConfigError(f"{override}: name a key of a stage, stages.NAME.KEY; {nearest('', names)}")
    if steps[1] not in names:
        hint = f"; stages of the trunk {trunk} are said where that arm is, or listed here without from" if trunk else ""
        raise ConfigError(f"{override}: the arm has no stage {steps[1]!r} of its own: {nearest(steps[1], names)}{hint}")
    changed = []
    for stage in stages:
        if stage.name == steps[1]:
            tables = deepcopy(stage.tables)
            _set(tables, steps[2:], override, StudyStage)
            stage = StageWords(stage.name, tables, stage.library)
        changed.append(stage)
    return changed


def _set(tables: dict[str, Any], steps: list[str], override: Override, root: Any) -> None:
    """Walks to the key's table and sets it. What the schema names is checked by the schema; tables of free names
    (sources) by what is there; the last step below one (a mixture's source) may be new."""
    here: Any = tables
    location: list[str | int] = []
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(here, list):
            place = _position(here, step, override)
            location.append(place)
            if last:
                here[place] = override.value
            else:
                here = here[place]
            continue
        if not isinstance(here, dict):
            raise ConfigError(f"{override}: {'.'.join(steps[:number])} is a value, it has no keys")
        _check_step(here, step, tuple(location), last, override, root)
        location.append(step)
        if last:
            here[step] = override.value
        else:
            here = here.setdefault(step, {})


def _check_step(here: dict[str, Any], step: str, location: Location, last: bool, override: Override, root: Any) -> None:
    known = known_keys(location, root)
    if known:
        if step not in known:
            raise ConfigError(f"{override}: no such key, {step!r}: {nearest(step, known)}")
    elif step not in here and (not last or location == ("sources",)):
        raise ConfigError(f"{override}: there is no {step!r} in {'.'.join(map(str, location))}: {nearest(step, here)}")


def _position(items: list[Any], step: str, override: Override) -> int:
    names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
    if step in names:
        return names.index(step)
    if step.isdigit() and int(step) < len(items):
        return int(step)
    known = [name for name in names if name] or [str(number) for number in range(len(items))]
    raise ConfigError(f"{override}: no entry {step!r}: {nearest(step, known)}")
