"""`stagemix launch_slurm`: one readable batch script for SLURM, kept and submitted."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.commands.launch_checks import CheckedRun, check_run
from megatron.commands.launch_nodes import left_out
from megatron.commands.launch_places import place_paths, sized, time_limit
from megatron.commands.launch_slurm_arguments import parser, said_options, split
from megatron.commands.launch_training import lead_in, training_head
from megatron.config.errors import EXIT_DONE, ConfigError
from megatron.launch.slurm_options import SlurmOptions, read_site
from megatron.launch.slurm_script import Head, Paths, Size
from megatron.launch.slurm_submit import (
    keep_script,
    next_script,
    one_launch_at_a_time,
    require_sbatch,
    submit,
    trainer_of,
)
from megatron.launch.slurm_words import ArraySpec, parse_array, time_words
from megatron.launch.stop_lead import StopLead
from megatron.launch.training_script import TrainingJob, training_script


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    words = sys.argv[1:] if argv is None else argv
    ours, command = split(words)
    built = parser()
    args = built.parse_args(ours)
    options = said_options(args, read_site(args.site) if args.site else {})
    said = f"stagemix launch_slurm {' '.join(map(shlex.quote, words))}"
    if command is not None:
        from megatron.commands.launch_slurm_data import launch_command

        return launch_command(command, args, options, said)
    if (args.config is None) == (args.configs is None):
        raise ConfigError(
            "name one CONFIG, or --configs FILE with a CONFIG a line; other commands stand after --, for example "
            "-- preprocess_data …; stagemix launch_slurm --help shows all"
        )
    return _launch_training(args, options, said)


def _launch_training(args: argparse.Namespace, options: SlurmOptions, said: str) -> int:
    _check_together(args, options)
    size = sized(options, args.cpu)
    limit = time_limit(options)
    runs = _runs(args, options, size)
    first = next(iter(runs.values()))
    paths = place_paths(args.folder or _folder(runs))
    if not args.dry_run:
        require_sbatch()
    if args.serve_evaluations:
        from megatron.commands.launch_slurm_data import server_options

        server_options(first, args, options)  # refuses before anything is submitted
    lead = lead_in(runs.values(), options, size, limit)
    avoided = left_out([run.output for run in runs.values()], options, size.nodes)
    name = first.config.run.name if len(runs) == 1 else f"{first.config.run.name}-array"
    requeue = options.requeue is not False and not args.chain
    array = None if None in runs else _array(runs, args, options).words
    head = training_head(name, first, size, lead, limit, avoided.all, said, requeue, array)
    for note in dict.fromkeys(note for run in runs.values() for note in run.notes):
        print(f"note: {note}", file=sys.stderr, flush=True)
    if args.dry_run:
        print(_text(next_script(paths.folder, "train"), runs, args, options, lead, head, paths), end="")
        if args.serve_evaluations:
            _serve(first, args, options, paths, "TRAINING_JOB", said)
        return EXIT_DONE
    # a single run's own folder, whatever --folder says: that is what two launches of it have in common
    with one_launch_at_a_time(_folder(runs)):
        if not (args.chain or options.dependency):
            _refuse_second_trainer(runs, paths.folder)
        script = next_script(paths.folder, "train")
        keep_script(script, _text(script, runs, args, options, lead, head, paths))
        jobs = _submit_all(script, args.chain or 1, _chain(script, args), avoided.remedy)
    _tell(script, jobs, runs, size, limit, lead)
    _tell_switches(jobs, runs, args, options)
    if args.serve_evaluations:
        _serve(first, args, options, paths, jobs[0], said)
    return EXIT_DONE


def _chain(script: Path, args: argparse.Namespace) -> Path | None:
    return script.with_suffix(".chain") if args.chain else None


def _text(
    script: Path,
    runs: Mapping[int | None, CheckedRun],
    args: argparse.Namespace,
    options: SlurmOptions,
    lead: StopLead,
    head: Head,
    paths: Paths,
) -> str:
    return training_script(_job(runs, args, options, lead, _chain(script, args)), head, options, paths)


def _check_together(args: argparse.Namespace, options: SlurmOptions) -> None:
    """Raises ConfigError for options that make no sense together, or here."""
    if args.chain is not None:
        if args.chain < 1:
            raise ConfigError(f"--chain {args.chain}: at least one job")
        if options.requeue:
            raise ConfigError("--chain is for jobs that are not requeued: leave --requeue out")
        if options.array or args.configs:
            raise ConfigError("--chain is for one run: leave --array and --configs out")
        if args.chain > 1 and options.dependency == "singleton":
            raise ConfigError("--chain orders its jobs itself: leave --dependency singleton out")
    if args.over or args.shards:
        raise ConfigError("--over and --shards are for commands after --: leave them out, or see --configs")
    if options.array and args.config is not None and not any("{task}" in words for words in args.overrides):
        raise ConfigError(
            f"--array {options.array}: all tasks would train the same run: let {{task}} make them differ, for example "
            "--set run.output=runs/sweep-{task} --set run.seed={task}; or give --configs FILE"
        )
    if args.serve_evaluations and (options.array or args.configs):
        raise ConfigError(
            "--serve-evaluations is for one run: launch its side job by itself: -- evaluate --serve OUTPUT"
        )
    if args.at_once is not None and args.at_once < 1:
        raise ConfigError(f"--at-once {args.at_once}: at least 1")


def _runs(args: argparse.Namespace, options: SlurmOptions, size: Size) -> dict[int | None, CheckedRun]:
    """Every run of the job, checked; of a job that is no array under None."""
    processes = size.nodes * size.ranks
    if args.configs is None and options.array is None:
        run = check_run(args.config, args.overrides, processes, args.dry_run)
        if "{task}" in str(run.output):
            raise ConfigError(
                f"run.output = {str(run.output)!r}: {{task}} is the number of an array's task, and this job is no "
                "array: add --array 0-N or --configs FILE, or leave {task} out"
            )
        return {None: run}
    configs = _listed(args.configs) if args.configs is not None else None
    spec = parse_array(options.array) if options.array else ArraySpec(tuple(range(len(configs or ()))))
    runs: dict[int | None, CheckedRun] = {}
    for number in spec.ids:
        if configs is not None and number >= len(configs):
            raise ConfigError(
                f"--array {options.array}: task {number}: {args.configs} has lines 0 to {len(configs) - 1}"
            )
        path = configs[number] if configs is not None else args.config
        overrides = [words.replace("{task}", str(number)) for words in args.overrides]
        runs[number] = check_run(path, overrides, processes, args.dry_run)
    by_output: dict[Path, int | None] = {}
    for task, run in runs.items():
        if (other := by_output.setdefault(run.output.absolute(), task)) != task:
            raise ConfigError(
                f"tasks {other} and {task} would both write to {run.output}: add --set run.output=…{{task}}…"
            )
    return runs


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--configs {path}: cannot be read: {error}") from None
    found = [Path(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise ConfigError(f"--configs {path}: names no config: write one path a line")
    return found


def _folder(runs: Mapping[int | None, CheckedRun]) -> Path:
    """OUTPUT/slurm; of several runs beside them, where all of them are below."""
    outputs = [run.output.absolute() for run in runs.values()]
    if len(outputs) == 1:
        return outputs[0] / "slurm"
    return Path(os.path.commonpath([path.parent for path in outputs])) / "slurm"


def _refuse_second_trainer(runs: Mapping[int | None, CheckedRun], folder: Path) -> None:
    for run in runs.values():
        # of an array, earlier submissions from its folder may be of other runs: each run's own record counts
        scripts = folder if len(runs) == 1 else None
        if words := trainer_of(run.output, run.config.health.heartbeat_seconds, scripts):
            raise ConfigError(
                f"{run.output}: {words}: two jobs must not train one run. Stop that one (touch {run.output}/stop-now, "
                "or scancel), or let this one follow it: --dependency afterany:JOB"
            )


def _array(runs: Mapping[int | None, CheckedRun], args: argparse.Namespace, options: SlurmOptions) -> ArraySpec:
    if options.array:
        given = parse_array(options.array)
    else:
        given = ArraySpec(tuple(number for number in runs if number is not None))
    return ArraySpec(given.ids, args.at_once or given.limit)


def _job(
    runs: Mapping[int | None, CheckedRun],
    args: argparse.Namespace,
    options: SlurmOptions,
    lead: StopLead,
    chain: Path | None,
) -> TrainingJob:
    return TrainingJob(
        configs={task: run.path.absolute() for task, run in runs.items()},
        outputs={task: run.output.absolute() for task, run in runs.items()},
        overrides=args.overrides,
        max_requeues=options.max_requeues,
        chain=chain,
        shutdown_seconds=lead.seconds,
    )


def _submit_all(script: Path, count: int, chain: Path | None, hint: str) -> list[str]:
    """Submits the script so often, each job after those before it; their ids."""
    jobs: list[str] = []
    for _ in range(count):
        # afternotok: where a job ends with 0 the run is complete, and SLURM drops those that wait for it to fail. Each
        # waits for all before it: one that is dropped counts as failed, and the next would begin
        after = ["--kill-on-invalid-dep=yes", f"--dependency=afternotok:{':'.join(jobs)}"] if jobs else []
        jobs.append(submit(script, after, hint))
        if chain is not None:
            chain.write_text("\n".join(jobs) + "\n", encoding="utf-8")
    return jobs


def _tell(
    script: Path,
    jobs: Sequence[str],
    runs: Mapping[int | None, CheckedRun],
    size: Size,
    limit: int | None,
    lead: StopLead,
) -> None:
    first = next(iter(runs.values()))
    job, output = jobs[0], first.output if len(runs) == 1 else Path("OUTPUT")
    kind = f"{size.gpus} GPUs" if size.gpus else f"{size.ranks} processes"
    what = f"{len(runs)} runs" if None not in runs else f"run {first.config.run.name}"
    log = script.parent / (f"{job}_TASK.log" if None not in runs else f"{job}.log")
    print(f"submitted {', '.join(jobs)}: {what} on {size.nodes} x {kind} for {time_words(limit) if limit else 'ever'}")
    print(f"layout: {first.layout}")
    if limit is not None:
        print(f"asked to stop {lead.seconds} s before the end: {lead.why}")
    print(f"script   {script}\nlog      {log}")
    print(f"look     stagemix status {shlex.quote(str(output))}")


def _tell_switches(
    jobs: Sequence[str], runs: Mapping[int | None, CheckedRun], args: argparse.Namespace, options: SlurmOptions
) -> None:
    """How the run is told to save and to stop, once it runs."""
    output = next(iter(runs.values())).output if len(runs) == 1 else Path("OUTPUT")
    again = "the next job of the chain goes on" if args.chain else "put back in the queue"
    again = "not started again" if options.requeue is False and not args.chain else again
    job = f"{jobs[0]}_TASK" if None not in runs else jobs[0]
    for name, command, what in (
        ("save", f"touch {shlex.quote(str(output / 'save-now'))}", "saved at the next step, and trained on"),
        ("stop", f"touch {shlex.quote(str(output / 'stop-now'))}", "saved, and not started again"),
        ("pause", f"scancel --batch --signal=USR1 {job}", f"saved, and {again}"),
        ("end", f"scancel {' '.join(jobs)}", "saved where the site's KillWait is enough for it; not started again"),
    ):
        print(f"{name:<8} {command}\n         {what}", flush=True)


def _serve(run: CheckedRun, args: argparse.Namespace, options: SlurmOptions, paths: Paths, job: str, said: str) -> None:
    from megatron.commands.launch_slurm_data import launch_server

    launch_server(run, args, options, paths, job, said)


__all__ = ["main", "parser"]
