"""`stagemix study run STUDY --slurm`: a study as jobs that wait for each other."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.commands.launch_nodes import left_out
from megatron.commands.launch_places import sized, time_limit
from megatron.commands.launch_slurm_arguments import add_options, said_options
from megatron.commands.study_action import choice_arguments, planned_study
from megatron.commands.study_slurm_scripts import StudyScripts
from megatron.config.errors import EXIT_DONE, ConfigError, StagemixError, UnavailableError
from megatron.launch.attempts import read_attempts
from megatron.launch.living_run import living_process
from megatron.launch.run_queue import ListedJob, my_jobs
from megatron.launch.slurm_control import ControlError, cancel_jobs, job_name
from megatron.launch.slurm_options import SlurmOptions, read_site
from megatron.launch.slurm_submit import keep_script, require_sbatch, submit
from megatron.launch.slurm_words import check_dependency
from megatron.study.due_tasks import Task as Due
from megatron.study.due_tasks import due_tasks
from megatron.study.node_config import node_folder, study_folder, write_node
from megatron.study.node_evaluation import asked_nodes
from megatron.study.node_state import title
from megatron.study.plan import PlannedStudy
from megatron.study.slurm_nodes import (
    JobKey,
    JobPlan,
    NeededJob,
    Wanted,
    living_jobs,
    note_job,
    plan_jobs,
    trainers_by_hand,
)
from megatron.study.slurm_section import over_site
from megatron.study.study_lock import StudyLock
from megatron.study.study_record import edits_of, read_record, refuse_edits, write_record

EPILOG = """\
One job for each node that is not done: a training node's is what `stagemix launch_slurm` would submit for it, so that
it is stopped in time, requeued and kept off bad nodes as any run. It begins when what the node goes on from is trained
(--dependency=afterok); a job that was put back in the queue counts as not yet done. A node that fails takes those that
go on from it with it (--kill-on-invalid-dep=yes), and no others. Averages are jobs of one process, so are evaluations,
one after each node that [results] asks about, and the report, when all others have ended.

The same command again submits what is missing: jobs that wait or run are recognised by their comment, nodes that are
done are passed over, nodes that failed are tried again from their newest checkpoint.

Options of jobs are those of launch_slurm: on this line, in the study's table [slurm], or in --site's file, the first
that says something. [slurm.evaluate], [slurm.average] and [slurm.report] say other things for those.

examples:
  stagemix study run STUDY --slurm --nodes 4 --site ~/cluster.toml --dry-run     # jobs, what they wait for, GPU-hours
  stagemix study run STUDY --slurm --nodes 4 --gpus-per-node 8 --time 24:00:00
  stagemix study run STUDY --slurm --site ~/cluster.toml --at-once 2             # two nodes train at a time at most
  stagemix study run STUDY --slurm --nodes 1 --cpu --tasks-per-node 4 --time 60
  stagemix study run STUDY --slurm --cancel                                      # every job of the study

exit codes: 0 submitted, shown, or nothing to do; 2 the study, an option or a layout that cannot be carried out,
sbatch's refusal, or a node that trains elsewhere; 3 data; 5 the study was edited after nodes ran; 6 no SLURM here, or
it does not answer; 74 the study's folder cannot be written"""


