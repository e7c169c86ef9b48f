"""What a job may be told: one field an option, on the command line as --some-name, in a site's file as some_name."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron.config.errors import ConfigError
from megatron.launch.slurm_words import check_dependency, directive, parse_array, parse_time

Kind = Literal["words", "number", "list", "table", "switch"]
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _option(
    kind: Kind, help: str, sbatch: str = "", choices: tuple[str, ...] = (), metavar: str = "", group: str = "job"
) -> Any:
    about = {"kind": kind, "help": help, "sbatch": sbatch, "choices": choices, "metavar": metavar, "group": group}
    if kind == "list":
        return field(default_factory=list, metadata=about)
    if kind == "table":
        return field(default_factory=dict, metadata=about)
    return field(default=None, metadata=about)


@dataclass(frozen=True)
class SlurmOptions:
    """What the user and the site's file said; None, [] and {} where nobody said anything."""

    nodes: int | None = _option("number", "machines", metavar="N")
    gpus_per_node: int | None = _option("number", "GPUs of each machine; 0 with --cpu", metavar="G")
    tasks_per_node: int | None = _option("number", "processes of each machine (default: one a GPU)", metavar="K")
    time: str | None = _option(
        "words", 'wall time as sbatch takes it: minutes, "12:00:00", "2-00:00:00"', "time", metavar="T"
    )
    account: str | None = _option("words", "who pays", "account")
    partition: str | None = _option("words", "queue, or several with commas", "partition")
    qos: str | None = _option("words", "quality of service", "qos")
    constraint: str | None = _option("words", "features that nodes must have", "constraint")
    reservation: str | None = _option("words", "a reservation's name", "reservation")
    mem: str | None = _option("words", "memory a node, such as 0 (all of it) or 480G", "mem")
    cpus_per_task: int | None = _option(
        "number", "cores of each process (of each rank, with torchrun too)", metavar="C"
    )
    exclude: str | None = _option("words", "nodes that the job must not get", "exclude")
    nodelist: str | None = _option("words", "nodes that it must get", "nodelist")
    exclusive: bool | None = _option("switch", "whole nodes, shared with no other job", "exclusive")
    licenses: str | None = _option("words", "licences of the site", "licenses")
    job_name: str | None = _option("words", "default: the run's name", "job-name")
    comment: str | None = _option("words", "kept by SLURM with the job", "comment")
    mail_type: str | None = _option("words", "events that are mailed, such as FAIL,END,REQUEUE", "mail-type")
    mail_user: str | None = _option("words", "to whom", "mail-user")
    gpu_type: str | None = _option("words", "of the GPUs, as the site calls it, such as h100")
    gpu_request: str | None = _option(
        "words", "how GPUs are asked for; none: whole nodes are given (default: gpus-per-node)",
        choices=("gpus-per-node", "gres", "none"),
    )  # fmt: skip
    dependency: str | None = _option("words", "begin after other jobs, such as afterok:1234", "dependency")
    array: str | None = _option("words", "a job array, such as 0-7 or 0-31%4; {task} in values is the task's number")
    requeue: bool | None = _option(
        "switch", "put the job back in the queue when it was stopped or lost a node (default: yes)"
    )
    max_requeues: int | None = _option("number", "restarts of the job at most (default: any)", metavar="N")
    sbatch_arg: list[str] = _option(
        "list", "any further option of sbatch, whole: --sbatch-arg=--gres-flags=enforce-binding"
    )
    launcher: str | None = _option(
        "words", "srun: a task is a rank (default); torchrun: a task is a node", choices=("srun", "torchrun"),
        group="how processes are started",
    )  # fmt: skip
    cpu_bind: str | None = _option(
        "words", "srun's --cpu-bind, where the site's own binding does not serve", group="how processes are started"
    )
    srun_arg: list[str] = _option("list", "any further option of srun, whole", group="how processes are started")
    lead: int | None = _option(
        "number", "seconds before the time is over at which the run is asked to stop (default: from measured figures)",
        metavar="SECONDS", group="how processes are started",
    )  # fmt: skip
    program: str | None = _option(
        "words", "how stagemix is called where the ranks run, as words of a shell (default: this Python; in a "
        "container: stagemix)", metavar="WORDS", group="where they run",
    )  # fmt: skip
    container_image: str | None = _option(
        "words", "image for pyxis/enroot (srun --container-image)", group="where they run"
    )
    container_mounts: list[str] = _option(
        "list", "FROM:TO for the container, pyxis's or Apptainer's", group="where they run"
    )
    apptainer: str | None = _option("words", "image for `apptainer exec`", metavar="IMAGE", group="where they run")
    module: list[str] = _option("list", "environment module to load", group="where they run")
    setup: list[str] = _option(
        "list", "file that the batch script sources first", metavar="FILE", group="where they run"
    )
    setup_line: list[str] = _option(
        "list", "line that the batch script runs first", metavar="LINE", group="where they run"
    )
    env: dict[str, str] = _option(
        "table", "environment variable of all processes", metavar="NAME=VALUE", group="where they run"
    )

    def directives(self) -> list[str]:
        """The #SBATCH lines of the options that sbatch has under the same meaning. Raises ConfigError."""
        lines = []
        for one in fields(self):
            value, name = getattr(self, one.name), one.metadata["sbatch"]
            if name and value is not None and value is not False:
                lines.append(directive(name) if value is True else directive(name, value))
        for words in self.sbatch_arg:
            lines.append(_whole_argument(words))
        return lines


