"""`stagemix requeue`: whether a batch job whose run has ended is put back in SLURM's queue, and on which nodes not."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import EXIT_DONE, ConfigError
from megatron.launch.attempts import Attempt, read_attempts, read_exit, reason_words
from megatron.launch.bad_nodes import (
    BAD_NODES,
    DAYS,
    EXCLUDE_AFTER,
    BadNodes,
    NodeFailure,
    affordable,
    read_bad_nodes,
    set_aside_damaged,
    write_bad_nodes,
)
from megatron.launch.hardware_errors import hardware_error_in
from megatron.launch.requeue_decision import CAUSES, Decision, Ended, blamed, decide
from megatron.launch.requeue_facts import how_it_ended, newest_step, obstacle, past_of, trains_now, write_requeue
from megatron.launch.slurm_control import (
    ControlError,
    Controller,
    JobFacts,
    job_name,
    nodes_of_hosts,
    stand_fast,
    this_job,
)

EPILOG = """\
The last line of a batch script. It reads how this job's attempt ended (OUTPUT/exit.json, attempts.jsonl; where it was
killed and left no record, CODE, srun's exit code), says in one line what follows and why, and either puts the job back
in the queue, under the same id, or ends with the run's exit code:

  75, asked to stop by a signal or at the end of its time   requeued (not where OUTPUT/stop-now asked)
  9, 10, a failing disk or GPU, a kill without a record     requeued while attempts get on to later checkpoints
  1 to 8, a full disk, 130                                  not requeued: the same would come again
  a job that was cancelled (scancel)                        not requeued

Hosts that failures speak of are counted in OUTPUT/bad_nodes.json; from --exclude-after failures on, at once for an
uncorrectable memory error, the job does not get them any more (ExcNodeList, besides those that you excluded), as long
as enough nodes are left for it. They are used again after --days, or after --forgive.

examples:
  srun stagemix train run.toml & wait $!; stagemix requeue runs/mine --code $?
  stagemix requeue runs/mine --dry-run                 # what would be done, and why
  stagemix requeue runs/mine --forgive gpu-a017        # it was repaired

exit codes: 0 requeued, or the run is complete; else that of the run (docs/exit-codes.md); 2 a wrong command line,
or the run trains at this moment"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix requeue",
        description="Puts the SLURM job that it runs in back in the queue, where that is of use.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument("output", metavar="OUTPUT", type=Path, help="the run's folder (run.output)")
    built.add_argument("--code", type=int, metavar="N", help="exit code of the launcher (srun, torchrun)")
    built.add_argument(
        "--without-progress",
        type=_positive,
        default=3,
        metavar="N",
        help="give up after so many failures in a row without a later checkpoint (default 3)",
    )
    built.add_argument("--max-requeues", type=_count, metavar="N", help="restarts of one job at most (default: any)")
    built.add_argument(
        "--exclude-after",
        type=_positive,
        default=EXCLUDE_AFTER,
        metavar="N",
        help=f"leave a node out after so many failures (default {EXCLUDE_AFTER})",
    )
    built.add_argument(
        "--days",
        type=_days,
        default=DAYS,
        metavar="D",
        help=f"failures of nodes are forgotten after so many days (default {DAYS:g})",
    )
    built.add_argument(
        "--forgive", action="append", default=[], metavar="HOST", help="forget a node's failures; does nothing else"
    )
    built.add_argument("--dry-run", action="store_true", help="say what would be done; write and change nothing")
    return built


@dataclass
class _Case:
    """What is decided upon, and what is known of the job. facts, nodes: of SLURM; None, {} where it cannot be asked."""

    output: Path
    job: dict[str, Any]
    ended: Ended
    attempt: Attempt | None
    decision: Decision
    bad: BadNodes
    facts: JobFacts | None = None
    controller: Controller | None = None


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    if args.forgive:
        return _forgive(args)
    job = this_job()
    if job:
        stand_fast()
    attempts, record = read_attempts(args.output), read_exit(args.output)
    if args.code is None and not attempts and record is None:
        raise ConfigError(
            f"{args.output}: holds no record of an attempt (attempts.jsonl, exit.json), and --code is not given: name "
            "the folder that run.output names, or give the exit code that the launcher ended with"
        )
    if trains := trains_now(args.output, attempts, record, job, args.code, time.time()):
        raise ConfigError(
            f"{args.output}: {trains}: nothing is decided while a run trains: call it when the run has ended, at the "
            "end of its own batch script"
        )
    ended, attempt = how_it_ended(attempts, record, job, args.code)
    past = past_of(attempts, job, newest_step(args.output))
    decision = decide(ended, past, args.without_progress, args.max_requeues)
    case = _Case(args.output, job, ended, attempt, decision, _known_nodes(args.output, args.dry_run))
    if decision.cause != "complete":
        _count_suspects(case, args)
    if not job:
        return _outside(case, args)
    return _inside(case, args)


