"""A study file, read and checked as far as one table at a time can be."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.load import Places, validated
from megatron.config.schema import RunConfig
from megatron.study.sections import StudyConfig, StudySection, StudyStage

OF_THE_STUDY = {
    "run": "study.name, study.output and study.seeds say it",
    "stages": "stages are [stages.NAME] of the study, and arms name them",
}
"""Tables of a run's config that a study does not take from its base, and why."""


@dataclass(frozen=True)
class Study:
    """A study file. base: tables that all arms have, without [run] and [[stages]], and where they are written; stages:
    the library as written · notes: what was left aside."""

    path: Path
    places: Places
    words: StudyConfig
    base: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()
    base_places: Places = Places()

    def base_place(self, *location: str | int) -> str:
        """FILE:LINE of a table or key of the base: of the study file's own [base], or of the file that it names."""
        if location[0] == "evaluation" and self.words.evaluation is not None:
            return self.places.of(location)  # said once for the base, in the study file
        return self.base_places.of(location if self.words.base is None else ("base", *location))

    def place(self, *location: str) -> str:
        """FILE:LINE of a table or key, for messages."""
        return self.places.of(location)


def load_study(path: Path) -> Study:
    """The study in the TOML file `path`; numbers with a point are read as decimals. Raises ConfigError."""
    text, tables = _read(path, "study file")
    places = Places(str(path), text)
    if "run" in tables and "study" not in tables:
        raise ConfigError(f"{path}: has [run] and no [study]: it is the config of one run; plan it with stagemix plan")
    words = validated(StudyConfig, tables, places)
    base, notes, base_places = _base(path, places, words)
    for name, stage in words.stages.items():
        if "name" in stage:
            raise ConfigError(
                f"{places.of(('stages', name, 'name'))}: stages.{name}.name = {stage['name']!r}: the table's own name "
                "is the stage's: leave it out"
            )
        check_stage(stage, f"stages.{name}", places.of(("stages", name)))
    if words.study.baseline is None:
        notes = [*notes, "study.baseline is not said: reports need the arm that others are compared with"]
    return Study(path, places, words, base, words.stages, tuple(notes), base_places)


def with_seeds(study: Study, seeds: Sequence[int]) -> Study:
    """The study with these seeds instead of study.seeds. Raises ConfigError where one is none, or is given twice."""
    tables = study.words.study.model_dump() | {"seeds": list(seeds)}
    section = validated(StudySection, tables, Places("--seeds"))
    return replace(study, words=study.words.model_copy(update={"study": section}))


def check_stage(tables: dict[str, Any], key: str, place: str) -> StudyStage:
    """A stage of the library, or one that an arm writes itself. Raises ConfigError that names `key` and `place`."""
    try:
        return validated(StudyStage, tables, Places(place))
    except ConfigError as error:
        # the messages begin with the place, which has no name of the table in it
        raise ConfigError(str(error).replace(f"{place}: ", f"{place}: [{key}] ")) from None


def nearest(name: str, known: Iterable[str], of: str = "there are") -> str:
    """Words for an unknown name: the nearest that is known, else all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6 if len(name) > 3 else 0.5)
    return f"did you mean {near[0]!r}?" if near else f"{of}: {', '.join(names) or 'none'}"


def _read(path: Path, what: str) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text, parse_float=Decimal)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder: name the {what} in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _base(path: Path, places: Places, words: StudyConfig) -> tuple[dict[str, Any], list[str], Places]:
    """The tables of the base, notes on what of it does not count, and where a file of its own has them."""
    its = places
    if (words.base is None) == (words.study.base is None):
        said = "both study.base and [base]" if words.base is not None else "neither study.base nor [base]"
        raise ConfigError(
            f"{places.of(('study',))}: says {said}: give one, study.base = the config file of a run, or its tables "
            "[base.model], [base.sources.…], …"
        )
    if words.base is not None:
        for name, why in OF_THE_STUDY.items():
            if name in words.base:
                raise ConfigError(f"{places.of(('base', name))}: [base.{name}] has no place in a study: {why}")
        base, where, notes = dict(words.base), places.of(("base",)), []
    else:
        assert words.study.base is not None
        file = path.parent / words.study.base
        text, tables = _read(file, "config file: study.base is relative to the study file")
        its = Places(str(file), text)
        notes = [f"[{name}] of {file} does not count: {why}" for name, why in OF_THE_STUDY.items() if name in tables]
        base, where = {name: table for name, table in tables.items() if name not in OF_THE_STUDY}, str(file)
    unknown = [name for name in base if name not in RunConfig.model_fields]
    if unknown:
        known = [name for name in RunConfig.model_fields if name not in OF_THE_STUDY]
        raise ConfigError(f"{where}: unknown table {unknown[0]!r} in the base: {nearest(unknown[0], known)}")
    if words.evaluation is not None:
        if "evaluation" in base:
            raise ConfigError(
                f"{places.of(('evaluation',))}: [evaluation] of the study and of the base ({where}): keep one"
            )
        base["evaluation"] = words.evaluation.model_dump(exclude_unset=True)
    return base, notes, its
