"""What a study has trained, counted from the ledgers in its checkpoints, beside what its plan says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.index_cache import builds_of
from megatron.data.ledger import StageRecord
from megatron.metrics.row_tail import objects_in, read_tail, without_repeats
from megatron.study.graph import PlacedArm
from megatron.study.node_config import node_folder, study_folder
from megatron.study.node_state import NodeState, children_of, trained_checkpoint
from megatron.study.plan import PlannedStudy
from megatron.study.steps import TrainStep


@dataclass(frozen=True)
class Verification:
    """trained: tokens by ledgers, of every node that is done, once · planned: of the same nodes by the plan · naive: of
    the arms that are done, each alone, by ledgers · naive_planned: by the plan · arms, of: how many are done ·
    redone_steps, redone_tokens: trained twice, after stops or damage · faults: where a ledger says something else than
    the plan · skipped: nodes with steps that made no update, in words · padding: of `trained`, positions without token.
    """

    trained: int
    planned: int
    naive: int
    naive_planned: int
    arms: int
    of: int
    redone_steps: int
    redone_tokens: int
    faults: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    padding: int = 0

    @property
    def ratio(self) -> float | None:
        """Tokens trained over tokens naive, by ledgers; None before an arm is done."""
        return self.trained / self.naive if self.naive else None

    @property
    def planned_ratio(self) -> float | None:
        """The same by the plan."""
        return self.planned / self.naive_planned if self.naive_planned else None


def verify(planned: PlannedStudy, states: Mapping[str, NodeState]) -> Verification:
    """Of the arms that are done, with all that they need: what their checkpoints' ledgers say.

    A node whose folder is gone is counted by the ledger of what went on from it, which has it, too.
    """
    graph = planned.graph
    arms = [arm for arm in graph.arms if states[arm.path[-1]].done]
    needed = graph.needed(arm.path[-1] for arm in arms)
    counted: dict[str, int] = {}
    padding = 0
    faults: list[str] = []
    for name in (name for name in graph.nodes if name in needed):
        node = graph.nodes[name]
        if not isinstance(node.step, TrainStep):
            counted[name] = 0
            continue
        record = _record(planned, name)
        if record is None:
            faults.append(f"{node.label} {name[:8]}: no ledger tells what it was trained on")
            counted[name] = 0
            continue
        counted[name] = record.stage_shapes.tokens_at(record.samples)
        padding += sum(use.padding for use in record.use.values())
        faults += [f"{node.label} {name[:8]}: {words}" for words in _differences(record, node.step)]
    once, naive = sum(counted.values()), sum(_alone(planned, arm, counted) for arm in arms)
    redone = [_redone(node_folder(planned, name).path) for name in needed]
    return Verification(
        once,
        sum(graph.nodes[name].tokens for name in needed),
        naive,
        sum(arm.naive for arm in arms),
        len(arms),
        len(graph.arms),
        sum(steps for steps, _ in redone),
        sum(tokens for _, tokens in redone),
        tuple(faults),
        tuple(skipped_words(planned)),
        padding,
    )


def _record(planned: PlannedStudy, name: str) -> StageRecord | None:
    """What a ledger says of a node's own stage: its own, or one of a node that went on from it."""
    step = planned.graph.nodes[name].step
    assert isinstance(step, TrainStep)
    queue = [name]
    while queue:
        here = queue.pop(0)
        seen = trained_checkpoint(planned, here)
        ledger = seen.ledger if seen is not None else None
        if ledger is not None and len(ledger.stages) > step.index:
            return ledger.stages[step.index]
        queue += [child for child in children_of(planned.graph, here) if _goes_on(planned, child, here)]
    return None


def _goes_on(planned: PlannedStudy, child: str, name: str) -> bool:
    """Whether the data position of a node is behind that of another: of an average, only of its first member."""
    graph = planned.graph
    step, seed = graph.nodes[child].step, graph.nodes[child].seed
    first = step.before if isinstance(step, TrainStep) else step.members[0]
    return first is not None and graph.steps[(id(first), seed)] == name


def _differences(record: StageRecord, step: TrainStep) -> Iterator[str]:
    stage = step.stage
    if record.samples != stage.samples:
        yield f"its ledger has {record.samples:,} samples, and the plan {stage.samples:,}"
        return
    for source in sorted({*record.use, *stage.counts}):
        then = record.use[source].samples if source in record.use else 0
        if then != stage.counts.get(source, 0):
            yield f"its ledger has {then:,} samples of {source}, and the plan {stage.counts.get(source, 0):,}"


