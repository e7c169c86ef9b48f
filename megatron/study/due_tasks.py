"""What is still to be done of a study, and in which order: nodes to train or average, and nodes to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron.study.node_evaluation import asked_nodes, evaluation_is_current
from megatron.study.node_questions import Questions
from megatron.study.node_state import children_of, is_evaluated, trained_checkpoint
from megatron.study.plan import PlannedStudy

Kind = Literal["train", "average", "evaluate"]


@dataclass(frozen=True)
class Task:
    """One thing that a process does for a node."""

    kind: Kind
    node: str


Tasks = dict[Task, tuple[Task, ...]]
"""Each with the tasks that must be done before it."""


def due_tasks(planned: PlannedStudy, evaluation: bool, say: Callable[[str], None] = lambda words: None) -> Tasks:
    """Everything that is still to be done so that all arms are trained and, with `evaluation`, evaluated as the study
    says. Nothing that has a whole checkpoint at its end is trained again, and what lies before it is not asked for,
    whether it is still there or not. Nodes come before what goes on from them. say: hears what of [results] cannot be
    measured, and why."""
    graph = planned.graph
    trained = {name: trained_checkpoint(planned, name) is not None for name in graph.nodes}
    wanted: set[str] = set()
    queue = [arm.path[-1] for arm in graph.arms]
    while queue:
        here = queue.pop()
        if not trained[here] and here not in wanted:
            wanted.add(here)
            queue += graph.nodes[here].parents
    tasks: Tasks = {}
    for name, node in graph.nodes.items():
        if name in wanted:
            kind: Kind = "average" if node.kind == "average" else "train"
            before = (parent for parent in node.parents if parent in wanted)
            tasks[Task(kind, name)] = tuple(making(planned, parent) for parent in before)
    questions = Questions(planned) if evaluation else None  # what cannot be asked is said before anything is trained
    for note in questions.notes if questions is not None else ():
        say(f"note: {note}")
    for name in asked_nodes(planned) if evaluation else ():
        there = trained[name] and is_evaluated(planned, name) and evaluation_is_current(planned, name, questions)
        if (trained[name] or name in wanted) and not there:
            tasks[Task("evaluate", name)] = (making(planned, name),) if name in wanted else ()
    return tasks


def making(planned: PlannedStudy, name: str) -> Task:
    """The task that makes a node."""
    return Task("average" if planned.graph.nodes[name].kind == "average" else "train", name)


def urgency(planned: PlannedStudy, tasks: Tasks) -> Mapping[Task, tuple[int, int]]:
    """By task: how many tasks cannot begin before it is done, and the tokens of the longest chain from it on; the
    greatest goes first. An evaluation holds up nothing."""
    graph = planned.graph
    below: dict[str, set[Task]] = {}
    chain: dict[str, int] = {}
    for name in reversed(list(graph.nodes)):
        below[name], longest = set(), 0
        for child in children_of(graph, name):
            below[name] |= below[child] | {task for task in tasks if task.node == child}
            longest = max(longest, chain[child])
        below[name] |= {task for task in tasks if task == Task("evaluate", name)}
        chain[name] = longest + graph.nodes[name].tokens
    return {task: (0, 0) if task.kind == "evaluate" else (len(below[task.node]), chain[task.node]) for task in tasks}
