"""What each node of a study is now, read from its folder: nothing is written, locked or asked of a process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.config.errors import EXIT_DONE, EXIT_REQUEUE, DataError
from megatron.launch.attempts import ATTEMPTS, EXIT, HEARTBEAT
from megatron.launch.living_run import living_process, own_names
from megatron.launch.run_checkpoints import SeenCheckpoint, checkpoint_at, newest_checkpoints
from megatron.launch.run_queue import Queue
from megatron.launch.run_status import NoRun, run_status
from megatron.launch.slurm_submit import JOBS
from megatron.study.graph import Graph
from megatron.study.node_config import end_checkpoint, end_step, node_folder, start_step, study_folder
from megatron.study.node_results import read_results
from megatron.study.plan import PlannedStudy
from megatron.study.slurm_nodes import NodeJob, jobs_of

STATES = {
    "waiting": "not begun",
    "blocked": "goes on from a node that failed",
    "queued": "its job waits in SLURM's queue",
    "training": "a process trains it now",
    "stopped": "begun, and stopped or killed; the next study run goes on from its newest checkpoint",
    "failed": "its process ended with an error; the next study run tries again",
    "trained": "its checkpoint is whole",
    "evaluated": "trained, and all its results are there",
    "gone": "trained, and its folder was removed since; nothing that is not done needs it",
}
IN_PART = "evaluated in part"
"""How the reason of a trained node begins some of whose evaluation failed."""
DONE = ("trained", "evaluated", "gone")


@dataclass(frozen=True)
class NodeState:
    """One node. state: a key of STATES · step, steps: of its own stage · tokens: trained of its own, as weights hold
    them · redone_steps: trained twice, after kills · attempts: starts · checkpoint: the one at its end · where: the
    process that trains it."""

    id: str
    state: str
    step: int = 0
    steps: int = 0
    tokens: int = 0
    code: int | None = None
    reason: str = ""
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    attempts: int = 0
    redone_steps: int = 0
    checkpoint: Path | None = None
    where: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing of it is left to train."""
        return self.state in DONE


def trained_checkpoint(planned: PlannedStudy, name: str) -> SeenCheckpoint | None:
    """The whole checkpoint at a node's end; None where there is none, so that the node is not done."""
    seen = checkpoint_at(end_checkpoint(planned, name))
    return seen if seen is not None and not seen.fault else None


def is_evaluated(planned: PlannedStudy, name: str) -> bool:
    """Whether its results are there, readable and without a part that failed."""
    return evaluation_of(node_folder(planned, name).results) == ("evaluated", "")


def evaluation_of(path: Path) -> tuple[str, str]:
    """Of results.json: ("evaluated", ""), or ("trained", why its node is not evaluated); "" where nothing is there."""
    try:
        found = read_results(path)
    except DataError as error:
        return "trained", f"its results cannot be read: {error}"
    if found is None:
        return "trained", ""
    lost = "; ".join(f"{part}: {why}" for part, why in found.failed.items())
    return ("trained", f"{IN_PART}: {lost}") if lost else ("evaluated", "")


def has_begun(planned: PlannedStudy, name: str) -> bool:
    """Whether something was trained of it, or averaged, that a change of the study would throw away."""
    return begun_folder(node_folder(planned, name).path, start_step(planned.graph.nodes[name].step))


def begun_folder(folder: Path, start: int) -> bool:
    """The same of a node that the study may not have any more: rows of steps, or a checkpoint beyond its start."""
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        return True
    found, count = newest_checkpoints(folder)
    return count > 0 and (found[0].step > start or not (folder / "node.toml").is_file())


def study_states(
    planned: PlannedStudy, now: float | None = None, queue: Queue | None = None, names: Iterable[str] | None = None
) -> dict[str, NodeState]:
    """Every node's state, or of those named, by id, parents first. queue: asks SLURM about jobs; None: nobody is asked.

    A node whose folder is gone counts as done where everything that goes on from it is.
    """
    now = time.time() if now is None else now
    graph, wanted = planned.graph, set(planned.graph.nodes if names is None else names)
    states = {name: node_state(planned, name, now, queue) for name in graph.nodes}
    jobs = jobs_of(study_folder(planned).path) if queue is not None else {}
    for name, node in graph.nodes.items() if jobs else ():
        job = next((job for job in jobs.get(name, []) if job.task in ("train", "average")), None)
        if job is not None:
            ready = all(states[one].done for one in node.parents)
            states[name] = _with_job(states[name], job, node.kind == "average" and ready)
    for name in reversed(list(graph.nodes)):
        children = children_of(graph, name)
        gone = states[name].state == "waiting" and children and all(states[child].done for child in children)
        if gone:
            states[name] = replace(states[name], state="gone", reason=STATES["gone"])
    for name, node in graph.nodes.items():
        held = [one for one in node.parents if states[one].state in ("failed", "blocked")]
        if states[name].state == "waiting" and held:
            states[name] = replace(states[name], state="blocked", reason=blocked_words(graph, states, held[0]))
    return {name: state for name, state in states.items() if name in wanted}


