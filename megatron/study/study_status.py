"""All that `stagemix study status` shows, as plain JSON values, read from the study's folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron.launch.run_queue import Queue
from megatron.study.node_config import study_folder
from megatron.study.node_evaluation import asked_nodes
from megatron.study.node_state import DONE, NodeState, study_states
from megatron.study.plan import PlannedStudy
from megatron.study.slurm_nodes import jobs_of, queued_words
from megatron.study.study_record import StudyRecord, edits_of, read_record, unneeded_words
from megatron.study.verification import disk_bytes, index_building, skipped_updates, verify


def study_status(planned: PlannedStudy, now: float | None = None, queue: Queue | None = None) -> dict[str, Any]:
    """The status of a study.

    Keys: "study", "file", "output", "now"; "nodes", a NodeState each with "label", "seed", "arms", "kind",
    "tokens_planned", "skipped" (steps without an update) and "evaluation" ("done", "due", ""); "counts" by state;
    "arms", each with "done", "evaluated" and the label of the stage "at"; "tokens" trained, left, planned;
    "seconds_left" at the pace of what trains now; "verification" from ledgers; "indexes"; "disk_bytes"; "unneeded"
    nodes; "edits" that the next run would refuse; "jobs" that were submitted to SLURM; "notes".

    Raises DataError.
    """
    now = time.time() if now is None else now
    graph = planned.graph
    record = read_record(planned)
    states = study_states(planned, now, queue)
    jobs = jobs_of(study_folder(planned).path) if queue is not None else {}
    found, indexes = verify(planned, states), index_building(planned)
    asked = set(asked_nodes(planned))
    trained = sum(_tokens(planned, state) for state in states.values())
    rates = [state.tokens_per_second for state in states.values() if state.tokens_per_second]
    left = graph.trained - trained
    return {
        "study": planned.study.words.study.name,
        "file": str(planned.study.path),
        "output": str(study_folder(planned).path),
        "now": now,
        "nodes": [_node(planned, state, state.id in asked) for state in states.values()],
        "counts": {word: count for word in _words(states) if (count := _count(states, word))},
        "arms": _arms(planned, states),
        "tokens": {"trained": trained, "left": left, "planned": graph.trained, "naive": graph.naive},
        "seconds_left": left / sum(rates) if rates else None,
        "verification": {**asdict(found), "ratio": found.ratio, "planned_ratio": found.planned_ratio},
        "indexes": asdict(indexes),
        "disk_bytes": disk_bytes([study_folder(planned).path]),
        "unneeded": unneeded_words(planned, record),
        "edits": [edit.words() for edit in edits_of(planned, record)],
        "notes": [*_notes(planned, record), *queued_words(jobs)],
        "jobs": [{"node": name, **asdict(job)} for name, ones in jobs.items() for job in ones],
    }


def _words(states: Mapping[str, NodeState]) -> list[str]:
    return list(dict.fromkeys(state.state for state in states.values()))


def _count(states: Mapping[str, NodeState], word: str) -> int:
    return sum(state.state == word for state in states.values())


def _tokens(planned: PlannedStudy, state: NodeState) -> int:
    return planned.graph.nodes[state.id].tokens if state.done else state.tokens


def _node(planned: PlannedStudy, state: NodeState, due: bool) -> dict[str, Any]:
    node = planned.graph.nodes[state.id]
    row = asdict(state)
    row["checkpoint"] = None if state.checkpoint is None else str(state.checkpoint)
    return {
        **row,
        "label": node.label,
        "seed": node.seed,
        "kind": node.kind,
        "arms": list(node.arms),
        "tokens_planned": node.tokens,
        "skipped": skipped_updates(planned, state.id)[0] if node.kind == "train" else 0,
        "evaluation": "done" if state.state == "evaluated" else "due" if due else "",
    }


def _arms(planned: PlannedStudy, states: Mapping[str, NodeState]) -> list[dict[str, Any]]:
    """An arm is done where its last node is; "at": the first of its stages that is not."""
    rows = []
    for arm in planned.graph.arms:
        done = states[arm.path[-1]].done
        steps = planned.arms[arm.name].steps
        at = next((step.label for step, name in zip(steps, arm.path, strict=True) if not states[name].done), "")
        state = "done" if done else next(states[name].state for name in arm.path if states[name].state not in DONE)
        evaluated = states[arm.path[-1]].state == "evaluated"
        rows.append(
            {
                "name": arm.name,
                "seed": arm.seed,
                "done": done,
                "evaluated": evaluated,
                "at": "" if done else at,
                "state": state,
            }
        )
    return rows


def _notes(planned: PlannedStudy, record: StudyRecord) -> list[str]:
    notes = []
    here = {arm.seed for arm in planned.graph.arms}
    others = sorted({arm.seed for arm in record.arms} - here)
    if others:
        notes.append(f"also run with seeds {', '.join(map(str, others))}: --seeds shows them")
    return notes
