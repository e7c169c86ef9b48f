"""`stagemix launch_slurm … -- COMMAND …`: other commands than training as jobs and arrays; a job that evaluates."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.commands.launch_checks import CheckedRun
from megatron.commands.launch_places import place_paths, time_limit, written
from megatron.config.errors import EXIT_DONE, ConfigError
from megatron.launch.data_script import DataJob, data_script, serve_script
from megatron.launch.slurm_options import SlurmOptions
from megatron.launch.slurm_script import Head, Paths, Size
from megatron.launch.slurm_submit import keep_script, next_script, require_sbatch, submit
from megatron.launch.slurm_words import ArraySpec, parse_array, parse_time, time_words

LAUNCHED = ("preprocess_data", "merge_data", "train_tokenizer", "evaluate", "export_hf", "export_megatron", "import_hf",
            "import_megatron", "generate", "win_rate")  # fmt: skip
LEAD = 120
"""Seconds before the end at which a command that resumes is asked to stop: what it has in hand is small."""


def launch_command(command: Sequence[str], args: argparse.Namespace, options: SlurmOptions, said: str) -> int:
    """Writes and submits the job of a command. Raises ConfigError for what cannot be launched."""
    _check(command, args, options)
    name, words = command[0].replace("-", "_"), list(command[1:])
    if options.time is None:
        time_limit(options)
    size = Size(options.nodes or 1, 1, 1, options.gpus_per_node or 0, options.cpus_per_task)
    paths = place_paths(args.folder or _folder(name, words))
    if not args.dry_run:
        require_sbatch()
    if name == "preprocess_data":
        return _preprocess(words, args, options, paths, size, said)
    array = _items_array(args, options, [name, *words])
    job = DataJob([name, *words], tuple(args.over), resumes=_resumes(name, words), array=array is not None)
    head = _head(name, options, size, job.resumes, array, said)
    script = next_script(paths.folder, name)
    _put(script, data_script(job, head, options, paths), args.dry_run)
    return EXIT_DONE


def _check(command: Sequence[str], args: argparse.Namespace, options: SlurmOptions) -> None:
    """Raises ConfigError where options and command do not go together."""
    possible = f"after -- stands one of {', '.join(LAUNCHED)}"
    if not command:
        raise ConfigError(f"nothing stands after --: {possible}")
    name = command[0].replace("-", "_")
    if name == "train":
        raise ConfigError("-- train: a run is launched by its config: stagemix launch_slurm CONFIG --nodes N …")
    if name not in LAUNCHED:
        near = difflib.get_close_matches(name, LAUNCHED, n=1, cutoff=0.6)
        raise ConfigError(f"-- {command[0]}: {f'did you mean {near[0]!r}? ' if near else ''}{possible}")
    for flag, value in (("CONFIG", args.config), ("--set", args.overrides), ("--configs", args.configs)):
        if value:
            raise ConfigError(f"{flag} is for training; what stands after -- has arguments of its own: leave it out")
    for flag, value in (("--chain", args.chain), ("--serve-evaluations", args.serve_evaluations)):
        if value:
            raise ConfigError(f"{flag} is for training: leave it out before -- {name}")
    if options.launcher == "torchrun":
        raise ConfigError(f"--launcher torchrun is for training: {name} is one process")
    if (options.nodes or 1) != 1:
        raise ConfigError(
            f"--nodes {options.nodes}: {name} is one process on one node; for more of them: --array or --over"
        )
    if args.shards is not None and name != "preprocess_data":
        raise ConfigError("--shards is of preprocess_data: leave it out")


def _resumes(name: str, words: Sequence[str]) -> bool:
    return name == "preprocess_data" or (name == "evaluate" and "--serve" in words)


def _folder(name: str, words: Sequence[str]) -> Path:
    """Beside what the command writes."""
    for flag in ("--output-prefix", "--output", "--serve"):
        if value := _value_of(words, flag):
            plain = Path(value.split("{")[0] or ".") if "{" in value else Path(value)
            if flag == "--output-prefix":
                return plain.with_name(f"{plain.name}.slurm")
            return (plain if flag == "--serve" else plain.parent if "{" not in value else plain) / "slurm"
    return Path("slurm")


def _value_of(words: Sequence[str], flag: str) -> str | None:
    for number, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and number + 1 < len(words):
            return words[number + 1]
    return None


def _items_array(args: argparse.Namespace, options: SlurmOptions, words: Sequence[str]) -> str | None:
    """The array of --over or --array, as sbatch takes it. Raises ConfigError where its tasks would be the same."""
    shown = " ".join(words)
    if args.over:
        if options.array:
            raise ConfigError("--over makes an array of its items: leave --array out; --at-once N limits it")
        if "{item}" not in shown and "{name}" not in shown:
            raise ConfigError("--over: no {item} stands after --, so all tasks would do the same: write it there")
        names = [item.rstrip("/").rpartition("/")[2] for item in args.over]
        output = _value_of(words, "--output") or ""
        if "{" not in output and _value_of(words, "--output") is not None:
            raise ConfigError(f"--output {output}: all tasks would write there: let {{name}} or {{task}} stand in it")
        if "{name}" in output and "{task}" not in output and "{item}" not in output and len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"--over: two items are called {twice!r}, and --output has {{name}}: use {{task}} in it")
        return ArraySpec(tuple(range(len(args.over))), args.at_once).words
    if options.array is None:
        return None
    if "{task}" not in shown:
        raise ConfigError(f"--array {options.array}: no {{task}} stands after --, so all tasks would do the same")
    return parse_array(options.array).words


def _head(name: str, options: SlurmOptions, size: Size, resumes: bool, array: str | None, said: str) -> Head:
    signal = None
    limit = time_limit(options)
    if resumes and limit is not None:
        lead = min(LEAD, max(1, limit // 2))
        signal = (
            f"B:USR1@{lead}",
            f"SIGUSR1 to this script alone (B:) {lead} s before the time is over: it goes on later",
        )
    return Head(name, [written(said)], size, options.requeue is not False, signal, array)


def _preprocess(
    words: list[str], args: argparse.Namespace, options: SlurmOptions, paths: Paths, size: Size, said: str
) -> int:
    """The shards as an array, and the merge behind them; without --array one job."""
    from megatron.commands.preprocess_data import build_parser

    asked = build_parser().parse_args(words)
    if asked.shard is not None:
        raise ConfigError(f"--shard {asked.shard}: the launcher gives each task of the array its own: leave it out")
    if args.over:
        raise ConfigError("--over: preprocess_data is shared out by --array 1-N; leave --over out")
    spec = parse_array(options.array) if options.array else None
    shard, count = _shard(spec, args.shards)
    workers = size.cores is not None and asked.workers is None
    job = DataJob(["preprocess_data", *words], shard=shard, resumes=True, cores_option=workers, array=False)
    head = _head("preprocess_data", options, size, True, spec.words if spec else None, said)
    script = next_script(paths.folder, "preprocess_data")
    shards = _put(script, data_script(job, head, options, paths), args.dry_run)
    if spec is None or len(spec.ids) < count:
        if spec is not None:
            print(f"when all {count} shards are there: stagemix merge_data --output-prefix {asked.output_prefix}")
        return EXIT_DONE
    merge = ["merge_data", "--output-prefix", str(asked.output_prefix)]
    merge += [flag for flag, on in (("--overwrite", asked.overwrite), ("--keep-parts", asked.keep_parts)) if on]
    alone = dataclasses.replace(options, array=None, dependency=None)
    lines = _head("merge_data", alone, size, False, None, said)
    script = script.with_name(script.name.replace("preprocess_data", "merge_data"))
    text = data_script(DataJob(merge), lines, alone, paths)
    _put(script, text, args.dry_run, ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{shards}"])
    return EXIT_DONE


def _shard(spec: ArraySpec | None, count: int | None) -> tuple[str | None, int]:
    """Bash words of --shard for the tasks of an array, and how many shards there are.

    Shards are numbered from 1. Tasks 1-N or 0-(N-1) are all of N; with --shards N the tasks are numbers of shards, so
    that those that are missing can be made by themselves.
    """
    if spec is None:
        if count is not None:
            raise ConfigError("--shards: say which of them: --array 1-N")
        return None, 1
    if count is not None:
        if spec.ids[0] < 1 or spec.ids[-1] > count:
            raise ConfigError(f"--array {spec.words} with --shards {count}: shards are numbered 1 to {count}")
        return f'"$SLURM_ARRAY_TASK_ID/{count}"', count
    if not spec.contiguous or spec.ids[0] > 1:
        raise ConfigError(
            f"--array {spec.words}: some shards of an unknown number: give 1-N for all of N, or --shards N besides"
        )
    total = len(spec.ids)
    number = "$SLURM_ARRAY_TASK_ID" if spec.ids[0] == 1 else "$((SLURM_ARRAY_TASK_ID + 1))"
    return f'"{number}/{total}"', total


def _put(script: Path, text: str, dry_run: bool, options: Sequence[str] = ()) -> str:
    """Shows a script, or keeps and submits it; the job's id, in a dry run a word that stands for it."""
    if dry_run:
        if options:
            print(f"\n# ── the next file, submitted with {' '.join(options)} ──\n")
        print(text, end="")
        return "JOB"
    keep_script(script, text)
    job = submit(script, options)
    print(f"submitted {job}: {script}", flush=True)
    return job