def _with_job(state: NodeState, job: NodeJob, ended: bool) -> NodeState:
    """The state of a node with what SLURM says of the job that makes it. ended: where that job is gone, it had begun:
    it is an average's, whose run leaves no record, and what it is of is there."""
    if state.done or state.state in ("training", "failed") or job.state == "UNKNOWN":
        return state
    if job.living:
        why = f" ({job.reason})" if job.reason else ""
        return replace(state, state="queued", reason=f"job {job.job} is {job.state.lower()}{why}")
    if ended:
        return replace(state, state="failed", reason=f"job {job.job} ended and left no checkpoint: look at its log")
    if state.state == "queued":
        return replace(state, state="waiting", reason=f"job {job.job} is gone, or waits in vain; submit again")
    return state


def blocked_words(graph: Graph, states: Mapping[str, NodeState], held: str) -> str:
    """By which node something is blocked: the first failed one above."""
    while states[held].state == "blocked":
        held = next(one for one in graph.nodes[held].parents if states[one].state in ("failed", "blocked"))
    return f"by {title(graph, held)}"


def title(graph: Graph, name: str) -> str:
    """What a node is called in lines for people: "init 1a2b3c4d", with its seed where there are several."""
    node = graph.nodes[name]
    several = len({one.seed for one in graph.nodes.values()}) > 1
    return f"{node.label} {name[:8]}" + (f" seed {node.seed}" if several else "")


def children_of(graph: Graph, name: str) -> list[str]:
    """The nodes that go on from a node, or average it."""
    return [node.id for node in graph.nodes.values() if name in node.parents]


def node_state(planned: PlannedStudy, name: str, now: float, queue: Queue | None = None) -> NodeState:
    """One node's, whatever becomes of others. now: unix seconds."""
    node, folder = planned.graph.nodes[name], node_folder(planned, name)
    start, end = start_step(node.step), end_step(node.step)
    state = NodeState(name, "waiting", steps=end - start)
    run = _run(folder.path, now, queue)
    if run is not None:
        wall = run["attempts"]
        state = replace(state, attempts=len(wall), redone_steps=run["redone_steps"])
    if (seen := trained_checkpoint(planned, name)) is not None:
        word, why = evaluation_of(folder.results)
        loss = run["speed"]["loss"] if run is not None else None
        state = replace(state, state=word, reason=why, step=end - start, tokens=node.tokens)
        return replace(state, loss=loss, checkpoint=seen.path)
    if run is None:
        if not begun_folder(folder.path, start):
            return state
        return replace(state, state="stopped", reason="its checkpoint is not whole")
    if node.kind == "average":
        return replace(state, state="stopped", reason="its checkpoint is not whole")
    before = 0 if not node.parents else planned.graph.nodes[name].step.stage.start_token  # type: ignore[union-attr]
    at = run["progress"]["step"]
    state = replace(
        state,
        step=min(max(0, at - start), end - start),
        tokens=min(max(0, run["progress"]["consumed_tokens"] - before), node.tokens) if at > start else 0,
        loss=run["speed"]["loss"],
    )
    return _of_run(state, folder.path, run, now, end)


def _of_run(state: NodeState, folder: Path, run: Mapping[str, Any], now: float, end: int) -> NodeState:
    if where := living_process(folder, now):
        speed = run["speed"]
        left = run["progress"]["seconds_left"]
        rate = speed["tokens_per_second"]
        return replace(state, state="training", tokens_per_second=rate, seconds_left=left, where=where)
    word, code, reason = run["state"], run["code"], run["reason"]
    if word in ("submitted", "waiting"):
        return replace(state, state="queued", reason=reason)
    if word in ("running", "starting", "silent"):
        here = not run["hosts"] or set(run["hosts"]) & set(own_names())
        killed = "killed, without a record of its end" if here or word == "silent" else "not heard of"
        return replace(state, state="stopped", reason=killed)
    if word == "complete" or code == EXIT_DONE:
        # it ended well, and what it left is not whole, or not there any more
        return replace(state, state="stopped", reason=f"its checkpoint step-{end:09d} is not whole, or not there")
    if word == "stopped" or code == EXIT_REQUEUE:
        return replace(state, state="stopped", code=code, reason=reason)
    if word == "failed":
        return replace(state, state="failed", code=code, reason=reason)
    return replace(state, state="stopped" if state.step else "waiting", reason=reason)


def _run(folder: Path, now: float, queue: Queue | None) -> dict[str, Any] | None:
    """The status of the run in a folder; None where none was started there."""
    if not any((folder / name).exists() for name in (ATTEMPTS, HEARTBEAT, EXIT, f"slurm/{JOBS}")):
        return None
    try:
        return run_status(folder, now, queue)
    except NoRun:
        return None
