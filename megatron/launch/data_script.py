"""Batch scripts of commands that are no training: shards of preprocessing, the merge, exports, evaluations."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_script import (
    Head,
    Paths,
    environment_lines,
    head_lines,
    record_lines,
    signal_lines,
    step_lines,
)
from megatron.launch.slurm_words import TASK, with_values
from megatron.launch.training_script import launch_lines, program_words

THIS_JOB = '"${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"'
_ITEM = {**TASK, "item": '"$item"', "name": '"$name"'}
WAIT_MINUTES = 30
"""For the run's folder, which appears when training has begun."""


@dataclass(frozen=True)
class DataJob:
    """A command in a batch script.

    words: the command and its arguments; in those of an array "{task}", "{item}", "{name}" stand for the task's number,
    its item and the last part of the item's path. items: by number of the task; empty where there are none. shard: bash
    words of --shard, for preprocess_data. resumes: the command ends with 75 where a signal stopped it, and goes on
    later. workers: of --workers, where the number of cores is known only in the job.
    """

    words: Sequence[str]
    items: Sequence[str] = ()
    shard: str | None = None
    resumes: bool = False
    cores_option: bool = False
    array: bool = False


def data_script(job: DataJob, head: Head, options: SlurmOptions, paths: Paths) -> str:
    """The whole file. Raises ConfigError for values that no #SBATCH line can hold."""
    lines = [*head_lines(head, options, paths), *signal_lines()]
    lines += environment_lines(options, paths, head.size)
    lines += record_lines(options, paths)
    values = {}
    if job.items:
        lines += ["", "# what each task of the array is about", "items=("]
        lines += [f"    [{number}]={shlex.quote(item)}" for number, item in enumerate(job.items)]
        lines += [")", 'item="${items[$SLURM_ARRAY_TASK_ID]}"; name="${item##*/}"']
        values = _ITEM
    elif job.array:
        values = TASK
    words = [program_words(options, paths), *(with_values(word, values) for word in job.words)]
    if job.shard is not None:
        words += ["--shard", job.shard]
    if job.cores_option:
        words += ["--workers", '"$SLURM_CPUS_PER_TASK"']
    lines += step_lines([*launch_lines(options, head.size, paths, 0), f"    {' '.join(words)} &"])
    return "\n".join([*lines, *(_again_lines() if job.resumes else ["", 'exit "$code"'])]) + "\n"


def serve_script(
    run: Path, arguments: Sequence[str], training_job: str, head: Head, options: SlurmOptions, paths: Paths
) -> str:
    """The side job that evaluates the checkpoints of the run that `training_job` trains, until the run is complete."""
    lines = [*head_lines(head, options, paths), *signal_lines()]
    lines += environment_lines(options, paths, head.size)
    lines += record_lines(options, paths)
    words = [program_words(options, paths), "evaluate", "--serve", '"$output"', *map(shlex.quote, arguments)]
    lines += [
        "",
        f"output={shlex.quote(str(run))}",
        "# the run's folder is there once training has begun",
        f"for _ in {{1..{WAIT_MINUTES * 12}}}; do",
        '    if [ -e "$output/config.toml" ] || [ "$heard" ]; then break; fi; sleep 5',
        "done",
    ]
    lines += step_lines([*launch_lines(options, head.size, paths, 0), f"    {' '.join(words)} &"])
    lines += [
        "",
        "# its time is over, or it was preempted: it goes on while the job that trains is known to SLURM",
        f'if [ "$code" = 75 ] && ! squeue -h -j {shlex.quote(training_job)} 2> /dev/null | grep -q .; then',
        '    echo "the job that trains is gone: no evaluations are to come"; exit "$code"',
        "fi",
    ]
    return "\n".join([*lines, *_again_lines()]) + "\n"


def _again_lines() -> list[str]:
    return [
        "",
        "# stopped in time (75): it goes on later. Not after a SIGTERM to this script, which is scancel",
        'if [ "$code" = 75 ] && [ "$heard" != TERM ]; then',
        f"    scontrol requeue {THIS_JOB} && exit 0",
        "fi",
        'exit "$code"',
    ]