def parser() -> argparse.ArgumentParser:
    """The command line behind `study run`."""
    built = argparse.ArgumentParser(
        prog="stagemix study run",
        usage="%(prog)s STUDY --slurm --nodes N --gpus-per-node G --time T [OPTIONS]",
        description="Submits a study to SLURM: a job for each node, which waits for what it goes on from.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built.add_argument("study", metavar="STUDY", type=Path, help="the study's TOML file (see examples/studies/)")
    built.add_argument("--slurm", action="store_true", help="as jobs of SLURM, not here")
    choice_arguments(built)
    built.add_argument("--dry-run", action="store_true", help="show the jobs in order; write and submit nothing")
    built.add_argument("--cancel", action="store_true", help="cancel the study's jobs, and submit none")
    built.add_argument("--at-once", type=int, metavar="N", help="so many nodes train at a time at most (default: any)")
    built.add_argument("--no-evaluation", action="store_true", help="submit no evaluations and no report")
    built.add_argument("--edited", action="store_true", help="accept that stages which ran are others now")
    built.add_argument("--hardware", metavar="NAME", help="for GPU-hours (default: --gpu-type, where it is known)")
    built.add_argument("--site", type=Path, metavar="FILE", help="TOML file with a cluster's defaults of these options")
    built.add_argument("--cpu", action="store_true", help="no GPUs: processes of --tasks-per-node, by gloo")
    add_options(built, hidden=("array", "job_name"))  # read, to be refused with words
    return built


def submit_study(argv: Sequence[str]) -> int:
    """Runs the command and gives its exit code. argv: what stands behind `study run`."""
    args = parser().parse_args(argv)
    planned = planned_study(args)
    if args.cancel:
        return _cancel(planned, args.dry_run)
    options = said_options(args, over_site(planned.study.words.slurm, read_site(args.site) if args.site else {}))
    _check(args, options)
    scripts = StudyScripts(
        planned,
        options,
        sized(options, args.cpu),
        said=f"stagemix study run {' '.join(map(shlex.quote, argv))}",
        dry_run=args.dry_run,
        choice=_choice(args),
        seeds=_seeds(args),
    )
    time_limit(options)
    if args.dry_run:
        return _dry_run(planned, scripts, args)
    require_sbatch()
    folder = study_folder(planned).path
    with StudyLock(folder, "study run --slurm"):
        record = read_record(planned)
        if not args.edited:
            refuse_edits(edits_of(planned, record), args.study)
        plan = _plan(planned, args, _listed())
        # whatever is refused is refused before anything is submitted
        _excluding(scripts, planned)
        texts = {job.key: scripts.text_of(job.key) for job in plan.jobs}
        for note in scripts.notes:
            _note(note)
        write_record(planned, record)
        _cancel_stale(plan)
        ids = _submit_all(planned, scripts, plan, texts)
    _tell(planned, plan, ids)
    return EXIT_DONE


def _check(args: argparse.Namespace, options: SlurmOptions) -> None:
    """Raises ConfigError for options that have no sense for a study."""
    if args.at_once is not None and args.at_once < 1:
        raise ConfigError(f"--at-once {args.at_once}: at least 1")
    if options.array:
        raise ConfigError(f"--array {options.array}: the jobs of a study are no array: leave it out")
    if options.job_name:
        raise ConfigError(f"--job-name {options.job_name}: each job is called by its node: leave it out")
    if options.dependency and ("singleton" in options.dependency or "?" in options.dependency):
        raise ConfigError(
            f"--dependency {options.dependency}: the study's own come besides it: name jobs, with commas, for example "
            "afterok:1234"
        )


def _choice(args: argparse.Namespace) -> list[str]:
    return [*(word for arm in args.arm for word in ("--arm", arm)), *_seeds(args)]


def _seeds(args: argparse.Namespace) -> list[str]:
    return ["--seeds", ",".join(map(str, args.seeds))] if args.seeds else []


def _listed() -> list[ListedJob]:
    """Raises UnavailableError."""
    try:
        return my_jobs()
    except ControlError as error:
        raise UnavailableError(
            f"SLURM cannot be asked which jobs of the study wait or run: {error}. Nothing is submitted, since it might "
            "be for the second time: try again when it answers"
        ) from None


def _plan(planned: PlannedStudy, args: argparse.Namespace, listed: Sequence[ListedJob]) -> JobPlan:
    """What is to be submitted. Raises ConfigError where a node trains that no job of SLURM trains."""
    # SLURM was asked before: what ends between the two questions is there in the answers of both, and not submitted
    due = _due(planned, args)
    nodes = {name: _wanted(planned, name, due) for name in planned.graph.nodes}
    folder = study_folder(planned)
    living = trainers_by_hand(folder, [name for name, node in nodes.items() if not node.done], listed)
    living |= living_jobs(folder.path, listed)
    plan = plan_jobs(nodes, living, args.at_once, not args.no_evaluation)
    known = {job.id for job in listed}
    for job in plan.jobs:
        name, task = job.key
        if task == "train":
            _refuse_second_trainer(planned, name, known)
    return plan


def _due(planned: PlannedStudy, args: argparse.Namespace) -> Mapping[Due, tuple[Due, ...]]:
    """Raises ConfigError, DataError for what cannot be evaluated as [results] says; in a dry run that is a note, since
    a study may be shown before its data are there."""
    try:
        return due_tasks(planned, not args.no_evaluation, lambda words: _note(words.removeprefix("note: ")))
    except StagemixError as error:
        if not args.dry_run or args.no_evaluation:
            raise
        _note(f"{error}")
        return {**due_tasks(planned, False), **{Due("evaluate", name): () for name in asked_nodes(planned)}}


def _wanted(planned: PlannedStudy, name: str, due: Mapping[Due, tuple[Due, ...]]) -> Wanted:
    node, results = planned.graph.nodes[name], planned.study.words.results
    kind = "average" if node.kind == "average" else "train"
    against: tuple[str, ...] = ()
    if results.win_rate is not None:
        # a judge needs the answers of the baseline's end with the same seed
        ends = [arm.path[-1] for arm in planned.graph.arms if arm.name == planned.study.words.study.baseline]
        against = tuple(one for one in ends if planned.graph.nodes[one].seed == node.seed and one != name)
    return Wanted(
        name,
        "average" if kind == "average" else "train",
        node.parents,
        node.tokens,
        done=Due("average" if kind == "average" else "train", name) not in due,
        evaluate=Due("evaluate", name) in due,
        after_evaluation=against,
    )


def _refuse_second_trainer(planned: PlannedStudy, name: str, known: set[str]) -> None:
    output = node_folder(planned, name).path
    where = living_process(output, time.time())
    if not where:
        return
    last = read_attempts(output)[-1].job
    if "id" in last and job_name(last) not in known:
        return  # its job is over, whatever its heartbeat says for a minute more
    raise ConfigError(
        f"{title(planned.graph, name)}: {where} trains it ({output}), and no job of the study does: let it end, or "
        f"stop it (touch {output}/stop-now), and submit then"
    )


def _excluding(scripts: StudyScripts, planned: PlannedStudy) -> None:
    folders = [node_folder(planned, name).path for name in planned.graph.nodes]
    scripts.excluded = left_out(folders, scripts.options, scripts.size.nodes).all


def _cancel_stale(plan: JobPlan) -> None:
    """Jobs that can do nothing any more, before their successors are submitted."""
    if plan.stale:
        ids = [job.id for job in plan.stale]
        try:
            cancel_jobs(ids)
        except ControlError as error:
            raise UnavailableError(f"jobs {', '.join(ids)} wait in vain and could not be cancelled: {error}") from None
        print(f"cancelled {', '.join(ids)}: they are replaced")


def _submit_all(
    planned: PlannedStudy, scripts: StudyScripts, plan: JobPlan, texts: Mapping[JobKey, str]
) -> dict[JobKey, str]:
    """Submits in order; ids by key, those of jobs that are there already among them."""
    ids = {key: job.id for key, job in plan.kept.items()}
    folder = study_folder(planned).path
    for number, job in enumerate(plan.jobs):
        name, task = job.key
        if name:
            write_node(planned, name)
        file = scripts.file_of(job.key)
        keep_script(file, texts[job.key])
        after = after_words(job, ids, scripts.options.dependency)
        try:
            # killed between the next line and the one behind it, the job is found by its comment
            ids[job.key] = submit(file, [*(["--kill-on-invalid-dep=yes", f"--dependency={after}"] if after else [])])
        except (ConfigError, UnavailableError) as error:
            raise type(error)(
                f"{error}\n{number} of {len(plan.jobs)} jobs of the study are submitted: the same command submits the "
                "rest, and none of them twice"
            ) from None
        note_job(folder, job.key, ids[job.key], [after] if after else [], file)
        behind = f"  after {words_of(job, ids)}" if job.ok or job.ended else ""
        print(f"submitted {ids[job.key]}  {task:<8}  {_title(planned, name)}{behind}", flush=True)
    return ids


def after_words(job: NeededJob, ids: Mapping[JobKey, str], users: str | None) -> str:
    """The value of --dependency; "" for none. users: what all that wait for no other job wait for besides."""
    parts = []
    if job.ok:
        parts.append(f"afterok:{':'.join(ids[key] for key in job.ok)}")
    if job.ended:
        parts.append(f"afterany:{':'.join(ids[key] for key in job.ended)}")
    if users and not job.ok:
        parts.append(check_dependency(users))
    return ",".join(parts)


def words_of(job: NeededJob, ids: Mapping[JobKey, str]) -> str:
    """What a job waits for, for people."""
    ok = [ids[key] for key in job.ok]
    ended = [ids[key] for key in job.ended]
    words = [", ".join(ok)] if ok else []
    if ended:
        shown = ", ".join(ended) if len(ended) <= 6 else f"{', '.join(ended[:5])} and {len(ended) - 5} more"
        words.append(f"the end of {shown}")
    return "; ".join(words)


def _title(planned: PlannedStudy, name: str) -> str:
    return title(planned.graph, name) if name else planned.study.words.study.name


def _tell(planned: PlannedStudy, plan: JobPlan, ids: Mapping[JobKey, str]) -> None:
    if plan.kept:
        states = ", ".join(f"{job.id} {job.state.lower()}" for job in list(plan.kept.values())[:8])
        more = f" and {len(plan.kept) - 8} more" if len(plan.kept) > 8 else ""
        print(f"there already: {states}{more}")
    study = shlex.quote(str(planned.study.path))
    if not ids:
        print(f"nothing is left to do: all nodes are done. stagemix study report {study} makes the report")
        return
    print(f"look     stagemix study status {study}\ncancel   stagemix study run {study} --slurm --cancel")


def _cancel(planned: PlannedStudy, dry_run: bool) -> int:
    """Cancels every job of the study, those that wait first: else the report would begin in between."""
    living = living_jobs(study_folder(planned).path, _listed())
    ids = [job.id for job in living.values()]
    if not ids:
        print("no job of the study waits or runs")
        return EXIT_DONE
    for key, job in living.items():
        what = "would be cancelled" if dry_run else "cancelled"
        name = _title(planned, key[0]) if key[0] in planned.graph.nodes or not key[0] else key[0][:8]
        print(f"{what} {job.id}  {key[1]:<8}  {name}  {job.state.lower()}")
    if not dry_run:
        try:
            cancel_jobs(ids, waiting_only=True)
            cancel_jobs(ids)
        except ControlError as error:
            raise UnavailableError(f"jobs could not be cancelled: {error}") from None
        print("what trained saves where the site's KillWait is enough for it; submit again to go on")
    return EXIT_DONE


def _dry_run(planned: PlannedStudy, scripts: StudyScripts, args: argparse.Namespace) -> int:
    """Shows what would be submitted."""
    from megatron.commands.study_slurm_shown import show_jobs

    listed: list[ListedJob] = []
    try:
        listed = my_jobs()
    except ControlError as error:
        _note(f"{error}: as if no job of the study were there")
    if not args.edited:
        with contextlib.suppress(FileNotFoundError):
            refuse_edits(edits_of(planned, read_record(planned)), args.study)
    plan = _plan(planned, args, listed)
    for job in plan.jobs:
        scripts.text_of(job.key)  # refuses what a submission would refuse
    for note in scripts.notes:
        _note(note)
    show_jobs(planned, plan, scripts, args.hardware)
    return EXIT_DONE


def _note(words: str) -> None:
    print(f"note: {words}", file=sys.stderr, flush=True)
