"""Where a launched job's files are, how large it is and how long it may take: what all kinds of jobs share."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.config.version import VERSION
from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_script import Paths, Size
from megatron.launch.slurm_words import parse_time

_ROOT = Path(__file__).resolve().parents[2]


def place_paths(folder: Path) -> Paths:
    """Of a job whose scripts and logs are in this folder, and which runs where it was launched."""
    source = _ROOT if (_ROOT / "pyproject.toml").is_file() else None
    return Paths(folder.absolute(), Path.cwd(), sys.executable, source)


def sized(options: SlurmOptions, cpu: bool) -> Size:
    """The size of a job that trains. Raises ConfigError where it is not said."""
    if options.nodes is None:
        raise ConfigError("--nodes: how many machines? Give --nodes N, or nodes = N in --site's file")
    if options.gpus_per_node is None:
        raise ConfigError(
            "--gpus-per-node: how many GPUs has each node? Give --gpus-per-node G, or --cpu to train on CPUs"
        )
    ranks = options.tasks_per_node or options.gpus_per_node
    if not ranks:
        flag = "--cpu" if cpu else "--gpus-per-node 0"
        raise ConfigError(f"{flag}: how many processes of each node? Give --tasks-per-node K")
    if options.gpus_per_node and ranks > options.gpus_per_node:
        raise ConfigError(
            f"--tasks-per-node {ranks}: more processes than the {options.gpus_per_node} GPUs of a node, and each has "
            "one of its own: leave it out"
        )
    tasks = 1 if options.launcher == "torchrun" else ranks
    return Size(options.nodes, tasks, ranks, options.gpus_per_node, options.cpus_per_task)


def time_limit(options: SlurmOptions) -> int | None:
    """Seconds; None where it is unlimited. Raises ConfigError where it is not said."""
    if options.time is None:
        raise ConfigError("--time: how long may it take? Give --time T, for example 24:00:00; a bare number is minutes")
    return parse_time(options.time)


def written(said: str) -> str:
    """The first comment of a script."""
    today = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"Written by stagemix {VERSION} on {today} for:\n#   " + said.replace("\n", " ")