def _inside(case: _Case, args: argparse.Namespace) -> int:
    """Carries the decision out, in a job. All is said and written before the job ends."""
    decision = case.decision
    case.controller = Controller(job_name(case.job))
    already, why_not = False, ""
    if decision.requeue:
        try:
            case.facts = case.controller.facts()
            already, why_not = obstacle(case.facts, int(case.job.get("restarts", 0)))
        except ControlError as error:
            _note(f"SLURM cannot be asked about this job: {error}")
    hosts, changed = _exclusions(case, args) if decision.requeue and not why_not else ([], False)
    again = decision.requeue and not why_not
    why = f"{decision.why}; {why_not}" if why_not else decision.why
    would = "would be " if args.dry_run else ""
    verdict = f"{would}requeued" if again else "not requeued"
    print(f"job {case.controller.name} {verdict}{' by SLURM itself' if already else ''}: {why}", flush=True)
    if again and hosts:
        print(f"nodes that it {'would' if args.dry_run else 'will'} not get: {', '.join(hosts)}", flush=True)
    if args.dry_run:
        return EXIT_DONE if again else decision.exit_code
    _write(case, args, again, why, hosts)
    sys.stderr.flush()
    if not again:
        return decision.exit_code
    try:
        if not already:
            case.controller.requeue()
    except ControlError as error:
        why = f"{why}; SLURM refused to requeue it: {error}: submit it again yourself"
        print(f"job {case.controller.name} not requeued: {why}", flush=True)
        _write(case, args, False, why, [])
        return decision.exit_code
    if changed:
        _exclude(case.controller, hosts)
    return EXIT_DONE


def _outside(case: _Case, args: argparse.Namespace) -> int:
    """Says what would be done in a job."""
    decision = case.decision
    verdict = "not in a SLURM job, in which it would be requeued" if decision.requeue else "not requeued"
    print(f"{case.output}: {verdict}: {decision.why}")
    if decision.requeue:
        print("start the same command again to go on")
    if left_out := case.bad.excluded(args.exclude_after):
        print(f"nodes to leave out: {', '.join(left_out)} (sbatch --exclude={','.join(left_out)})")
    return decision.exit_code


def _known_nodes(output: Path, dry_run: bool) -> BadNodes:
    """What is known of nodes. A damaged file must not keep a job from going on: it is set aside, and said so."""
    try:
        return read_bad_nodes(output)
    except ConfigError as error:
        if dry_run:
            _note(f"{error}")
            return BadNodes()
        try:
            _note(f"{error}. It is now {set_aside_damaged(output)}, and a new one is begun")
        except OSError as second:
            _note(f"{error}. It could not be set aside: {second.strerror}")
        return BadNodes()


def _count_suspects(case: _Case, args: argparse.Namespace) -> None:
    """Counts the failure against the hosts that it speaks of, and forgets what is old."""
    now = time.time()
    for host in case.bad.forget(now, args.days):
        _note(f"{host}: its failures are more than {args.days:g} days old, and forgotten")
    hosts = blamed(case.ended)
    if not hosts or case.attempt is None:
        return
    began = case.attempt.start or case.attempt.launch
    of_job = set(began.hosts) if began else set()
    if len(of_job) > 1 and of_job <= set(hosts):
        _note("every host of the job looks bad: more likely the network or a shared disk: none of them is counted")
        return
    said = hardware_error_in(case.ended.reason)
    what = said.what if said else CAUSES[case.decision.cause].what
    reason = f"{what}: {reason_words(case.ended.reason, 200)}"
    at_once = said is not None and said.at_once
    for host in hosts:
        failure = NodeFailure(now, case.attempt.number, case.ended.code or 0, reason, at_once)
        case.bad.note(host, failure)
        _note(f"{host} is suspected: {what}; failures counted: {len(case.bad.suspected[host])}")


