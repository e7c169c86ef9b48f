"""Suites: named sets of tasks, each declared in one TOML file (suites/NAME.toml, or a file of the user's own).

A suite says of each task its group, how it is asked, which metric counts, where its data are had and under which
licence, and what a local data file must hold. It holds no code and no data.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megatron.config.errors import ConfigError

_FOLDER = Path(__file__).with_name("suites")
FieldKind = str | list[int | str]
# how a field of a data file may be declared, beside a list of the values that it may have
FIELD_KINDS = ("text", "text?", "text with _", "texts", "labelled texts", "aliases")


class HubData(BaseModel):
    """Where the harness' own libraries find the rows: a data set of the Hugging Face hub. `columns`: only these."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    split: str
    name: str | None = None
    columns: list[str] | None = None


class SuiteTask(BaseModel):
    """One task. `kind`:

    - "harness": a task of lm-evaluation-harness, with its own prompts; local data in the data set's own fields.
    - "choice-in-prompt": `prompt` with each choice in it, and `scored`, the fixed text whose likelihood decides.
    - "program": HumanEval or MBPP; `format` names which.

    `fields`: name of a field to its kind, one of FIELD_KINDS, "index of FIELD", or the list of its values.
    `only_with`: items where one of these fields is empty are left out. `chosen`: "published" or "ours".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    group: str
    kind: Literal["harness", "choice-in-prompt", "program"]
    metric: str
    source: str
    licence: str
    chosen: Literal["published", "ours"]
    chance: float | None = None
    shots: int = 0
    file: str = ""
    fields: dict[str, FieldKind] = {}
    harness: str = ""
    hub: HubData | None = None
    prompt: str = ""
    scored: str = ""
    choices: str | list[str] = "choices"
    answer: str = "answer"
    only_with: list[str] = []
    format: Literal["humaneval", "mbpp", ""] = ""
    problems: tuple[int, int] | None = None
    shots_from: list[int] = []
    max_new_tokens: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> SuiteTask:
        for name, kind in self.fields.items():
            if isinstance(kind, str) and kind not in FIELD_KINDS and not kind.startswith("index of "):
                raise ValueError(
                    f"fields.{name} = {kind!r}: one of {', '.join(FIELD_KINDS)}, index of FIELD, or values"
                )
        needed = {"harness": ["harness"], "choice-in-prompt": ["prompt", "scored"], "program": ["format"]}[self.kind]
        for key in needed:
            if not getattr(self, key):
                raise ValueError(f"kind {self.kind!r} needs {key}")
        if self.kind == "program" and self.metric not in ("pass@1", "bleu"):
            raise ValueError(f"metric {self.metric!r}: a program is measured by pass@1 or bleu")
        if self.shots and self.kind == "choice-in-prompt":
            raise ValueError("a choice in the prompt is asked with 0 shots")
        if Path(self.data_file).name != self.data_file:
            raise ValueError(f"file {self.data_file!r}: the name of a file in the data folder, without folders")
        return self

    @property
    def data_file(self) -> str:
        """The name of its local data file."""
        return self.file or f"{self.name}.jsonl"

    @property
    def runs_programs(self) -> bool:
        """Whether its metric needs a model's programs to be executed."""
        return self.kind == "program" and self.metric != "bleu"


class _SuiteFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    title: str
    tasks: list[SuiteTask]


@dataclass(frozen=True)
class Suite:
    """A suite as read: `tasks` in the file's order."""

    name: str
    title: str
    tasks: tuple[SuiteTask, ...]

    def select(self, names: Sequence[str]) -> Suite:
        """Only these tasks, by their names or their groups'; all where `names` is empty. ConfigError for others."""
        known = {task.name for task in self.tasks} | {task.group for task in self.tasks}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
                hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(sorted(known))}"
                raise ConfigError(f"suite {self.name} has no task and no group {name!r}: {hint}")
        chosen = tuple(task for task in self.tasks if not names or task.name in names or task.group in names)
        return Suite(self.name, self.title, chosen)


def suite_names() -> list[str]:
    """The suites that come with the project."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_suite(name: str) -> Suite:
    """The suite of that name, or of that TOML file. Raises ConfigError, with the file, the task and the key."""
    path = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ["heldout", *suite_names()]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"suite {name!r}: no such file, and no suite of that name: {hint}")
    try:
        found = _SuiteFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file in UTF-8: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
    names = [task.name for task in found.tasks]
    if repeated := sorted({task for task in names if names.count(task) > 1}):
        raise ConfigError(f"{path}: tasks called {', '.join(repeated)} are there more than once")
    if not names:
        raise ConfigError(f"{path}: the suite has no tasks")
    return Suite(found.name, found.title, tuple(found.tasks))
