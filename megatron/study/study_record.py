"""study.json: the nodes of a study as they were when it was last run, and what an edit since then means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import ChangedPastError, DataError
from megatron.config.quantities import format_count
from megatron.study.arms import arms_of
from megatron.study.identity import Document
from megatron.study.node_config import end_step, node_record, start_step, study_folder
from megatron.study.node_state import begun_folder, trained_checkpoint
from megatron.study.plan import PlannedStudy
from megatron.study.sharing import differences

FORMAT = 1


@dataclass(frozen=True)
class RecordedArm:
    """An arm with one seed as it was run. path: ids of its nodes; stages: what it called them."""

    name: str
    seed: int
    path: tuple[str, ...]
    stages: tuple[str, ...]


@dataclass(frozen=True)
class StudyRecord:
    """study.json. nodes: by id, what node.json says with "labels", "tokens", "start_step", "end_step"; also those that
    no arm needs any more. threads: of each process, so that the next run's arithmetic is the same."""

    nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arms: tuple[RecordedArm, ...] = ()
    threads: int | None = None

    @property
    def unneeded(self) -> list[str]:
        """Nodes that are no part of an arm as it was last run."""
        needed: set[str] = set()
        queue = [name for arm in self.arms for name in arm.path]
        while queue:
            here = queue.pop()
            if here not in needed:
                needed.add(here)
                queue += self.nodes[here]["parents"] if here in self.nodes else []
        return [name for name in self.nodes if name not in needed]


@dataclass(frozen=True)
class Edit:
    """A stage of an arm that has begun and is another one now. values: of the key then and now · then, now: ids ·
    tokens: that would be trained anew."""

    arm: str
    seed: int
    stage: str
    key: str
    values: tuple[str, str]
    more: int
    then: str
    now: str
    tokens: int

    def words(self) -> str:
        """For people."""
        more = f", and {self.more} more" if self.more else ""
        return (
            f"arm {self.arm!r} (seed {self.seed}), stage {self.stage!r}: {self.key} was {self.values[0]} and is now "
            f"{self.values[1]}{more}: node {self.then[:8]} has begun, and {format_count(self.tokens)} tokens would be "
            f"trained anew ({self.now[:8]})"
        )


def read_record(planned: PlannedStudy) -> StudyRecord:
    """study.json of the study's folder; an empty record where there is none. Raises DataError where it is broken."""
    path = study_folder(planned).record
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise DataError(
                f"{path}: has format {content['format']!r}, and {FORMAT} is known: use the version that made it"
            )
        arms = tuple(
            RecordedArm(arm["name"], arm["seed"], tuple(arm["path"]), tuple(arm["stages"])) for arm in content["arms"]
        )
        return StudyRecord(content["nodes"], arms, content.get("threads"))
    except FileNotFoundError:
        return StudyRecord()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is no record of a study ({error!r}): move it away, and edits since the last run are not noticed"
        ) from None


def write_record(planned: PlannedStudy, before: StudyRecord, threads: int | None = None) -> StudyRecord:
    """Writes what is planned over what was: arms and seeds that are not planned now stay as they were, but arms that
    the study has no more. OSError."""
    nodes = {**before.nodes, **{name: _node(planned, name) for name in planned.graph.nodes}}
    now = [
        RecordedArm(arm.name, arm.seed, arm.path, tuple(step.label for step in planned.arms[arm.name].steps))
        for arm in planned.graph.arms
    ]
    there, known = {(arm.name, arm.seed) for arm in now}, arms_of(planned.study)
    kept = [arm for arm in before.arms if arm.name in known and (arm.name, arm.seed) not in there]
    record = StudyRecord(nodes, (*kept, *now), threads if threads is not None else before.threads)
    content = {
        "format": FORMAT,
        "study": planned.study.words.study.name,
        "file": str(planned.study.path),
        "threads": record.threads,
        "arms": [
            {"name": arm.name, "seed": arm.seed, "path": list(arm.path), "stages": list(arm.stages)}
            for arm in record.arms
        ],
        "nodes": nodes,
    }
    path = study_folder(planned).record
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1, default=str) + "\n").encode())
    return record


def _node(planned: PlannedStudy, name: str) -> dict[str, Any]:
    node = planned.graph.nodes[name]
    return {
        **node_record(node),
        "labels": list(node.labels),
        "tokens": node.tokens,
        "start_step": start_step(node.step),
        "end_step": end_step(node.step),
    }


# -- edits -------------------------------------------------------------------------------------------------------------


def edits_of(planned: PlannedStudy, record: StudyRecord) -> list[Edit]:
    """Arms whose path changed where it had begun. Later stages, and those that have not begun, may change."""
    then = {(arm.name, arm.seed): arm for arm in record.arms}
    found = []
    for arm in planned.graph.arms:
        old = then.get((arm.name, arm.seed))
        if old is None:
            continue
        place = next((n for n, (one, two) in enumerate(zip(old.path, arm.path, strict=False)) if one != two), None)
        if place is None:
            continue
        begun = [number for number in range(place, len(old.path)) if _had_begun(planned, record, old.path[number])]
        if begun:
            found.append(_edit(planned, record, old, arm.path, place, max(begun)))
    return found


def _edit(
    planned: PlannedStudy, record: StudyRecord, old: RecordedArm, path: tuple[str, ...], place: int, last: int
) -> Edit:
    """place: of the first stage that is another; last: of the last that had begun."""
    then, now = old.path[place], path[place]
    graph = planned.graph
    changes = differences(_document(record, then), json.loads(json.dumps(graph.nodes[now].document, default=str)))
    key, values = changes[0] if changes else ("the stage", (old.stages[place], graph.nodes[now].label))
    anew = [name for name in path[place : last + 1] if trained_checkpoint(planned, name) is None]
    tokens = sum(graph.nodes[name].tokens for name in anew)
    return Edit(old.name, old.seed, old.stages[place], key, values, max(0, len(changes) - 1), then, now, tokens)


def _document(record: StudyRecord, name: str) -> Document:
    document: Document = record.nodes[name]["document"] if name in record.nodes else {}
    return document


def _had_begun(planned: PlannedStudy, record: StudyRecord, name: str) -> bool:
    start = int(record.nodes[name]["start_step"]) if name in record.nodes else 0
    return begun_folder(study_folder(planned).node(name).path, start)


def refuse_edits(edits: Iterable[Edit], path: Path) -> None:
    """Raises ChangedPastError that names every arm, stage and key. path: of the study file."""
    lines = [edit.words() for edit in edits]
    if lines:
        raise ChangedPastError(
            f"{path}: was edited after nodes ran:\n  " + "\n  ".join(lines) + "\nput it back; or give the arm another "
            "name, and both are kept (stagemix study add-arm); or accept it with --edited: what ran stays untouched, "
            "and no arm needs it any more"
        )


def unneeded_words(planned: PlannedStudy, record: StudyRecord) -> list[str]:
    """Nodes that were trained and that no arm needs any more, in words, with their folders."""
    folder = study_folder(planned)
    return [
        f"{record.nodes[name]['label']} {name[:8]} (seed {record.nodes[name]['seed']}): {folder.node(name).path}"
        for name in record.unneeded
        if begun_folder(folder.node(name).path, int(record.nodes[name]["start_step"]))
    ]
