"""`stagemix study run`: trains and evaluates a study on this machine, each node once."""

from __future__ import annotations

import argparse
import signal
import time

from rich.console import Console

from megatron.commands.status_words import span
from megatron.commands.study_action import Action, planned_study
from megatron.commands.study_progress import StudyProgress
from megatron.commands.study_verified import verified_words
from megatron.commands.tables import console_for_tables
from megatron.config.errors import EXIT_CHECKPOINT, ConfigError
from megatron.config.quantities import format_count
from megatron.launch.child_process import ChildProcess
from megatron.study.damaged_checkpoints import damaged_words
from megatron.study.due_tasks import Tasks, due_tasks
from megatron.study.identity import tokenizer_identity
from megatron.study.node_config import study_folder
from megatron.study.node_evaluation import asked_nodes
from megatron.study.node_state import study_states, title
from megatron.study.plan import PlannedStudy
from megatron.study.run_nodes import Ended, NodeRunner, Outcome
from megatron.study.run_options import RunOptions, run_options
from megatron.study.slurm_nodes import refuse_living_jobs
from megatron.study.steps import TrainStep
from megatron.study.stop_asked import StopAsked
from megatron.study.study_lock import StudyLock
from megatron.study.study_record import (
    StudyRecord,
    edits_of,
    read_record,
    refuse_edits,
    unneeded_words,
    write_record,
)
from megatron.study.verification import index_building, verify

EPILOG = """\
examples:
  stagemix study run STUDY
  stagemix study run STUDY --arm text --seeds 1       # a part of it now, and the rest another time
  stagemix study run STUDY --seeds 1,2,3              # more seeds than the file says
  stagemix study run STUDY --at-once 4 --threads 2    # four nodes side by side, two threads each
  stagemix study run STUDY --report                   # and the report at the end
  stagemix study run STUDY --slurm --nodes 4 …        # as jobs of SLURM; study run --slurm --help has its options

Every node is a run of `stagemix train` in study.output/nodes/ID; study.output/logs/ID-train.log has its output. What
has a whole checkpoint at its end is not trained again; a node that was stopped or killed goes on from its newest whole
checkpoint: start the same command again, as often as you like. A node that fails leaves the others; what goes on from
it is blocked, and the next start tries again.

SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1, SIGUSR2: every node saves and stops, exit code 75; a second one ends them at
once. Where this process is killed, its nodes save and stop by themselves (Linux).

A study may be changed between starts: arms and stages that have not begun. Where the change is to what has begun, it is
refused with code 5; --edited accepts it, and what ran stays where it is.

exit codes: 0 all done · that of the first node that failed · 75 stopped, start again to go on · 5 the study was edited
after nodes ran · 2 the study cannot be carried out, or another `study run` is at work in its folder · 3 data
"""


def _arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--at-once", type=int, metavar="N", help="processes side by side; default what cores allow")
    one.add_argument(
        "--threads",
        type=int,
        metavar="T",
        help="of each process; default as the study was run before, else cores shared among its ends",
    )
    one.add_argument(
        "--processes",
        type=int,
        metavar="P",
        help="of each training node, started by torchrun; default what [parallel] names",
    )
    one.add_argument("--no-evaluation", action="store_true", help="train alone")
    one.add_argument("--report", action="store_true", help="`stagemix study report` at the end")
    one.add_argument("--edited", action="store_true", help="accept that stages which have begun are others now")
    one.add_argument(
        "--keep-going",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="begin other nodes when one has failed (default)",
    )


def _run(args: argparse.Namespace) -> int:
    planned = planned_study(args)
    console = console_for_tables()
    began = time.time()
    with StudyLock(study_folder(planned).path) as lock:
        refuse_living_jobs(study_folder(planned).path)
        before = read_record(planned)
        if not args.edited:
            refuse_edits(edits_of(planned, before), planned.study.path)
        options = run_options(
            planned,
            args.at_once,
            args.threads,
            args.processes,
            before.threads,
            seeds=tuple(args.seeds),
            evaluation=not args.no_evaluation,
            keep_going=args.keep_going,
        )
        tasks = due_tasks(planned, options.evaluation, lambda words: console.print(words, soft_wrap=True))
        check_can_train(planned, tasks)
        record = write_record(planned, before, options.threads)
        _say_what_comes(planned, tasks, options, console)
        with StudyProgress(planned, len(tasks), console) as progress:
            outcome = NodeRunner(planned, tasks, options, progress, lock).run()
        code = outcome.code
        if args.report and not outcome.signal:
            failed = _report(planned, options, args.arm, console)
            code = code or failed
        _say_how_it_ended(planned, record, outcome, console, began, options.evaluation)
    return code


