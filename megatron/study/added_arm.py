"""An arm added to a study file: its text stays as it is, byte for byte, and a table is put behind it."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import ConfigError, StagemixError
from megatron.study.plan import PlannedStudy, plan_study
from megatron.study.sharing import differences


@dataclass(frozen=True)
class NewArm:
    """What an arm is to be. stages: names, or inline tables as TOML writes them · parent: "arm/stage" · sets:
    KEY=VALUE · experiment: what plans group it by."""

    name: str
    stages: Sequence[str]
    parent: str | None = None
    sets: Sequence[str] = ()
    experiment: str = ""


@dataclass(frozen=True)
class AddedArm:
    """A study with an arm more. content: of the file as it is; text: what is put behind it · shared, new: ids of the
    arm's nodes that others have, or that it alone needs."""

    path: Path
    content: bytes
    text: str
    before: PlannedStudy
    after: PlannedStudy
    shared: tuple[str, ...]
    new: tuple[str, ...]


def table_of(arm: NewArm) -> str:
    """The arm as a TOML table. Raises ConfigError for words that are no TOML."""
    lines = [f"[arms.{_key(arm.name)}]"]
    if arm.parent is not None:
        lines.append(f"from = {json.dumps(arm.parent, ensure_ascii=False)}")
    lines.append(f"stages = [{', '.join(_stage(stage) for stage in arm.stages)}]")
    keys = [words.partition("=")[0].strip() for words in arm.sets]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"--set {twice}=…: is given twice: an arm has one value of a key")
    if arm.sets:
        lines.append(f"set = {{ {', '.join(_set(words) for words in arm.sets)} }}")
    if arm.experiment:
        lines.append(f"experiment = {json.dumps(arm.experiment, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def with_arm(path: Path, arm: NewArm, seeds: Sequence[int] = ()) -> AddedArm:
    """The study with the arm, planned; nothing is written. Raises ConfigError for a name that is there, for an arm that
    the study cannot carry out, and where other arms would become others."""
    before = plan_study(path, (), seeds)
    if arm.name in before.arms or arm.name in before.study.words.arms:
        raise ConfigError(f"{path}: there is an arm {arm.name!r} already: choose another name")
    content = _content(path)
    text = _behind(content, table_of(arm))
    trial = path.with_name(f".{path.stem}.{os.getpid()}.toml")
    try:
        trial.write_bytes(content + text.encode())
        try:
            after = plan_study(trial, (), seeds)
        except StagemixError as error:
            raise type(error)(str(error).replace(str(trial), str(path))) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be added to: {error.strerror}: {trial}") from None
    finally:
        trial.unlink(missing_ok=True)
    _check_others(path, before, after)
    mine = [node for placed in after.graph.arms if placed.name == arm.name for node in placed.path]
    needed = after.graph.needed(mine)
    there = [name for name in after.graph.nodes if name in needed]
    shared = tuple(name for name in there if name in before.graph.nodes)
    return AddedArm(path, content, text, before, after, shared, tuple(name for name in there if name not in shared))


def write_arm(added: AddedArm) -> None:
    """Puts the arm behind the file, which is whole before and after. Raises ConfigError where it was edited meanwhile;
    OSError."""
    path = added.path.resolve()  # the file itself, where its name is a link
    if _content(path) != added.content:
        raise ConfigError(f"{added.path}: was edited while the arm was planned: start again")
    mode = path.stat().st_mode
    write_whole(path, added.content + added.text.encode())
    os.chmod(path, mode & 0o7777)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _behind(content: bytes, table: str) -> str:
    """The table with an empty line before it, its lines ended as the file's are."""
    end = "\r\n" if b"\r\n" in content else "\n"
    first = "" if not content or content.endswith(b"\n") else end
    return first + end + table.replace("\n", end)


def _check_others(path: Path, before: PlannedStudy, after: PlannedStudy) -> None:
    """Raises ConfigError where an arm that was there has another path now."""
    then = {(arm.name, arm.seed): arm.path for arm in before.graph.arms}
    now = {(arm.name, arm.seed): arm.path for arm in after.graph.arms}
    for (name, seed), path_then in then.items():
        path_now = now.get((name, seed), ())
        if path_now != path_then:
            one, two = next(
                (pair for pair in zip(path_then, path_now, strict=False) if pair[0] != pair[1]), (path_then[-1], None)
            )
            changes = differences(before.graph.nodes[one].document, after.graph.nodes[two].document) if two else []
            why = f": {changes[0][0]} was {changes[0][1][0]} and would be {changes[0][1][1]}" if changes else ""
            raise ConfigError(f"{path}: the new arm would make another of arm {name!r} (seed {seed}){why}")


def _stage(words: str) -> str:
    """A name as a string; an inline table as it is written."""
    if not words.lstrip().startswith("{"):
        return json.dumps(words, ensure_ascii=False)
    table = _value(words.strip())
    if not isinstance(table, dict) or "\n" in words:
        raise ConfigError(
            f"--stage {words}: is neither a name nor a table: write --stage init, or "
            '--stage \'{ use = "init", tokens = "100B" }\''
        )
    return words.strip()


def _set(words: str) -> str:
    key, equals, value = words.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key or not value:
        raise ConfigError(f"--set {words}: write KEY=VALUE, for example --set optimizer.weight_decay=0.05")
    said = value if _value(value) is not None and "\n" not in value else json.dumps(value, ensure_ascii=False)
    return f"{json.dumps(key, ensure_ascii=False)} = {said}"


def _value(words: str) -> Any:
    """What TOML makes of a value; None where it is none, and so a string without quotes."""
    try:
        tables = tomllib.loads(f"value = {words}", parse_float=Decimal)
    except tomllib.TOMLDecodeError:
        return None
    return tables["value"] if list(tables) == ["value"] else None


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
