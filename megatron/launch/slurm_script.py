"""The parts of a batch script, in the order in which they stand there: plain lines, with comments that say why."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_words import directive, log_pattern


@dataclass(frozen=True)
class Paths:
    """Where a job's files are. folder: for scripts, logs, records. directory: in which it runs. source: the root of a
    source tree that need not be installed; None where stagemix is installed. python: that of the login node."""

    folder: Path
    directory: Path
    python: str
    source: Path | None = None


@dataclass(frozen=True)
class Size:
    """nodes; tasks: of srun on each; ranks: processes that train, or work, on each; gpus: of each; cores: of a rank."""

    nodes: int = 1
    tasks: int = 1
    ranks: int = 1
    gpus: int = 0
    cores: int | None = None


@dataclass(frozen=True)
class Head:
    """What stands at the top. lines: about what this is. signal: of --signal, with why; None for none."""

    name: str
    lines: Sequence[str]
    size: Size
    requeue: bool
    signal: tuple[str, str] | None = None
    array: str | None = None
    excluded: Sequence[str] = field(default_factory=list)


def head_lines(head: Head, options: SlurmOptions, paths: Paths) -> list[str]:
    """The shebang, the comment and the #SBATCH lines. Raises ConfigError for values that no such line can hold."""
    size = head.size
    lines = ["#!/bin/bash", *(f"# {line}" for line in head.lines), ""]
    if options.job_name is None:
        lines.append(directive("job-name", head.name))
    lines += [
        directive("nodes", size.nodes),
        f"# on each node {_tasks_words(size)}",
        directive("ntasks-per-node", size.tasks),
    ]
    if size.cores is not None:
        lines.append(directive("cpus-per-task", size.cores * size.ranks // size.tasks))
    lines += _gpu_lines(size, options)
    asked = [line for line in options.directives() if not line.startswith("#SBATCH --cpus-per-task=")]
    lines += [line for line in asked if not (head.excluded and line.startswith("#SBATCH --exclude="))]
    if head.excluded:
        lines += ["# nodes that failed before: OUTPUT/bad_nodes.json, besides those of --exclude"]
        lines.append(directive("exclude", ",".join(head.excluded)))
    if head.array is not None:
        lines.append(directive("array", head.array))
    if head.signal is not None:
        lines += comment(head.signal[1])
        lines.append(directive("signal", head.signal[0]))
    if head.requeue:
        lines += ["# a job that was stopped, preempted or lost a node goes back into the queue and keeps its number"]
        lines.append(directive("requeue"))
    else:
        lines += ["# SLURM does not start it a second time by itself", directive("no-requeue")]
    log = "%A_%a.log" if head.array is not None else "%j.log"
    lines += ["# one log for all starts of the job: a later one is written behind the earlier ones"]
    lines += [directive("output", f"{log_pattern(str(paths.folder))}/{log}"), directive("open-mode", "append")]
    lines += ["# where relative paths of the config start", directive("chdir", str(paths.directory))]
    return lines


def comment(words: str) -> list[str]:
    """Words as lines of comment of at most 118 columns."""
    return [f"# {line}" for line in textwrap.wrap(words, 116)]


def _tasks_words(size: Size) -> str:
    if size.tasks != size.ranks:
        return f"one torchrun, which starts {size.ranks} processes"
    kind = "process, each with a GPU of its own" if size.gpus else "process"
    return f"{size.tasks} {kind if size.tasks == 1 else kind.replace('process', 'processes', 1)}"


def _gpu_lines(size: Size, options: SlurmOptions) -> list[str]:
    if not size.gpus or options.gpu_request == "none":
        return []
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    if options.gpu_request == "gres":
        return [directive("gres", f"gpu:{kind}{size.gpus}")]
    return [directive("gpus-per-node", f"{kind}{size.gpus}")]


def environment_lines(options: SlurmOptions, paths: Paths, size: Size) -> list[str]:
    """Modules, setup files, variables, threads, caches."""
    lines = ["", "# the environment"]
    lines += [f"module load {shlex.quote(name)} || exit 2" for name in options.module]
    lines += [f"source {shlex.quote(path)} || exit 2" for path in options.setup]
    lines += list(options.setup_line)
    if paths.source is not None:
        lines += ["# a source tree, which need not be installed"]
        lines.append(f'export PYTHONPATH={shlex.quote(str(paths.source))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in options.env.items()]
    lines += [
        "# ranks get what is exported here, even where the job was submitted with --export=NONE",
        "export SLURM_EXPORT_ENV=ALL",
    ]
    if size.cores is not None:
        lines += [
            "# since SLURM 22.05 srun does not take --cpus-per-task over from sbatch",
            'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
        ]
    return [*lines, *_runtime_lines(size)]


def _runtime_lines(size: Size) -> list[str]:
    if size.cores is not None:
        threads = [f"export OMP_NUM_THREADS={size.cores}"]
    else:
        threads = [f"export OMP_NUM_THREADS=$(((SLURM_CPUS_ON_NODE + {size.ranks - 1}) / {size.ranks}))"]
    return [
        "# the cores of a rank: unset, each rank would start a thread on every core of the node",
        *threads,
        "# a line that was printed before a kill is in the log, and a crash in native code names the line of Python",
        "export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1",
        "# compiled kernels on the node's own disk: many ranks that lock and rename on a shared one are slow or stuck.",
        "# Extensions by start: the lock of one that was killed while it compiled would be waited for for ever",
        'cache="${SLURM_TMPDIR:-/tmp/$(id -un)}/stagemix"',
        'export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"',
        'export TORCH_EXTENSIONS_DIR="$cache/extensions-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
    ]


def meeting_lines() -> list[str]:
    """Where the processes of a job of several meet."""
    return [
        "",
        "# where the ranks meet: the first node. Where its name is in no name service (clouds), the address by which",
        "# SLURM reaches it",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'getent hosts "$first" > /dev/null ||',
        "    first=$(scontrol show node \"$first\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        'export MASTER_ADDR="$first"',
        "# a port by job, since jobs may share a node, and by restart, since a socket of the last start may linger;",
        "# below 32768, where the system takes the ports of outgoing connections from",
        "export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 3001 * ${SLURM_RESTART_COUNT:-0}) % 10000))",
        "# no NCCL_* and no TORCH_NCCL_*: NVIDIA asks to leave them unset but for facts of a site (which network card,",
        "# NCCL_SOCKET_IFNAME, say, by --env), and torch ends a process whose communication failed by default",
    ]


def end_time_lines(array: bool) -> list[str]:
    """When the allocation ends, for a run that stops in time by itself."""
    # by its own number the first task of an array would be shown with all others
    job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if array else '"$SLURM_JOB_ID"'
    return [
        "",
        "# when the time is over, as SLURM knows it now: it may have been changed after submission",
        f"end=$(squeue -h -j {job} -o %e)",
        'end=${end:+$(date -d "$end" +%s 2> /dev/null)}',
        'export STAGEMIX_END_TIME="${end:-${SLURM_JOB_END_TIME:-}}"',
    ]


def record_lines(options: SlurmOptions, paths: Paths) -> list[str]:
    """What this start ran with, kept beside the log: names and versions, and no value that may be secret."""
    versions = 'import importlib.metadata as m; print(sorted(f"{d.name} {d.version}" for d in m.distributions()))'
    image = options.container_image or options.apptainer
    lines = [
        "",
        "# a record of this start: nodes, versions, devices; of variables the names, and values of launchers' alone",
        "{",
        '    date; scontrol show hostnames "$SLURM_JOB_NODELIST"',
    ]
    if paths.source is not None:
        root = shlex.quote(str(paths.source))
        lines.append(f"    git -C {root} describe --always --dirty --abbrev=40; git -C {root} status --short")
    if image:
        lines.append(f"    echo image {shlex.quote(image)}")
    lines += [
        f"    {shlex.quote(paths.python)} -c {shlex.quote(versions)}",
        "    type module && module list",
        "    nvidia-smi --query-gpu=name,uuid,driver_version --format=csv",
        "    compgen -e",
        "    env | grep -E '^(SLURM|CUDA|NCCL|TORCH|TRITON|OMP|MASTER|STAGEMIX)_' |",
        "        grep -viE 'key|token|secret|passw|auth|credential'",
        f'}} > {shlex.quote(str(paths.folder))}/"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}.txt" 2>&1',
    ]
    return lines


def signal_lines() -> list[str]:
    """Handlers of signals, for the very beginning: what is heard before the step runs is remembered in `heard`."""
    return [
        "",
        "# SIGUSR1, shortly before the time is over or from `scancel --batch --signal=USR1 JOB`, comes to this script",
        "# alone; srun gives it to every rank once. SIGTERM SLURM sends to the ranks itself: handed on, it would make",
        "# srun kill them; unhandled, it would end this script before they have saved. Set before all that takes time",
        "step= heard= asked=",
        'trap \'heard=USR1; if [ "$step" ]; then kill -USR1 "$step"; asked=1; fi\' USR1',
        "trap 'heard=TERM' TERM",
    ]


def step_lines(command: Sequence[str]) -> list[str]:
    """Starts the step and waits for it; signals reach its processes once. Afterwards `code` is its exit code; 75 where
    a signal came before it began, or it died of the request to stop. `signal_lines` stand at the script's beginning.

    What SLURM 22.05 does, tried: of `B:USR1@…` and of `scancel --batch --signal=USR1` this script alone hears. srun
    hands SIGUSR1 on to every process of the step, once. `scancel JOB`, the time limit and `scontrol requeue` send
    SIGTERM to script and step both, preemption with grace to the step alone; and an srun that gets SIGTERM kills.
    """
    return [
        "",
        'if [ "$heard" ]; then',
        '    echo "SIG$heard came before the step was started: it is not started"',
        "    code=75",
        "else",
        *(f"    {line}" for line in command),
        "    step=$!",
        "    # a request that came while it was being started",
        '    if [ "$heard" = USR1 ] && [ -z "$asked" ]; then kill -USR1 "$step"; fi',
        "    # wait returns at each signal, with more than 128; once the step has ended, it gives its exit code",
        '    while wait "$step"; code=$?; kill -0 "$step" 2> /dev/null; do :; done',
        '    if [ "$code" -gt 128 ]; then wait "$step"; code=$?; fi',
        '    echo "the step ended with $code${heard:+ after SIG$heard}"',
        "    # 128 + SIGUSR1 or SIGUSR2: processes that did not listen yet died of the request to stop. They had begun",
        "    # nothing that was to be saved, so it is a stop and no failure; a record that the run left counts more",
        '    if [ "$heard" = USR1 ] && { [ "$code" = 138 ] || [ "$code" = 140 ]; }; then code=75; fi',
        "fi",
    ]


def shell_words(words: Sequence[str]) -> str:
    """Words quoted for bash, as one line."""
    return " ".join(shlex.quote(word) for word in words)
