"""From a TOML file and `--set` overrides to a RunConfig, and back. Every mistake is named with its place and remedy."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig

Location = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in the TOML file `path` with each override ("train.micro_batch_size=4") applied.

    Numbers with a point are read as decimals, so that weights stay exact. Raises ConfigError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    said = {_apply_override(tables, override): f"--set {override}" for override in overrides}
    return config_from_tables(tables, Places(str(path), text, said))


@dataclass(frozen=True)
class Places:
    """Where the keys of a config were written: a file with its text, and the overrides by the key that they set."""

    source: str = "config"
    text: str = ""
    overrides: dict[Location, str] = field(default_factory=dict)

    def of(self, location: Location) -> str:
        """The override that set a key; else FILE:LINE, or FILE alone where the key is not written there."""
        for key, override in reversed(self.overrides.items()):
            if key == location[: len(key)]:
                return override
        line = _line_of(location, self.text)
        return f"{self.source}:{line}" if line else self.source


def config_from_tables(tables: dict[str, Any], places: Places | None = None) -> RunConfig:
    """A RunConfig from nested tables. `places` serves the error messages. Raises ConfigError."""
    return validated(RunConfig, tables, places)


def validated(model: type[Model], tables: dict[str, Any], places: Places | None = None) -> Model:
    """Nested tables as a model of the schema. `places` serves the error messages. Raises ConfigError that names every
    mistake with its place, its value and the nearest known key."""
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        lines = [_describe(item, places or Places(), tables, model) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def config_to_tables(config: RunConfig) -> dict[str, Any]:
    """The config as nested tables of JSON values: decimals as strings, absent keys left out."""
    tables: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return tables


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the config file, for editors and for other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def config_to_toml(config: RunConfig) -> str:
    """The resolved config as TOML that `load_config` reads back to an equal config."""
    tables = config.model_dump(mode="python", exclude_none=True)
    lines: list[str] = []
    for name, table in tables.items():
        if isinstance(table, list):
            for stage in table:
                _write_table(f"[[{name}]]", stage, lines)
        elif name == "sources":
            for source, keys in table.items():
                _write_table(f"[sources.{_toml_key(source)}]", keys, lines)
        else:
            _write_table(f"[{name}]", table, lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(header: str, table: dict[str, Any], lines: list[str]) -> None:
    lines += ["", header]
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items()]


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return format(value, "f") if value == value.to_integral_value() else str(value.normalize())
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    raise TypeError(f"no TOML for {type(value).__name__}")


def _apply_override(tables: dict[str, Any], override: str) -> Location:
    """Sets one dotted key and gives its location. List entries are addressed by number or by their name:
    stages.cooldown.tokens=5M."""
    key, equals, words = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: write KEY=VALUE, for example --set train.micro_batch_size=4")
    table: Any = tables
    location: list[str | int] = []
    for step in path[:-1]:
        location.append(_position(table, step, override) if isinstance(table, list) else step)
        table = _descend(table, step, override)
    value = _parse_value(words.strip())
    if isinstance(table, list):
        index = _position(table, path[-1], override)
        location.append(index)
        table[index] = value
    elif isinstance(table, dict):
        location.append(path[-1])
        table[path[-1]] = value
    else:
        raise ConfigError(f"--set {override}: {'.'.join(path[:-1])} is a value, it has no keys")
    return tuple(location)


def _descend(table: Any, step: str, override: str) -> Any:
    if isinstance(table, list):
        return table[_position(table, step, override)]
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: nothing lies below {step}")
    return table.setdefault(step, {})


def _position(items: list[Any], step: str, override: str) -> int:
    names = [str(item.get("name")) if isinstance(item, dict) else "" for item in items]
    if step in names:
        return names.index(step)
    if step.isdigit() and int(step) < len(items):
        return int(step)
    raise ConfigError(f"--set {override}: no entry {step!r}; there are {', '.join(filter(None, names)) or len(items)}")


def _parse_value(words: str) -> Any:
    try:
        return tomllib.loads(f"value = {words}", parse_float=Decimal)["value"]
    except tomllib.TOMLDecodeError:
        return words


def _describe(error: Any, places: Places, tables: dict[str, Any], root: type[BaseModel]) -> str:
    location: Location = tuple(step for step in error["loc"] if not _is_union_branch(step))
    place = places.of(location)
    field = _spoken(location, tables)
    if error["type"] == "extra_forbidden":
        known = known_keys(location[:-1], root)
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{place}: unknown key {field}: {hint}"
    if error["type"] == "missing":
        return f"{place}: {field} is missing{_meaning(location, root)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(error.get("input"), dict | list) else f" = {_shown(error.get('input'))}"
    key = f"{field}{given}: " if field or given else ""
    return f"{place}: {key}{message}{_meaning(location, root)}"


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else json.dumps(value, default=str)


def _is_union_branch(step: str | int) -> bool:
    # pydantic adds the branch of a union to the location ("literal['current']", "constrained-float", "int"), or "[key]"
    return isinstance(step, str) and bool(
        re.match(r"(literal\[|constrained-|function-|int$|str$|float$|\[key\]$)", step)
    )


def _model_at(location: Location, root: type[BaseModel]) -> Any:
    """The type that the schema has at a location, or None below a free-form table."""
    kind: Any = root
    for step in location:
        kind = _bare(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(step))
            if field is None:
                return None
            kind = field.annotation
        elif get_origin(kind) in (dict, list):
            kind = get_args(kind)[-1]
        else:
            return None
    return _bare(kind)


def _bare(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        return next((_bare(arm) for arm in get_args(kind) if arm is not type(None)), kind)
    if hasattr(kind, "__metadata__"):
        return _bare(get_args(kind)[0])
    return kind


def known_keys(location: Location, root: type[BaseModel] = RunConfig) -> list[str]:
    """The keys that the schema has in the table at a location; none below a free-form table."""
    model = _model_at(location, root)
    is_table = isinstance(model, type) and issubclass(model, BaseModel)
    return [field.alias or name for name, field in model.model_fields.items()] if is_table else []


def _meaning(location: Location, root: type[BaseModel]) -> str:
    parent = _model_at(location[:-1], root)
    if not (location and isinstance(parent, type) and issubclass(parent, BaseModel)):
        return ""
    field = parent.model_fields.get(str(location[-1]))
    return f" ({field.description})" if field is not None and field.description else ""


def _spoken(location: Location, tables: Any) -> str:
    """The key as `--set` takes it: entries of a list by their name."""
    words = []
    for step in location:
        inside: Any = None
        if isinstance(tables, dict):
            inside = tables.get(step)
        elif isinstance(tables, list) and isinstance(step, int) and step < len(tables):
            inside = tables[step]
        named = isinstance(step, int) and isinstance(inside, dict) and isinstance(inside.get("name"), str)
        words.append(inside["name"] if named else str(step))
        tables = inside
    return ".".join(words)


_KEY_PART = re.compile(r'"([^"]*)"|\'([^\']*)\'|([^."\']+)')
"""Of a dotted key, quoted or bare."""


def _line_of(location: Location, text: str) -> int | None:
    table: list[str | int] = []
    counts: dict[str, int] = {}
    header_line: int | None = None
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if header := re.match(r"\[\[?\s*([^\]]+?)\s*\]\]?", stripped) if stripped.startswith("[") else None:
            table = ["".join(parts).strip() for parts in _KEY_PART.findall(header.group(1))]
            name = ".".join(map(str, table))
            if stripped.startswith("[["):
                counts[name] = counts.get(name, -1) + 1
            if table[0] in counts:
                table.insert(1, counts[table[0]])
            if table and table == list(location[: len(table)]):
                header_line = number
            continue
        key = re.match(r'"?([A-Za-z0-9_.-]+)"?\s*=', stripped)
        if key and (full := [*table, *key.group(1).split(".")]) == list(location[: len(full)]):
            return number
    return header_line