def _alone(planned: PlannedStudy, arm: PlacedArm, counted: Mapping[str, int]) -> int:
    """Tokens of training an arm alone: as `naive_tokens`, members of averages with all that is behind them each."""

    def of(name: str) -> int:
        node = planned.graph.nodes[name]
        if isinstance(node.step, TrainStep):
            return counted[name] + sum(of(parent) for parent in node.parents)
        seed = node.seed
        return sum(of(planned.graph.steps[(id(member), seed)]) for member in node.step.members)

    return of(arm.path[-1])


def _redone(folder: Path) -> tuple[int, int]:
    """(steps, tokens) of rows that resumes set aside: they were trained, and trained again."""
    try:
        content = (folder / "metrics.discarded.jsonl").read_bytes()
    except OSError:
        return 0, 0
    rows = without_repeats([row for row in objects_in(content) if _of_step(row)])
    return len(rows), sum(int(row.get("tokens", 0)) for row in rows)


def _of_step(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics is a step's, and not of looking at held-out documents or of an evaluation."""
    return "consumed_tokens" in row and "step" in row and "validation" not in row and "evaluation" not in row


# -- steps without an update -------------------------------------------------------------------------------------------


def skipped_updates(planned: PlannedStudy, name: str) -> tuple[int, int]:
    """(steps without an update, steps) of a node's own, as far as it is trained: gradients were not finite, or a spike
    was skipped. Of the first and the last row of its metrics, whose "skipped_total" counts; (0, 0) where there is none.

    Weights of a node most of whose steps made no update are those that it began with, whatever its ledger says.
    """
    path = node_folder(planned, name).path / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            first = next((row for line in file for row in objects_in(line) if _of_step(row)), None)
        tail = read_tail(path, at_least=1 << 17)
        if "skipped_total" not in tail.last:
            tail = read_tail(path)
    except OSError:
        return 0, 0
    if first is None or not tail.steps:
        return 0, 0
    last = tail.last
    steps = int(last["step"]) - int(first["step"]) + 1
    if "skipped_total" in first and "skipped_total" in last:
        return int(last["skipped_total"]) - int(first["skipped_total"]) + bool(first.get("skipped")), steps
    return sum(bool(row.get("skipped")) for row in tail.steps), steps


def skipped_words(planned: PlannedStudy) -> Iterator[str]:
    """Of every node with steps that made no update: how many of how many, and which arms have them behind them."""
    for name, node in planned.graph.nodes.items():
        skipped, steps = skipped_updates(planned, name) if node.kind == "train" else (0, 0)
        if skipped:
            seed = f", seed {node.seed}" if len({one.seed for one in planned.graph.nodes.values()}) > 1 else ""
            yield f"{node.label} {name[:8]}{seed}: {skipped:,} of {steps:,} steps; arms {', '.join(node.arms)}"


# -- indexes and disk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexBuilding:
    """Epoch indexes that runs of a study built. files: how many; seconds: that took."""

    files: int
    seconds: float


def index_building(planned: PlannedStudy, since: float = 0.0) -> IndexBuilding:
    """What was built in the caches of the study's sources since a time, in unix seconds."""
    folders = dict.fromkeys(
        Path(cache) if (cache := node.step.config.data.cache) else study_folder(planned).path / "nodes" / "index-cache"
        for node in planned.graph.nodes.values()
        if isinstance(node.step, TrainStep)
    )
    rows = [row for folder in folders for row in _builds(builds_of(folder)) if row["time"] >= since]
    return IndexBuilding(len(rows), sum(row["seconds"] for row in rows))


def _builds(path: Path) -> list[dict[str, Any]]:
    try:
        rows = list(objects_in(path.read_bytes()))
    except OSError:
        return []
    return [row for row in rows if all(isinstance(row.get(key), int | float) for key in ("time", "seconds"))]


def disk_bytes(folders: Iterable[Path]) -> int:
    """Bytes that files below folders take, as the disk counts them; a file with several names once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    queue = [str(folder) for folder in folders]
    while queue:
        try:
            entries = list(os.scandir(queue.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    queue.append(entry.path)
                    continue
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total
