"""The batch script of a run that trains, or of an array of runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_script import (
    Head,
    Paths,
    Size,
    end_time_lines,
    environment_lines,
    head_lines,
    meeting_lines,
    record_lines,
    shell_words,
    signal_lines,
    step_lines,
)
from megatron.launch.slurm_words import TASK, with_values

DEAF = """bash -c 'trap "" TERM USR1 USR2; exec "$@"' torchrun"""


@dataclass(frozen=True)
class TrainingJob:
    """What is trained. configs, outputs: by task of the array; of a single run under None, by absolute path.

    overrides: of --set, in which "{task}" is the task's number. chain: the file that lists the jobs of a chain; None
    where there is none. shutdown_seconds: for torchrun, until it kills processes that do not leave. begins_at: of a
    single run, the checkpoint of another that it begins at; None: at step 0.
    """

    configs: Mapping[int | None, Path]
    outputs: Mapping[int | None, Path]
    overrides: Sequence[str] = ()
    max_requeues: int | None = None
    chain: Path | None = None
    shutdown_seconds: int = 300
    begins_at: Path | None = None


def training_script(job: TrainingJob, head: Head, options: SlurmOptions, paths: Paths) -> str:
    """The whole file. Raises ConfigError for values that no #SBATCH line can hold."""
    size = head.size
    several = size.nodes * size.ranks > 1
    lines = [*head_lines(head, options, paths), *signal_lines()]
    lines += environment_lines(options, paths, size)
    if several:
        lines += meeting_lines()
    lines += end_time_lines(head.array is not None)
    lines += record_lines(options, paths)
    lines += ["", *_run_lines(job)]
    lines += step_lines([*launch_lines(options, size, paths, job.shutdown_seconds), *_train_lines(job, options, paths)])
    return "\n".join([*lines, *_tail_lines(job, head, paths)]) + "\n"


def _run_lines(job: TrainingJob) -> list[str]:
    if None in job.outputs:
        return [
            "# the run: the same command begins it and goes on from its newest whole checkpoint",
            f"config={shlex.quote(str(job.configs[None]))}",
            f"output={shlex.quote(str(job.outputs[None]))}",
            *([] if job.begins_at is None else _begin_lines(job.begins_at)),
        ]
    lines = ["# the runs, by task of the array: the same command begins one and goes on with it"]
    for name, paths in (("config", job.configs), ("output", job.outputs)):
        if len(set(paths.values())) == 1:
            lines.append(f"{name}={shlex.quote(str(next(iter(paths.values()))))}")
            continue
        lines.append(f"{name}s=(")
        lines += [f"    [{number}]={shlex.quote(str(path))}" for number, path in paths.items()]
        lines += [")", f'{name}="${{{name}s[$SLURM_ARRAY_TASK_ID]}}"']
    return lines


def _begin_lines(checkpoint: Path) -> list[str]:
    return [
        "# it begins at the end of another run; once it has a checkpoint of its own, and it takes that one over before",
        "# its first step, it goes on from there",
        f"begin=(--resume-from {shlex.quote(str(checkpoint))})",
        'for found in "$output"/checkpoints/step-[0-9]*; do if [ -d "$found" ]; then begin=(); fi; done',
    ]


def launch_lines(options: SlurmOptions, size: Size, paths: Paths, shutdown_seconds: int) -> list[str]:
    """srun with its options, and what stands before the command that runs; each line but comments ends in a backslash.

    shutdown_seconds: for torchrun, until it kills processes that do not leave.
    """
    srun = [
        f'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node={size.tasks}',
        "--kill-on-bad-exit=1",
        *([f"--cpu-bind={shlex.quote(options.cpu_bind)}"] if options.cpu_bind else []),
        *map(shlex.quote, options.srun_arg),
    ]
    if options.container_image:
        srun += [f"--container-image={shlex.quote(options.container_image)}", '--container-workdir="$PWD"']
        if options.container_mounts:
            srun.append(f"--container-mounts={shlex.quote(','.join(options.container_mounts))}")
    lines = [f"{' '.join(srun)} \\"]
    if options.apptainer:
        mounts = [f"--bind {shlex.quote(mount)}" for mount in options.container_mounts]
        words = ["apptainer exec", *(["--nv"] if size.gpus else []), *mounts, '--pwd "$PWD"']
        lines.append(f"    {' '.join(words)} {shlex.quote(options.apptainer)} \\")
    if options.launcher != "torchrun":
        return lines
    torchrun = [
        f"--nnodes={size.nodes} --nproc-per-node={size.ranks} --max-restarts=0",
        '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        '--rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"' if size.nodes * size.ranks > 1 else "--rdzv-endpoint=localhost:0",
        f"--signals-to-handle=SIGINT --shutdown-timeout={shutdown_seconds} --no-python",
    ]
    why = [
        "# SLURM gives a signal to every process of a step, those that torchrun started too: a torchrun that handed it",
        "# on would give it to them a second time, which means: end at once. So torchrun is deaf to it",
    ]
    return [*why, *lines, f"    {DEAF} \\", f"    {_torchrun_words(options, paths)} {torchrun[0]} \\", *(
        f"        {words} \\" for words in torchrun[1:]
    )]  # fmt: skip


def _torchrun_words(options: SlurmOptions, paths: Paths) -> str:
    in_container = options.container_image or options.apptainer
    return "torchrun" if in_container or options.program else f"{shlex.quote(paths.python)} -m torch.distributed.run"


def _train_lines(job: TrainingJob, options: SlurmOptions, paths: Paths) -> list[str]:
    """The command that trains, an option a line, in the background."""
    values = {} if None in job.outputs else TASK
    begin = ' "${begin[@]}"' if job.begins_at is not None else ""
    lines = [f'    {program_words(options, paths)} train "$config"{begin}']
    lines += [f"        --set {with_values(override, values)}" for override in job.overrides]
    return [*(f"{line} \\" for line in lines[:-1]), f"{lines[-1]} &"]


def program_words(options: SlurmOptions, paths: Paths) -> str:
    """How stagemix is called where the ranks run, for bash."""
    if options.program:
        return options.program
    if options.container_image or options.apptainer:
        return "stagemix"
    return here_words(paths)


def here_words(paths: Paths) -> str:
    """How stagemix is called on the host of the batch script, for bash."""
    return shell_words([paths.python, "-P", "-m", "megatron.commands.cli"])


def _tail_lines(job: TrainingJob, head: Head, paths: Paths) -> list[str]:
    limit = "" if job.max_requeues is None else f" --max-requeues {job.max_requeues}"
    lines = [
        "",
        "# reads how the run ended, says what follows and why, and puts the job back in the queue where that is of use",
        f'{here_words(paths)} requeue "$output" --code "$code"{limit}',
    ]
    if job.chain is None:
        return [*lines, 'exit "$?"']
    return [
        *lines,
        "code=$?",
        "# the next job of the chain begins if this one did not end with 0; not after an error that would come again,",
        "# nor where a user stopped the run",
        'if { [ "$code" -ge 1 ] && [ "$code" -le 8 ]; } || grep -qs \'"reason": "stop-now\' "$output/exit.json"; then',
        f"    scancel --state=PENDING $(cat {shlex.quote(str(job.chain))})",
        "fi",
        'exit "$code"',
    ]
