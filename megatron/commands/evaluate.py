"""`stagemix evaluate`: models through lm-evaluation-harness, on held-out documents, suites, or any of its tasks."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.commands.compare import print_comparison
from megatron.commands.evaluate_arguments import HELDOUT, check, parser, program_settings
from megatron.commands.evaluated_model import model_folder, named_model
from megatron.commands.serve_evaluations import serve
from megatron.config.errors import EXIT_DONE, ConfigError, StagemixError
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.evaluation.harness import HarnessSettings, harness_version, load_model, require_harness, run_tasks
from megatron.evaluation.held_out_text import held_out_texts
from megatron.evaluation.precision import choose_dtype
from megatron.evaluation.program_tasks import ProgramSettings
from megatron.evaluation.results import FORMAT, group_means, merge_records, table, write_record
from megatron.evaluation.suite import Suite, read_suite
from megatron.evaluation.suite_run import ReadySuite, prepare_suite, run_suite, suite_words
from megatron.evaluation.task_files import write_held_out_tasks
from megatron.hf.checkpoint_source import is_checkpoint
from megatron.hf.export import TRAINING
from megatron.launch.side_process import end_with_starter
from megatron.planner.ledger_files import NoLedgerError, read_ledger
from megatron.planner.resolve import validation_split
from megatron.tokenizers.load import load_tokenizer

__all__ = ["main", "parser"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    if args.ends_with_stdin:
        end_with_starter()
    if args.serve:
        return serve(args)
    args.device = args.device or "cpu"
    if args.tasks_of:
        print("\n".join(suite_words(read_suite(args.tasks_of), args.data)))
        return EXIT_DONE
    check(args)
    programs = program_settings(args)
    suite = _suite(args)
    require_harness()
    with tempfile.TemporaryDirectory(prefix="stagemix-tasks-") as scratch:
        ready = _ready(suite, Path(scratch), args) if suite else None
        left_out: dict[str, str] = {}
        tasks, about, include = _tasks(args, ready, left_out)
        dtype, reason = choose_dtype(args.dtype, args.device)
        print(f"computing in {dtype}: {reason}", flush=True)
        settings = HarnessSettings(
            args.batch_size, dtype, args.device, args.limit, not args.online, trust_task_code=args.trust_task_code
        )
        run = _Run(tasks, about, include, ready, settings, programs, args)
        head = {**_head(args, dtype, ready, programs), "tasks": about}
        if left_out:
            head["left_out"] = left_out
        record = run.every_model(head)
    write_record(args.output, record)
    print("\n".join(table(record)))
    print(f"written to {args.output}")
    if args.compare:
        first, second = args.compare
        print_comparison(merge_records([args.output]), first, second, args.resamples, args.seed)
    return EXIT_DONE


class _Run:
    """What is asked of every model."""

    def __init__(
        self,
        tasks: Sequence[str],
        about: Mapping[str, Mapping[str, Any]],
        include: Path | None,
        ready: ReadySuite | None,
        settings: HarnessSettings,
        programs: ProgramSettings,
        args: argparse.Namespace,
    ) -> None:
        self.tasks, self.about, self.include = tasks, about, include
        self.ready, self.settings, self.programs, self.args = ready, settings, programs, args

    def every_model(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """The whole record. Where a later model cannot be evaluated, those before it are written, and that is said."""
        results: list[dict[str, Any]] = []
        for words in self.args.models:
            try:
                results.append(self.evaluate(*named_model(words)))
            except StagemixError:
                if results:
                    write_record(self.args.output, {**head, "models": results})
                    done = ", ".join(result["name"] for result in results)
                    print(f"{named_model(words)[0]} failed; written to {self.args.output}: {done} only", flush=True)
                raise
        return {**head, "models": results}

    def evaluate(self, name: str, path: Path) -> dict[str, Any]:
        """The model's entry in the record."""
        began = time.monotonic()
        with model_folder(path, self.args.cache) as folder:
            model = load_model(folder, self.settings)
            if self.ready is None:
                results = run_tasks(model, self.tasks, self.include, self.settings)
            else:
                samples = self.args.output.parent / f"{self.args.output.stem}-samples" / _file_name(name)
                results = run_suite(self.ready, model, self.settings, self.programs, samples)
        seconds = time.monotonic() - began
        print(f"{name}: evaluated in {seconds:.1f} s", flush=True)
        entry = {"name": name, "path": str(path), "seconds": round(seconds, 3), "results": results}
        if self.ready is not None:
            entry["groups"] = group_means(results, self.about)
        return entry


