"""Averages of a study: which checkpoints they are of, and the command that makes them."""

from __future__ import annotations

from fractions import Fraction
from math import lcm
from pathlib import Path

from megatron.config.errors import CheckpointError
from megatron.launch.run_checkpoints import newest_checkpoints
from megatron.study.graph import Graph
from megatron.study.node_folder import StudyFolder
from megatron.study.steps import AverageStep, Step, trained


def end_step(step: Step) -> int:
    """Optimizer steps of the whole chain at the end of a step; of an average, those of its first member."""
    return trained(step)[-1].stage.end_step


def end_checkpoint(graph: Graph, name: str, study: StudyFolder) -> Path:
    """The checkpoint that a node leaves at its end."""
    return study.node(name).checkpoint(end_step(graph.nodes[name].step))


def averaged_checkpoints(graph: Graph, name: str, study: StudyFolder) -> list[tuple[Path, Fraction]]:
    """The checkpoints of an average node, each once with its share of the whole, the one that gives the data position
    first; of the last of one stage the newest first."""
    node = graph.nodes[name]
    step = node.step
    assert isinstance(step, AverageStep)
    ids = [graph.steps[(id(member), node.seed)] for member in step.members]
    if step.last:
        paths = [study.node(ids[0]).checkpoint(number) for number in step.last_steps]
    else:
        paths = [end_checkpoint(graph, one, study) for one in ids]
    shares: dict[Path, Fraction] = {}
    for path, share in zip(paths, step.weights, strict=True):
        shares[path] = shares.get(path, Fraction(0)) + share  # arms may share a node
    return list(shares.items())


def average_words(graph: Graph, name: str, study: StudyFolder) -> list[str]:
    """The command line of an average node, from "average_checkpoints" on. Weights are whole numbers."""
    found = averaged_checkpoints(graph, name, study)
    common = lcm(*(share.denominator for _, share in found))
    words = ["average_checkpoints", "--output", str(end_checkpoint(graph, name, study))]
    for path, share in found:
        words += ["--checkpoint", str(path), "--weight", str(int(share * common))]
    return words


def check_averaged(graph: Graph, name: str, study: StudyFolder) -> None:
    """Raises CheckpointError where an average node's parents are done and did not keep a checkpoint that it is of: they
    were trained before the study had this average."""
    missing = [path for path, _ in averaged_checkpoints(graph, name, study) if not path.is_dir()]
    gone = [path for path in missing if newest_checkpoints(path.parent.parent)[1]]
    ends = {end_checkpoint(graph, one, study) for one in graph.nodes[name].parents}
    if gone and all(path.is_dir() for path in ends):
        names = ", ".join(path.name for path in gone)
        raise CheckpointError(
            f"{gone[0].parent}: has no {names}, which {graph.nodes[name].label} averages: the node was trained before "
            "the study had this average, and kept the newest checkpoint.keep alone: average fewer (last), or move its "
            "folder away, and it is trained again"
        )
