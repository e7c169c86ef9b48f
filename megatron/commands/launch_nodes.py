"""Which nodes a new job leaves out, since a run failed there before."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.launch.bad_nodes import BAD_NODES, affordable, excluded_hosts
from megatron.launch.slurm_control import ControlError, Controller, nodes_of_hosts
from megatron.launch.slurm_options import SlurmOptions


@dataclass(frozen=True)
class LeftOut:
    """all: for sbatch's --exclude, those that the user names first; [] where no node failed. failed: those that are
    there only because bad_nodes.json says so. where: a run's folder that has such a file."""

    all: list[str]
    failed: list[str]
    where: Path | None = None

    @property
    def remedy(self) -> str:
        """Where those that failed come from, and how one is taken back; "" for none."""
        if not self.failed:
            return ""
        return (
            f"left out, as the run failed there before: {', '.join(self.failed)} ({self.where}/{BAD_NODES}); "
            f"stagemix requeue {self.where} --forgive HOST takes one back"
        )


def left_out(outputs: Iterable[Path], options: SlurmOptions, needed: int) -> LeftOut:
    """Nodes that the runs' records exclude, by SLURM's names, besides those of --exclude; as many as can be left out so
    that `needed` usable ones stay. All of them where SLURM cannot be asked. Raises ConfigError for a damaged record.
    """
    by_host = {host: output for output in reversed(list(outputs)) for host in reversed(excluded_hosts(output))}
    hosts = list(by_host)[::-1]  # the most certain first
    if not hosts:
        return LeftOut([], [])
    users = options.exclude.split(",") if options.exclude else []
    try:
        failed = _affordable(hosts, options, needed)
    except ControlError as error:
        _note(f"SLURM cannot be asked which nodes could be spared: {error}")
        failed = list(dict.fromkeys(host.partition(".")[0] for host in hosts))
    failed = [name for name in failed if name not in users]
    found = LeftOut([*users, *failed] if failed else [], failed, by_host[hosts[0]])
    if failed:
        _note(found.remedy)
    return found


def _affordable(hosts: list[str], options: SlurmOptions, needed: int) -> list[str]:
    """Raises ControlError."""
    controller = Controller("")
    # without --partition it is the site's own, which is not known here: then all nodes are looked at
    nodes = controller.usable_nodes(options.partition.split(",") if options.partition else ())
    excluded, required = controller.expand(options.exclude or ""), controller.expand(options.nodelist or "")
    names, unknown = nodes_of_hosts(hosts, nodes)
    for host in unknown:
        _note(f"{host} failed before, and SLURM has no usable node of that name: not excluded")
    wanted = [name for name in dict.fromkeys(names) if name not in excluded]
    spared = affordable(wanted, set(nodes) - set(excluded), needed, required)
    for name in wanted:
        if name not in spared:
            why = (
                "--nodelist names it" if name in required else f"{needed} nodes are needed, and too few others are left"
            )
            _note(f"{name} failed before, and is not left out: {why}")
    return spared


def _note(words: str) -> None:
    print(f"note: {words}", file=sys.stderr, flush=True)
