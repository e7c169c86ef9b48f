"""`stagemix evaluate`: models through lm-evaluation-harness, on held-out documents or on any of its tasks."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.config.errors import EXIT_DONE, ConfigError
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.evaluation.harness import HarnessSettings, harness_version, require_harness, run_tasks
from megatron.evaluation.held_out_text import held_out_texts
from megatron.evaluation.precision import choose_dtype
from megatron.evaluation.task_files import HeldOutTask, write_held_out_tasks
from megatron.hf.checkpoint_source import is_checkpoint, open_source
from megatron.hf.export import TRAINING, export_checkpoint
from megatron.planner.ledger_files import read_ledger
from megatron.planner.resolve import validation_split
from megatron.tokenizers.load import load_tokenizer

EXAMPLE = """examples:
  stagemix evaluate --model exports/demo --suite heldout --config examples/demo/demo.toml --output evaluation.json
      for each source of the config: which of four continuations is the true one, and bits a byte, on documents
      that were held out of training; offline
  stagemix evaluate --model balanced=exports/balanced --model cooldown=runs/demo --suite heldout \\
                    --config examples/demo/demo.toml --output evaluation.json
      several models in one file, each NAME=PATH; a PATH may be an exported folder, a checkpoint or a run folder
  stagemix evaluate --model exports/demo --tasks my_task --include-path my_tasks --output evaluation.json
      task files (YAML) and data of your own, offline
  stagemix evaluate --model exports/demo --tasks arc_easy,hellaswag --online --output evaluation.json
      tasks of the harness, whose data it fetches

exit codes: 0 done, 2 unknown task or wrong options, 3 no data, 4 damaged checkpoint, 6 lm_eval is not installed"""
_HELDOUT = "heldout"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix evaluate",
        description="Evaluates one or more models through lm-evaluation-harness and writes one JSON file.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(built)
    return built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help="an exported folder, a checkpoint or a run folder; may be given more than once",
    )
    parser.add_argument("--suite", choices=[_HELDOUT], help="heldout: tasks from held-out documents of --config")
    parser.add_argument("--tasks", help="names of harness tasks, separated by commas")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task files (YAML) of your own")
    parser.add_argument("--config", type=Path, help="the run's TOML file, whose sources the heldout suite reads")
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="override a key of --config"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the results go")
    parser.add_argument("--questions", type=int, default=200, help="of each source (default: %(default)s)")
    parser.add_argument(
        "--passages", type=int, default=40_000, metavar="CHARACTERS", help="for bits a byte (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda", "cuda:1" (default: %(default)s)')
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the computation; auto: bfloat16 where the device multiplies it faster, by measurement",
    )
    parser.add_argument("--limit", type=int, help="at most so many items of a task, for a trial")
    parser.add_argument("--online", action="store_true", help="let the harness fetch data sets from the network")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    models = [_named(words) for words in args.models]
    _check(args, [name for name, _ in models])
    require_harness()
    dtype, reason = choose_dtype(args.dtype, args.device)
    print(f"computing in {dtype}: {reason}", flush=True)
    tasks, held_out, include = _tasks(args)
    settings = HarnessSettings(args.batch_size, dtype, args.device, args.limit, not args.online)
    results = [_evaluate(name, path, tasks, include, settings) for name, path in models]
    record = {
        "format": 1,
        "suite": args.suite or "tasks",
        "harness": f"lm_eval {harness_version()}",
        "dtype": dtype,
        "device": args.device,
        "seed": args.seed,
        "tasks": {task.name: {"source": task.source, "kind": task.kind, "chance": task.chance} for task in held_out},
        "models": results,
    }
    _write(args.output, record)
    print("\n".join(table(record)))
    print(f"written to {args.output}")
    return EXIT_DONE


def _named(words: str) -> tuple[str, Path]:
    name, equals, path = words.partition("=")
    if not equals:
        return Path(words).name or words, Path(words)
    return name, Path(path)


def _check(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuses wrong combinations before anything slow begins."""
    if bool(args.suite) == bool(args.tasks):
        raise ConfigError("say either --suite heldout or --tasks A,B")
    if args.suite and args.config is None:
        raise ConfigError("--suite heldout needs --config: the run's TOML file, whose sources have held-out documents")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ConfigError(f"--include-path {args.include_path}: no such folder")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two models are called {', '.join(sorted(repeated))}: give them names, --model NAME=PATH")
    for words in args.models:
        if not _named(words)[1].is_dir():
            raise ConfigError(f"--model {words}: no such folder")


def _tasks(args: argparse.Namespace) -> tuple[list[str], list[HeldOutTask], Path | None]:
    """Names of the tasks, what is known of those that were written, and where their files are."""
    if args.tasks:
        return [name.strip() for name in args.tasks.split(",") if name.strip()], [], args.include_path
    config = load_config(args.config, args.overrides)
    _check_held_out(config, [path for _, path in map(_named, args.models)])
    texts = held_out_texts(config, load_tokenizer(config.tokenizer.path))
    folder = args.output.parent / f"{args.output.stem}-tasks"
    held_out = write_held_out_tasks(folder, texts, args.questions, args.passages, args.seed)
    for task in held_out:
        print(f"{task.name}: {task.items} {'questions' if task.chance else 'passages'}", flush=True)
    return [task.name for task in held_out], held_out, folder


def _check_held_out(config: RunConfig, models: Sequence[Path]) -> None:
    """Refuses held-out documents that a model of ours has been trained on: another split's."""
    now = validation_split(config.validation)
    for path in models:
        if (then := _validation_of(path)) not in (None, now):
            raise ConfigError(
                f"--model {path}: it was trained with validation {then}, and --config says {now}: documents that it "
                f"was trained on would count as held out. Set validation.fraction to what it was"
            )


def _validation_of(path: Path) -> str | None:
    """The validation split of a checkpoint or of a folder that we exported; None for models of others."""
    if is_checkpoint(path):
        return read_ledger(path).validation
    record = path / TRAINING
    return str(json.loads(record.read_text(encoding="utf-8"))["validation"]) if record.is_file() else None


def _evaluate(
    name: str, path: Path, tasks: list[str], include: Path | None, settings: HarnessSettings
) -> dict[str, Any]:
    began = time.monotonic()
    if is_checkpoint(path):
        with tempfile.TemporaryDirectory(prefix="stagemix-export-") as scratch:
            folder = export_checkpoint(open_source(path), Path(scratch) / "model").folder
            results = run_tasks(folder, tasks, include, settings)
    else:
        results = run_tasks(path, tasks, include, settings)
    seconds = time.monotonic() - began
    print(f"{name}: evaluated in {seconds:.1f} s", flush=True)
    return {"name": name, "path": str(path), "seconds": round(seconds, 3), "results": results}


def table(record: dict[str, Any]) -> list[str]:
    """The results for the terminal: one line a model, task and metric."""
    lines = [f"{'model':<20} {'task':<28} {'metric':<16} {'value':>9}  {'± stderr':>9}  {'chance':>6}"]
    for model in record["models"]:
        for task, result in model["results"].items():
            chance = record["tasks"].get(task, {}).get("chance")
            for metric, found in result["metrics"].items():
                error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
                least = f"{chance:.2f}" if chance is not None and metric.startswith("acc") else ""
                value = f"{found['value']:.4f}" if found["value"] < 1e5 else f"{found['value']:.3g}"
                lines.append(f"{model['name']:<20} {task:<28} {metric:<16} {value:>9}  {error:>9}  {least:>6}")
    return lines


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    aside.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no infinity: a perplexity that overflows becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
