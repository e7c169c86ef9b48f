"""The table [slurm] of a study file: what its jobs are given, in the words of `stagemix launch_slurm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from megatron.config.errors import ConfigError
from megatron.launch.slurm_options import SlurmOptions, checked_site, joined, options_from

SIDE_TASKS = ("average", "evaluate", "report")
"""Tasks of one process each that may be given something else: [slurm.evaluate] and so on."""
_OF_THE_STUDY = {
    "array": "the jobs of a study are no array",
    "job_name": "each job is called by its node",
}
_ONE_PROCESS = ("nodes", "tasks_per_node", "launcher")


def _checked(tables: dict[str, Any]) -> dict[str, Any]:
    try:
        of_all = {key: value for key, value in tables.items() if key not in SIDE_TASKS}
        found = _of_jobs("[slurm]", of_all)
        for task in SIDE_TASKS:
            if task in tables:
                if not isinstance(tables[task], dict):
                    raise ConfigError(f"[slurm] {task} = {tables[task]!r}: is a table of options: [slurm.{task}]")
                for key in _ONE_PROCESS:
                    if key in tables[task]:
                        raise ConfigError(f"[slurm.{task}]: {key}: it is one process: leave it out")
                found[task] = _of_jobs(f"[slurm.{task}]", tables[task])
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return found


def _of_jobs(where: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    for key, why in _OF_THE_STUDY.items():
        if key in tables:
            raise ConfigError(f"{where}: {key}: {why}: leave it out")
    found = checked_site(where, tables)
    options_from({key: value for key, value in found.items() if key != "cpu"}, {})
    return found


SlurmTable = Annotated[dict[str, Any], AfterValidator(_checked)]


def over_site(table: Mapping[str, Any], site: Mapping[str, Any]) -> dict[str, Any]:
    """The study's options for training on top of a site's: for `said_options`, as a site of its own."""
    below = dict(site)
    if "cpu" in table or "gpus_per_node" in table:
        # one fact in two words: who says either has said both
        below.pop("cpu", None)
        below.pop("gpus_per_node", None)
    found = {key: value for key, value in joined(table, below).items() if value not in (None, [], {})}
    if table.get("cpu", below.get("cpu")):
        found["cpu"] = True
    return found


def side_options(task: str, table: Mapping[str, Any], options: SlurmOptions, device: str = "cpu") -> SlurmOptions:
    """What a job of one process is given: what [slurm.TASK] says on top of what training is given, as far as that is
    not about many processes. device: that it computes on; one GPU where it is "cuda". Raises ConfigError."""
    own = table.get(task, {})
    below: dict[str, Any] = {name: getattr(options, name) for name in joined({}, {})}
    for name in ("launcher", "tasks_per_node", "dependency", "nodelist", "exclusive", "mem", "comment", "lead",
                 "max_requeues", "srun_arg", "cpu_bind"):  # fmt: skip
        below[name] = None
    below |= {"nodes": 1, "gpus_per_node": 1 if device.startswith("cuda") else 0}
    given = {key: value for key, value in own.items() if key != "cpu"}
    return options_from({**given, **({"gpus_per_node": 0} if own.get("cpu") else {})}, below)
