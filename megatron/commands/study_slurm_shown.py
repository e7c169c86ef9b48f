"""`stagemix study run STUDY --slurm --dry-run`: the jobs in the order of their submission."""

from __future__ import annotations

from megatron.commands.study_slurm_scripts import StudyScripts
from megatron.config.errors import ConfigError
from megatron.config.quantities import format_count
from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_words import parse_time, time_words
from megatron.planner.hardware import find_accelerator
from megatron.study.costs import NodeTime, node_times
from megatron.study.node_state import title
from megatron.study.plan import PlannedStudy
from megatron.study.slurm_nodes import TASKS, JobKey, JobPlan, NeededJob


def show_jobs(planned: PlannedStudy, plan: JobPlan, scripts: StudyScripts, hardware: str | None) -> None:
    """Prints a line a job: its number here, or its id where it is there already; what is done; what it waits for.

    hardware: for GPU-hours; None: the type of GPU that the options name, if the planner knows it. Raises ConfigError.
    """
    names: dict[JobKey, str] = {key: f"job {job.id}" for key, job in plan.kept.items()}
    names |= {job.key: str(number) for number, job in enumerate(plan.jobs, 1)}
    times, note = _times(planned, scripts, hardware)
    for key, job in plan.kept.items():
        print(f"there already: job {job.id}, {key[1]} {_title(planned, key)}: {job.state.lower()}")
    for stale in plan.stale:
        print(f"to be cancelled and replaced: job {stale.id}")
    rows = [_row(planned, job, names, times) for job in plan.jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    for row in rows:
        cells = [
            row[0].rjust(widths[0]),
            *(cell.ljust(width) for cell, width in zip(row[1:4], widths[1:], strict=True)),
        ]
        print("  ".join([*cells, row[4]]).rstrip())
    if not rows:
        print("nothing is to be submitted")
        return
    _totals(plan, scripts, times, note)


def _row(
    planned: PlannedStudy, job: NeededJob, names: dict[JobKey, str], times: dict[str, NodeTime]
) -> tuple[str, str, str, str, str]:
    name, task = job.key
    amount = ""
    if task == "train":
        amount = f"{format_count(planned.graph.nodes[name].tokens)} tokens"
        if name in times:
            amount += f", {times[name].gpu_hours:.3g} GPU-hours"
    after = [f"afterok {', '.join(names[key] for key in job.ok)}"] if job.ok else []
    after += [f"afterany {', '.join(names[key] for key in job.ended)}"] if job.ended else []
    return names[job.key], task, _title(planned, job.key), amount, "; ".join(after)


def _totals(plan: JobPlan, scripts: StudyScripts, times: dict[str, NodeTime], note: str) -> None:
    tasks = [job.key[1] for job in plan.jobs]
    kinds = [task for task in TASKS if task in tasks]
    print(f"{len(tasks)} jobs: {', '.join(f'{tasks.count(task)} {task}' for task in kinds)}")
    for task in kinds:
        options, size = (scripts.options, scripts.size) if task == "train" else (scripts.side(task), None)
        print(f"  {task}: {_size_words(options, size is None, scripts)}")
    trained = [job.key[0] for job in plan.jobs if job.key[1] == "train"]
    if trained and all(name in times for name in trained):
        print(f"about {sum(times[name].gpu_hours for name in trained):.3g} GPU-hours of training ({note})")
    elif trained:
        print(f"GPU-hours are not known: {note}")


def _size_words(options: SlurmOptions, one: bool, scripts: StudyScripts) -> str:
    limit = parse_time(options.time) if options.time else None
    gpus = options.gpus_per_node or 0
    if one:
        what = f"1 process, {gpus} GPU{'s' * (gpus > 1)}" if gpus else "1 process"
    else:
        size = scripts.size
        what = f"{size.nodes} x {f'{size.gpus} GPUs' if size.gpus else f'{size.ranks} processes'}"
    where = f" on {options.partition}" if options.partition else ""
    return f"{what}{where}, {time_words(limit) if limit else 'unlimited time'} at a time"


def _times(planned: PlannedStudy, scripts: StudyScripts, hardware: str | None) -> tuple[dict[str, NodeTime], str]:
    """By node, and in words how they were found, or why not."""
    name = hardware or scripts.options.gpu_type
    if name is None:
        return {}, "name an accelerator: --hardware h100"
    try:
        accelerator = find_accelerator(name)
    except ConfigError:
        if hardware is not None:
            raise
        return {}, f"the planner knows no {name}: --hardware names what is like it"
    times, notes = node_times(planned.graph, accelerator, scripts.size.nodes * scripts.size.ranks)
    return times, "; ".join([f"predicted for {accelerator.name}, without saves, queues and failures", *notes])


def _title(planned: PlannedStudy, key: JobKey) -> str:
    name = key[0]
    if not name:
        return planned.study.words.study.name
    return title(planned.graph, name) if name in planned.graph.nodes else name[:8]