def _suite(args: argparse.Namespace) -> Suite | None:
    if not args.suite or args.suite == HELDOUT:
        return None
    suite = read_suite(args.suite).select(_names(args.tasks))
    if args.max_new_tokens is None:
        return suite
    changed = [
        task.model_copy(update={"max_new_tokens": args.max_new_tokens}) if task.kind == "program" else task
        for task in suite.tasks
    ]
    return Suite(suite.name, suite.title, tuple(changed))


def _ready(suite: Suite, scratch: Path, args: argparse.Namespace) -> ReadySuite:
    ready = prepare_suite(
        suite, scratch, args.data, args.online, args.skip_missing, args.allow_code_execution, args.limit
    )
    if ready.walls:
        print(f"programs of the models run behind {', '.join(ready.walls)}", flush=True)
    if ready.missing:
        print(f"no data, so not run: {', '.join(ready.missing)}", flush=True)
    return ready


def _names(words: str | None) -> list[str]:
    return [name.strip() for name in (words or "").split(",") if name.strip()]


def _file_name(name: str) -> str:
    return "".join(mark if mark.isalnum() or mark in "-_." else "_" for mark in name).lstrip(".") or "model"


def _head(args: argparse.Namespace, dtype: str, ready: ReadySuite | None, programs: ProgramSettings) -> dict[str, Any]:
    head = {
        "format": FORMAT,
        "suite": ready.suite.name if ready else args.suite or "tasks",
        "harness": f"lm_eval {harness_version()}",
        "dtype": dtype,
        "device": args.device,
        "seed": args.seed,
        "limit": args.limit,
    }
    if ready is not None:
        head["missing"] = list(ready.missing)
        if ready.problems:
            head["programs"] = {**asdict(programs), "at": list(programs.at), "walls": list(ready.walls)}
    return head


def _tasks(
    args: argparse.Namespace, ready: ReadySuite | None, left_out: dict[str, str]
) -> tuple[list[str], dict[str, dict[str, Any]], Path | None]:
    """Names of the tasks, what is known of them, and where their files are. left_out: receives sources of heldout that
    cannot be asked about, with why."""
    if ready is not None:
        return ready.harness_tasks, ready.described(), ready.folder
    if args.tasks:
        names = _names(args.tasks)
        if not names:
            raise ConfigError(f"--tasks {args.tasks!r} names no task")
        return names, {}, args.include_path
    config = _with_sources(load_config(args.config, args.overrides), args.sources)
    _check_held_out(config, [path for _, path in map(named_model, args.models)])
    texts = held_out_texts(config, load_tokenizer(config.tokenizer.path))
    folder = args.output.parent / f"{args.output.stem}-tasks"
    # a source that was named is wanted; of all sources those that can be asked about are
    refused = None if args.sources else left_out
    held_out = write_held_out_tasks(folder, texts, args.questions, args.passages, args.seed, refused)
    for source in config.sources if refused is not None else ():
        if source not in texts:
            left_out.setdefault(source, f"source {source}: no held-out documents")
    for why in left_out.values():
        print(f"not asked about: {why}", flush=True)
    for task in held_out:
        print(f"{task.name}: {task.items} {'questions' if task.chance else 'passages'}", flush=True)
    about = {task.name: {"source": task.source, "kind": task.kind, "chance": task.chance} for task in held_out}
    return [task.name for task in held_out], about, folder


def _with_sources(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The config with these sources alone; all where none is named. Raises ConfigError for others."""
    for name in names:
        if name not in config.sources:
            raise ConfigError(f"--source {name}: no source of --config; it has {', '.join(config.sources)}")
    chosen = {name: section for name, section in config.sources.items() if not names or name in names}
    return config.model_copy(update={"sources": chosen})


def _check_held_out(config: RunConfig, models: Sequence[Path]) -> None:
    """Refuses held-out documents that a model of ours has been trained on: another split's."""
    now = validation_split(config.validation)
    for path in models:
        if (then := validation_of(path)) not in (None, now):
            raise ConfigError(
                f"--model {path}: it was trained with validation {then}, and --config says {now}: documents that it "
                f"was trained on would count as held out. Set validation.fraction to what it was"
            )


def validation_of(path: Path) -> str | None:
    """The validation split of a checkpoint or of a folder that we exported; None for models of others."""
    if is_checkpoint(path):
        try:
            return read_ledger(path).validation
        except NoLedgerError:
            return None
    record = path / TRAINING
    return str(json.loads(record.read_text(encoding="utf-8"))["validation"]) if record.is_file() else None