def _whole_argument(words: str) -> str:
    name, equals, value = words.removeprefix("--").partition("=")
    if not words.startswith("--") or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ConfigError(f"--sbatch-arg {words}: write one long option, whole: --sbatch-arg=--name=value")
    return directive(name, value) if equals else directive(name)


def option_fields() -> tuple[Field[Any], ...]:
    """The options, in the order in which they are shown."""
    return fields(SlurmOptions)


def options_from(given: Mapping[str, Any], site: Mapping[str, Any]) -> SlurmOptions:
    """A command line on top of a site's defaults: lists and tables are joined, of the rest the line decides."""
    return _checked(SlurmOptions(**joined(given, site)))


def joined(given: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Every option, as the first says it, and where that says nothing, as the second; lists and tables of both."""
    values: dict[str, Any] = {}
    for one in option_fields():
        ours, theirs = given.get(one.name), below.get(one.name)
        kind = one.metadata["kind"]
        if kind == "list":
            values[one.name] = [*(theirs or []), *(ours or [])]
        elif kind == "table":
            values[one.name] = {**(theirs or {}), **(ours or {})}
        else:
            values[one.name] = theirs if ours is None else ours
    return values


def read_site(path: Path) -> dict[str, Any]:
    """A cluster's defaults from a TOML file: the options' names with underscores, and cpu. Raises ConfigError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--site {path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--site {path}: cannot be read as TOML: {error}") from None
    return checked_site(str(path), tables)


def checked_site(where: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Such a table that stands somewhere else; `where` begins messages. Raises ConfigError."""
    known: dict[str, Mapping[str, Any]] = {one.name: one.metadata for one in option_fields()}
    known["cpu"] = {"kind": "switch", "help": "no GPUs: processes of tasks_per_node, by gloo", "choices": ()}
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}: {hint}")
        found[key] = _site_value(where, key, value, known[key])
    if found.get("cpu") and found.get("gpus_per_node"):
        raise ConfigError(
            f"{where}: cpu = true and gpus_per_node = {found['gpus_per_node']} contradict each other: leave one out"
        )
    return found


def _site_value(where: str, key: str, value: Any, about: Mapping[str, Any]) -> Any:
    kind: Kind = about["kind"]
    if kind in ("words", "number") and isinstance(value, int) and not isinstance(value, bool):
        value = value if kind == "number" else str(value)
    wanted = {
        "words": ("a string", isinstance(value, str)),
        "number": ("a whole number", isinstance(value, int) and not isinstance(value, bool)),
        "switch": ("true or false", isinstance(value, bool)),
        "list": ("a list of strings", isinstance(value, list) and all(isinstance(item, str) for item in value)),
        "table": (
            'a table of strings, { NAME = "value" }',
            isinstance(value, dict) and all(isinstance(item, str | int) for item in value.values()),
        ),
    }
    words, fits = wanted[kind]
    if not fits:
        raise ConfigError(f"{where}: {key} = {value!r}: {words} is needed ({about['help']})")
    if about["choices"] and value not in about["choices"]:
        raise ConfigError(f"{where}: {key} = {value!r}: one of {', '.join(about['choices'])}")
    return {name: str(item) for name, item in value.items()} if kind == "table" else value


def _checked(options: SlurmOptions) -> SlurmOptions:
    """The same options. Raises ConfigError for those that cannot be carried out, alone or together."""
    lowest = {"gpus_per_node": 0, "max_requeues": 0}
    for one in option_fields():
        value = getattr(options, one.name)
        least = lowest.get(one.name, 1)
        if one.metadata["kind"] == "number" and value is not None and value < least:
            raise ConfigError(f"--{one.name.replace('_', '-')} {value}: at least {least}")
    if options.time is not None:
        parse_time(options.time)
    if options.dependency is not None:
        check_dependency(options.dependency)
    if options.array is not None:
        parse_array(options.array)
    for name in options.env:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--env {name}: no name of an environment variable")
        if _SECRET.search(name):
            raise ConfigError(
                f"--env {name}: looks like a secret, and the batch script is kept as a file: export it in the shell "
                "that you launch from; sbatch hands its environment on"
            )
    if options.container_image and options.apptainer:
        raise ConfigError("--container-image is for pyxis, --apptainer for Apptainer: give one of them")
    if options.container_mounts and not (options.container_image or options.apptainer):
        raise ConfigError("--container-mounts without a container: add --container-image or --apptainer")
    options.directives()
    return options