def _exclusions(case: _Case, args: argparse.Namespace) -> tuple[list[str], bool]:
    """The job's new ExcNodeList, and whether it differs from the one that it has.

    Those that the user excluded stay; those that we added before, and are forgotten or forgiven by now, go.
    """
    controller, facts = case.controller, case.facts
    assert controller is not None
    wanted = case.bad.excluded(args.exclude_after)
    if facts is None:
        return [], False
    before = case.bad.given.get(controller.name, [])
    if not wanted and not before:
        return [], False
    try:
        current, required = controller.expand(facts.excluded), controller.expand(facts.required)
        nodes = controller.usable_nodes(facts.partitions)
    except ControlError as error:
        _note(f"no node is excluded, as SLURM cannot be asked about nodes: {error}")
        return [], False
    users = [host for host in current if host not in before]
    names, unknown = nodes_of_hosts(wanted, {**nodes, **{host: host for host in current}})
    for host in unknown:
        _note(f"{host}: SLURM has no node of this name that could be given out, or several: it is not excluded")
    ours = affordable([name for name in names if name not in users], set(nodes) - set(users), facts.nodes, required)
    for name in names:
        if name not in ours and name not in users:
            _note(
                f"{name} is not excluded: the job needs {facts.nodes} nodes "
                + ("and asks for it by name" if name in required else "and too few others are left")
            )
    case.bad.given = {controller.name: ours} if ours else {}
    hosts = [*users, *ours]
    return hosts, set(hosts) != set(current)


def _write(case: _Case, args: argparse.Namespace, again: bool, why: str, hosts: list[str]) -> None:
    """Records the decision, and the nodes. A disk that takes no record must not keep the job from going on."""
    if not case.output.is_dir():
        return
    record: Mapping[str, Any] = {
        "time": time.time(),
        "attempt": case.attempt.number if case.attempt else 0,
        "requeue": again,
        "cause": case.decision.cause,
        "why": why,
        "code": case.decision.exit_code,
        "job": case.job,
        "exclude": hosts,
    }
    try:
        if case.bad.suspected or case.bad.given or (case.output / BAD_NODES).exists():
            write_bad_nodes(case.output, case.bad, args.exclude_after, args.days)
        write_requeue(case.output, record)
    except OSError as error:
        _note(f"{case.output}: the decision could not be recorded: {error.strerror or error}")


def _exclude(controller: Controller, hosts: list[str]) -> None:
    """Sets the nodes that the job must not get, now that it waits; it does so for some seconds at least."""
    for pause in (0.2, 1.0, 3.0, None):
        try:
            controller.exclude(hosts)
        except ControlError as error:
            if pause is None:
                _note(f"nodes could not be excluded: {error}")
            else:
                time.sleep(pause)
        else:
            return


def _forgive(args: argparse.Namespace) -> int:
    nodes = read_bad_nodes(args.output)
    for host in args.forgive:
        nodes.forgive(host)
    if not args.dry_run:
        write_bad_nodes(args.output, nodes, args.exclude_after, args.days)
    left = ", ".join(nodes.excluded(args.exclude_after)) or "none"
    print(f"{', '.join(args.forgive)}: forgiven from the next start on; nodes still left out: {left}")
    return EXIT_DONE


def _note(words: str) -> None:
    print(f"note: {words}", file=sys.stderr, flush=True)


def _positive(words: str) -> int:
    if (number := _count(words)) < 1:
        raise argparse.ArgumentTypeError(f"{words} is less than 1")
    return number


def _count(words: str) -> int:
    if not words.isdecimal():
        raise argparse.ArgumentTypeError(f"{words!r} is not a whole number from 0 on")
    return int(words)


def _days(words: str) -> float:
    try:
        days = float(words)
    except ValueError:
        days = -1.0
    if not 0 < days < 36525:
        raise argparse.ArgumentTypeError(f"{words!r} is not a number of days above 0")
    return days
