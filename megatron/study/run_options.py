"""How a study is run on this machine: how many processes at a time, and what each is given of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.errors import ConfigError
from megatron.data.processors import available_processors
from megatron.launch.child_process import accelerators
from megatron.planner.layout_plan import default_processes
from megatron.study.plan import PlannedStudy
from megatron.study.steps import TrainStep


@dataclass(frozen=True)
class RunOptions:
    """at_once: tasks side by side · threads: of the arithmetic of a process · processes: of each training node;
    more than one are started by torchrun · devices: accelerators of the machine · seeds: said on the command line ·
    keep_going: whether other nodes are begun after one has failed."""

    at_once: int = 1
    threads: int = 1
    processes: int = 1
    devices: Sequence[str] = ()
    seeds: Sequence[int] = ()
    evaluation: bool = True
    keep_going: bool = True

    def device(self, slot: int) -> str | None:
        """What the process in a slot, counted from 0, sees of the accelerators; None: all."""
        groups = len(self.devices) // self.processes
        if self.at_once == 1 or groups < 1:
            return None
        first = slot % groups * self.processes
        return ",".join(self.devices[first : first + self.processes])

    def words(self) -> str:
        """For people."""
        each = f"{self.threads} thread{'s' if self.threads > 1 else ''} each"
        if self.processes > 1:
            each = f"{self.processes} processes, {each}"
        on = f", on {len(self.devices)} accelerator{'s' if len(self.devices) > 1 else ''}" if self.devices else ""
        return f"at most {self.at_once} at a time, {each}{on}"


def run_options(
    planned: PlannedStudy,
    at_once: int | None,
    threads: int | None,
    processes: int | None,
    recorded_threads: int | None = None,
    **more: bool | Sequence[int],
) -> RunOptions:
    """The options, with what was not said chosen from the machine.

    Threads change the last bits of sums on a CPU, so that they are what the study was run with before; else cores are
    shared among as many nodes as the study has ends. On accelerators a node has one to itself.

    Raises ConfigError for what is no number of processes, and for a node whose layout needs more.
    """
    for name, value in (("--at-once", at_once), ("--threads", threads), ("--processes", processes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: at least 1 is needed")
    cores, devices = available_processors(), accelerators()
    needed = _processes(planned)
    count = processes or needed
    if count % needed:
        raise ConfigError(
            f"--processes {count}: [parallel] of the study names axes of {needed} processes together: give a multiple"
        )
    ends = len({arm.path[-1] for arm in planned.graph.arms})
    groups = max(1, len(devices) // count) if devices else max(1, cores // count)
    threads = threads or recorded_threads or max(1, cores // count // min(groups, ends))
    fit = groups if devices else max(1, cores // (count * threads))
    return RunOptions(at_once or fit, threads, count, tuple(devices), **more)  # type: ignore[arg-type]


def _processes(planned: PlannedStudy) -> int:
    """The fewest that every node's [parallel] names."""
    steps = [node.step for node in planned.graph.nodes.values()]
    return max((default_processes(step.config.parallel) for step in steps if isinstance(step, TrainStep)), default=1)
