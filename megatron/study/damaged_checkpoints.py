"""Which checkpoint is damaged where something of a study failed over one, and what becomes of it when it is removed.

Whether a node is trained is told by the sizes of its checkpoint's files. A file of the right size with other bytes is
found by who reads it: the trainer, an average, an export. Then all that it may have read is read here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.manifest import check_bytes, read_manifest
from megatron.config.errors import CheckpointError
from megatron.config.quantities import format_count
from megatron.launch.run_checkpoints import SeenCheckpoint, checkpoint_at
from megatron.study.average_nodes import averaged_checkpoints
from megatron.study.due_tasks import Task
from megatron.study.node_config import end_checkpoint, node_folder, start_step, study_folder
from megatron.study.node_state import title
from megatron.study.plan import PlannedStudy
from megatron.study.steps import TrainStep


@dataclass(frozen=True)
class Damaged:
    """A checkpoint of a node that is not what was written. fault: file, and what was expected and found."""

    node: str
    path: Path
    fault: str


def damaged_words(planned: PlannedStudy, tasks: Iterable[Task]) -> list[str]:
    """Of the damaged checkpoints that these failed tasks read, each once: the node, the fault, the folder to remove,
    and what is then trained again. Every byte of them is read."""
    read = {path: node for task in tasks for node, path in _read_by(planned, task)}
    found = [Damaged(node, path, fault) for path, node in read.items() if (fault := fault_of(path))]
    return [_words(planned, one) for one in found]


def fault_of(path: Path) -> str:
    """Why a checkpoint's files are not what its manifest says; "" where they are, and where there is no such folder."""
    if not path.is_dir():
        return ""
    try:
        files = read_manifest(path)["files"]
        check_bytes(path, files, sorted(files))
    except CheckpointError as error:
        return str(error)
    return ""


def _read_by(planned: PlannedStudy, task: Task) -> Iterator[tuple[str, Path]]:
    """Nodes and checkpoints that a task reads."""
    graph, name = planned.graph, task.node
    if task.kind == "evaluate":
        yield name, end_checkpoint(planned, name)
    elif task.kind == "average":
        owners = {node_folder(planned, one).path: one for one in graph.nodes[name].parents}
        for path, _ in averaged_checkpoints(graph, name, study_folder(planned)):
            yield owners[path.parent.parent], path
    elif own := _own(planned, name):
        yield from ((name, seen.path) for seen in own)
    else:
        yield from ((parent, end_checkpoint(planned, parent)) for parent in graph.nodes[name].parents)


def _own(planned: PlannedStudy, name: str) -> list[SeenCheckpoint]:
    """Checkpoints in a node's folder, newest first."""
    folders = sorted((node_folder(planned, name).path / "checkpoints").glob("step-*"), reverse=True)
    return [seen for path in folders if (seen := checkpoint_at(path)) is not None]


def _words(planned: PlannedStudy, one: Damaged) -> str:
    return (
        f"{title(planned.graph, one.node)}: its checkpoint is damaged: {one.fault}. Remove the folder {one.path} and "
        f"start the study again: {_again(planned, one)}; nodes that went on from it and are trained stay as they are"
    )


def _again(planned: PlannedStudy, one: Damaged) -> str:
    """What is made again once a damaged checkpoint is removed."""
    node = planned.graph.nodes[one.node]
    if not isinstance(node.step, TrainStep):
        return f"{node.label} is averaged again, and nothing is trained"
    stage = node.step.stage
    others = (seen for seen in _own(planned, one.node) if seen.path != one.path and seen.step >= start_step(node.step))
    older = next((seen for seen in others if not seen.fault and not fault_of(seen.path)), None)
    at = stage.start_token if older is None else int(older.state.get("consumed_tokens", stage.start_token))
    left = min(node.tokens, max(0, stage.start_token + node.tokens - at))
    begin = "from its beginning" if older is None or left == node.tokens else f"from step {older.step:,} on"
    return f"{node.label} is trained {begin}, {format_count(left)} tokens of {format_count(node.tokens)}"
