"""The options of `stagemix evaluate`, and what is refused before anything slow begins."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.commands.evaluated_model import check_models, named_model
from megatron.config.errors import ConfigError
from megatron.evaluation.paired import RESAMPLES
from megatron.evaluation.program_tasks import ProgramSettings
from megatron.evaluation.sandbox import SandboxLimits

HELDOUT = "heldout"
EXAMPLE = """examples:
  stagemix evaluate --model exports/demo --suite heldout --config examples/demo/demo.toml --output evaluation.json
      for each source of the config: which of four continuations is the true one, and bits a byte, on documents
      that were held out of training; offline
  stagemix evaluate --model balanced=exports/balanced --model cooldown=runs/demo --suite heldout \\
                    --config examples/demo/demo.toml --output evaluation.json --compare balanced cooldown
      several models in one file, each NAME=PATH; a PATH may be an exported folder, a checkpoint or a run folder
  stagemix evaluate --model exports/demo --suite code-vs-text --data benchmarks-data --allow-code-execution \\
                    --samples 20 --temperature 0.2 --output evaluation.json
      reasoning, knowledge and code from local files; --tasks-of code-vs-text lists the files
  stagemix evaluate --model exports/demo --suite stage-study --data benchmarks-data --tasks logic,cosqa --output e.json
      two tasks of a suite
  stagemix evaluate --model exports/demo --tasks my_task --include-path my_tasks --output evaluation.json
      task files (YAML) and data of your own, offline
  stagemix evaluate --model exports/demo --tasks arc_easy,hellaswag --online --output evaluation.json
      tasks of the harness, whose data it fetches
  stagemix evaluate --serve runs/demo
      a side job for a run with evaluation.where = "queue": evaluates the checkpoints that it asks for until the run is
      complete; several may serve one run. With --once, what waits now