def check_can_train(planned: PlannedStudy, tasks: Tasks) -> None:
    """Raises ConfigError where data or a tokenizer of a node that is to be trained are planned and not there yet."""
    missing: dict[str, None] = {}
    for task in tasks:
        step = planned.graph.nodes[task.node].step
        if task.kind != "train" or not isinstance(step, TrainStep):
            continue
        config = step.config
        if tokenizer_identity(config.tokenizer.path) is None:
            missing[f"tokenizer.path = {config.tokenizer.path!r} is not there"] = None
        for name in step.stage.weights.sources:
            if not config.sources[name].data:
                missing[f"sources.{name} has no data, only a size"] = None
    if missing:
        raise ConfigError(
            f"{planned.study.path}: can be planned and not run yet: {'; '.join(missing)}: prepare them "
            "(stagemix train_tokenizer, preprocess_data), and say sources.NAME.data"
        )


def _say_what_comes(planned: PlannedStudy, tasks: Tasks, options: RunOptions, console: Console) -> None:
    graph = planned.graph
    kinds = [task.kind for task in tasks]
    counts = [f"{kinds.count(kind)} to {kind}" for kind in ("train", "average", "evaluate") if kind in kinds]
    tokens = sum(graph.nodes[task.node].tokens for task in tasks if task.kind == "train")
    head = f"{planned.study.words.study.name}: {len(graph.nodes)} nodes"
    if not tasks:
        console.print(f"{head}, all done: nothing to do", soft_wrap=True)
        return
    size = f", {format_count(tokens)} tokens" if tokens else ""
    console.print(f"{head}; {', '.join(counts)}{size}; {options.words()}", soft_wrap=True)


def _report(planned: PlannedStudy, options: RunOptions, arms: list[str], console: Console) -> int:
    """`stagemix study report` of the same study, and its exit code."""
    folder = study_folder(planned)
    words = ["study", "report", str(planned.study.path), *(word for arm in arms for word in ("--arm", arm))]
    if options.seeds:
        words += ["--seeds", ",".join(map(str, options.seeds))]
    with StopAsked() as stop:
        child = ChildProcess(words, folder.logs / "report.log", options.threads)
        asked = 0
        while (code := child.wait(0.2)) is None:
            if stop.count > asked:
                asked = stop.count
                child.send(signal.SIGTERM)
    lines = child.last_lines()
    if code:
        console.print(f"the report failed, exit code {code} ({child.log}):", soft_wrap=True)
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)
    return code


def _say_how_it_ended(
    planned: PlannedStudy, record: StudyRecord, outcome: Outcome, console: Console, began: float, evaluation: bool
) -> None:
    graph = planned.graph
    for ended in outcome.failed:
        _say_failure(planned, ended, console)
    damaged = [one.task for one in outcome.failed if one.code == EXIT_CHECKPOINT]
    for words in damaged_words(planned, damaged):
        console.print(f"\n{words}", soft_wrap=True)
    for task, held in outcome.blocked.items():
        words = f"{title(graph, task.node)}: {task.kind} blocked by {title(graph, held.node)}"
        console.print(words, soft_wrap=True)
    states = study_states(planned)
    done = sum(state.done for state in states.values())
    for line in unneeded_words(planned, record):
        console.print(f"no arm needs it any more: {line}", soft_wrap=True)
    for line in verified_words(verify(planned, states), index_building(planned, began), " of this start"):
        console.print(line, soft_wrap=True)
    took = span(time.time() - began)
    left = len(outcome.left) + len(outcome.stopped)
    parts = [f"{done} of {len(graph.nodes)} nodes trained"]
    if asked := asked_nodes(planned) if evaluation else []:
        parts.append(f"{sum(states[name].state == 'evaluated' for name in asked)} of {len(asked)} evaluated")
    parts += [f"{len(outcome.failed)} tasks failed"] if outcome.failed else []
    parts += [f"{len(outcome.blocked)} blocked"] if outcome.blocked else []
    if outcome.signal or outcome.stopped:
        parts.append(f"stopped{f' by {outcome.signal}' if outcome.signal else ''} with {left} tasks left")
        parts.append("start the same command again to go on")
    console.print(f"{planned.study.words.study.name}: {', '.join(parts)}; {took}", style="bold", soft_wrap=True)


def _say_failure(planned: PlannedStudy, ended: Ended, console: Console) -> None:
    name = title(planned.graph, ended.task.node)
    console.print(f"\n{name}: {ended.task.kind} failed, exit code {ended.code}: {ended.reason}", soft_wrap=True)
    console.print(f"  {ended.log}:", soft_wrap=True)
    for line in ended.lines:
        console.print(f"    {line}", soft_wrap=True)


ACTION = Action(
    "Trains and evaluates the study on this machine, each node once; goes on where it was.", EPILOG, _arguments, _run
)
