"""The run of a node: its config as `train` is given it, what it goes on from, and the command that makes the node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.load import config_to_toml
from megatron.config.schema import RunConfig, StageSection
from megatron.data.ledger import Ledger
from megatron.launch.run_checkpoints import newest_checkpoints
from megatron.study import average_nodes
from megatron.study.graph import Node
from megatron.study.node_folder import NodeFolder, StudyFolder
from megatron.study.plan import PlannedStudy
from megatron.study.steps import AverageStep, Step


def study_folder(planned: PlannedStudy) -> StudyFolder:
    """The folder of a study, as its study.output says: relative to the working directory."""
    return StudyFolder(Path(planned.study.words.study.output))


def node_folder(planned: PlannedStudy, name: str) -> NodeFolder:
    """The folder of a node, by its id."""
    return study_folder(planned).node(name)


def end_step(step: Step) -> int:
    """Optimizer steps from the beginning of the whole chain to the end of this; of an average, its first member's."""
    return average_nodes.end_step(step)


def start_step(step: Step) -> int:
    """Optimizer steps that lie before it."""
    return end_step(step) if isinstance(step, AverageStep) else step.stage.start_step


def end_checkpoint(planned: PlannedStudy, name: str) -> Path:
    """Where the checkpoint lies that a node leaves at its end. It is done where that is whole."""
    return average_nodes.end_checkpoint(planned.graph, name, study_folder(planned))


def node_config(planned: PlannedStudy, name: str) -> RunConfig:
    """The config that `train` is given: `Graph.run_config`, with the names that stages had where they were trained,
    since a resume compares them."""
    config = planned.graph.run_config(name, planned.study.words.study.output)
    config = _with_names(config, _past_names(planned, name))
    return config


def write_node(planned: PlannedStudy, name: str) -> NodeFolder:
    """Makes a node's folder with node.json and, of one that trains, node.toml. OSError."""
    node, folder = planned.graph.nodes[name], node_folder(planned, name)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_whole(folder.identity, (json.dumps(node_record(node), indent=1, default=str) + "\n").encode())
    if node.kind == "train":
        write_whole(folder.config, config_to_toml(node_config(planned, name)).encode())
    return folder


def node_record(node: Node) -> dict[str, Any]:
    """What node.json says."""
    record = {"id": node.id, "seed": node.seed, "label": node.label, "parents": list(node.parents)}
    return {**record, "kind": node.kind, "document": json.loads(json.dumps(node.document, default=str))}


def node_words(planned: PlannedStudy, name: str) -> list[str]:
    """The command that makes a node, without what is before it: "train", node.toml, …, or "average_checkpoints", ….

    A training node resumes what it goes on from the first time, and its own checkpoints when it has some.
    Raises CheckpointError where a checkpoint that an average needs was not kept.
    """
    node, folder = planned.graph.nodes[name], node_folder(planned, name)
    if node.kind == "average":
        average_nodes.check_averaged(planned.graph, name, study_folder(planned))
        return average_nodes.average_words(planned.graph, name, study_folder(planned))
    words = ["train", str(folder.config)]
    if node.parents and not newest_checkpoints(folder.path)[1]:
        words += ["--resume-from", str(end_checkpoint(planned, node.parents[0]))]
    return words


# -- the past ----------------------------------------------------------------------------------------------------------


def _past(planned: PlannedStudy, name: str) -> Ledger | None:
    """What a node has been trained on, as far as it is trained: its newest whole checkpoint's ledger, else that of what
    it goes on from; None where nothing is."""
    node = planned.graph.nodes[name]
    folders = [node_folder(planned, name).path, *(node_folder(planned, one).path for one in node.parents[:1])]
    for folder in folders:
        whole = [one for one in newest_checkpoints(folder)[0] if not one.fault]
        if whole and (ledger := whole[0].ledger) is not None:
            return ledger
    return None


def _past_names(planned: PlannedStudy, name: str) -> list[str]:
    """What a node's first stages were called where they were trained; where what it goes on from is not trained yet,
    what they will be called there."""
    ledger = _past(planned, name)
    if ledger is not None:
        return [record.name for record in ledger.stages]
    nodes, above = planned.graph.nodes, planned.graph.nodes[name]
    while above.parents:
        above = nodes[above.parents[0]]
        if above.kind == "train":
            return [stage.name for stage in node_config(planned, above.id).stages]
    return []


def _with_names(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The config with its first stages called so, and with what refers to them."""
    said = [stage.name for stage in config.stages]
    names = names[: len(said)]
    if said[: len(names)] == list(names):
        return config
    renamed = dict(zip(said, names, strict=False))
    taken = set(names)
    for later in [*said[len(names) :], *(template.name for template in config.templates)]:
        title = later
        while title in taken:
            title += "+"
        taken.add(title)
        renamed[later] = title
    stages = [_renamed(stage, renamed) for stage in config.stages]
    templates = [_renamed(template, renamed) for template in config.templates]
    return config.model_copy(update={"stages": stages, "templates": templates})


def _renamed(stage: StageSection, renamed: dict[str, str]) -> StageSection:
    update: dict[str, Any] = {"name": renamed[stage.name]}
    for key in ("like", "reverse"):
        if (other := getattr(stage, key)) is not None:
            update[key] = renamed.get(other, other)
    if stage.aggregate_of is not None:
        update["aggregate_of"] = [renamed.get(other, other) for other in stage.aggregate_of]
    if stage.blend is not None:
        update["blend"] = [
            part if part.like is None else part.model_copy(update={"like": renamed.get(part.like, part.like)})
            for part in stage.blend
        ]
    return stage.model_copy(update=update)