exit codes: 0 done, 2 unknown task, wrong options, or code that may not run, 3 no data or data that are wrong,
4 damaged checkpoint, 6 lm_eval is not installed, or no walls for programs, 75 a server was stopped by a signal"""


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
        default=[],
        metavar="[NAME=]PATH",
        help="an exported folder, a checkpoint or a run folder; may be given more than once",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where the results go")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="afterwards, compare these two models item by item"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1" (default: cpu; with --serve what the run says)')
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the computation; auto: what the device multiplies faster now. Say one where results are compared",
    )
    parser.add_argument("--seed", type=int, default=0, help="of questions, samples, resamples (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many items of a task, for a trial")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep exported checkpoints here, found again by their content"
    )
    parser.add_argument("--ends-with-stdin", action="store_true", help=argparse.SUPPRESS)
    _add_serving(parser)
    _add_tasks(parser)
    _add_heldout(parser)
    _add_programs(parser)


def _add_serving(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_argument_group("for a run that trains")
    serving.add_argument(
        "--serve",
        type=Path,
        metavar="OUTPUT",
        help="evaluate the checkpoints that the run in this folder asks for, as it asks; of the other options --device "
        "and --allow-code-execution count",
    )
    serving.add_argument("--once", action="store_true", help="--serve: end when nothing waits any more")


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group("which tasks")
    tasks.add_argument(
        "--suite",
        metavar="NAME",
        help="heldout (of --config's sources), code-vs-text, stage-study, or a suite file of your own, FILE.toml",
    )
    tasks.add_argument("--tasks", help="names of harness tasks, or of a suite's tasks or groups, separated by commas")
    tasks.add_argument("--tasks-of", metavar="SUITE", help="list a suite's tasks and data files, and do nothing else")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="folder with task files (YAML) of your own")
    tasks.add_argument("--data", type=Path, metavar="DIR", help="folder with a suite's data files (JSON lines)")
    tasks.add_argument("--online", action="store_true", help="let the harness fetch data sets from the network")
    tasks.add_argument(
        "--skip-missing",
        action="store_true",
        help="run a suite's tasks that have data, and say that others are missing",
    )
    tasks.add_argument(
        "--trust-task-code", action="store_true", help="run the Python code that files of --include-path name"
    )


def _add_heldout(parser: argparse.ArgumentParser) -> None:
    heldout = parser.add_argument_group("the suite heldout")
    heldout.add_argument("--config", type=Path, help="the run's TOML file, whose sources it reads")
    heldout.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="override a key of --config"
    )
    heldout.add_argument(
        "--source",
        dest="sources",
        metavar="NAME",
        action="append",
        default=[],
        help="only this source of --config; may be given again (default: all that have enough held-out documents)",
    )
    heldout.add_argument("--questions", type=int, default=200, help="of each source (default: %(default)s)")
    heldout.add_argument(
        "--passages", type=int, default=40_000, metavar="CHARACTERS", help="for bits a byte (default: %(default)s)"
    )


def _add_programs(parser: argparse.ArgumentParser) -> None:
    programs = parser.add_argument_group("code tasks")
    programs.add_argument(
        "--allow-code-execution", action="store_true", help="run programs that the model writes, each behind walls"
    )
    programs.add_argument("--samples", type=int, default=1, help="of each problem (default: %(default)s)")
    programs.add_argument("--pass-at", default="1", metavar="K,…", help="the k of pass@k (default: %(default)s)")
    programs.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token each time (default: %(default)s)"
    )
    programs.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling (default: %(default)s)")
    programs.add_argument("--max-new-tokens", type=int, help="of an answer; default: what the suite says")
    programs.add_argument(
        "--program-seconds", type=int, default=5, help="processor time of one program (default: %(default)s)"
    )
    programs.add_argument(
        "--program-memory", type=int, default=1024, metavar="MIB", help="of one program (default: %(default)s)"
    )
    programs.add_argument("--jobs", type=int, default=1, help="programs that run at a time (default: %(default)s)")
    programs.add_argument("--resamples", type=int, default=RESAMPLES, help=argparse.SUPPRESS)


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for wrong combinations."""
    if not args.models:
        raise ConfigError("say which model: --model [NAME=]PATH")
    if args.output is None:
        raise ConfigError("say where the results go: --output FILE.json")
    if not args.suite and not args.tasks:
        raise ConfigError("say --suite NAME, or --tasks A,B")
    if args.suite == HELDOUT and args.config is None:
        raise ConfigError("--suite heldout needs --config: the run's TOML file, whose sources have held-out documents")
    if args.suite == HELDOUT and args.tasks:
        raise ConfigError("--suite heldout runs a task a source: leave --tasks out")
    if args.sources and args.suite != HELDOUT:
        raise ConfigError("--source names sources of --suite heldout: leave it out, or say --suite heldout")
    if args.suite and args.include_path is not None:
        raise ConfigError("--include-path is for --tasks of your own: leave it or --suite out")
    if args.data is not None and not args.suite:
        raise ConfigError("--data holds the files of a suite: say which, --suite NAME")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ConfigError(f"--include-path {args.include_path}: no such folder")
    for option in ("batch_size", "samples", "jobs", "program_seconds", "program_memory", "questions", "resamples"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {getattr(args, option)}: at least 1")
    for option in ("limit", "max_new_tokens"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {getattr(args, option)}: at least 1")
    check_models(args.models)
    names = [named_model(words)[0] for words in args.models]
    for name in args.compare or ():
        if name not in names:
            raise ConfigError(f"--compare {name}: no --model of that name; there are {', '.join(names)}")


def program_settings(args: argparse.Namespace) -> ProgramSettings:
    """How code tasks are sampled and run. Raises ConfigError for figures that contradict each other."""
    try:
        at = tuple(dict.fromkeys(int(word) for word in args.pass_at.split(",")))
    except ValueError:
        raise ConfigError(f"--pass-at {args.pass_at}: whole numbers, separated by commas") from None
    if not at or min(at) < 1 or max(at) > args.samples:
        raise ConfigError(f"--pass-at {args.pass_at}: each between 1 and --samples, which is {args.samples}")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ConfigError(f"--temperature {args.temperature}, --top-p {args.top_p}: at least 0; above 0, at most 1")
    if args.samples > 1 and args.temperature == 0:
        raise ConfigError("--samples above 1 are all the same at --temperature 0: say, for example, --temperature 0.2")
    return ProgramSettings(
        samples=args.samples,
        at=at,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        limits=SandboxLimits(args.program_seconds, args.program_memory << 20),
        jobs=args.jobs,
    )