def launch_server(
    run: CheckedRun, args: argparse.Namespace, options: SlurmOptions, paths: Paths, training_job: str, said: str
) -> None:
    """Submits the side job that evaluates the run's checkpoints. Raises ConfigError where the run asks for none."""
    size, own = server_options(run, args, options)
    limit = parse_time(own.time) if own.time else None
    head = _head(f"{run.config.run.name}-evaluations", own, size, True, None, said)
    text = serve_script(run.output.absolute(), args.serve_arg, training_job, head, own, paths)
    script = next_script(paths.folder, "serve_evaluations")
    _put(script, text, args.dry_run, [f"--dependency=after:{training_job}"])
    if not args.dry_run:
        words = time_words(limit) if limit else "unlimited time"
        print(f"it evaluates each new checkpoint, for {words} at a time, until the run is complete", file=sys.stdout)


def server_options(run: CheckedRun, args: argparse.Namespace, options: SlurmOptions) -> tuple[Size, SlurmOptions]:
    """The side job's size and options. Raises ConfigError where the run has nothing for it to do."""
    wants = run.config.evaluation
    if not wants.named or wants.where != "queue":
        said = f'evaluation.where is "{wants.where}"' if wants.named else "[evaluation] names no suite and no tasks"
        raise ConfigError(
            f'--serve-evaluations: {said}: a side job would find nothing to do: set evaluation.where = "queue", and '
            "evaluation.suite or evaluation.tasks"
        )
    gpus = args.serve_gpus if args.serve_gpus is not None else int(wants.device.startswith("cuda"))
    own = dataclasses.replace(
        options,
        time=args.serve_time or options.time,
        partition=args.serve_partition or options.partition,
        cpus_per_task=args.serve_cpus or options.cpus_per_task,
        nodes=1, gpus_per_node=gpus, launcher=None, dependency=None, nodelist=None, exclusive=None, job_name=None,
        mem=None,
    )  # fmt: skip
    return Size(1, 1, 1, gpus, own.cpus_per_task), own
