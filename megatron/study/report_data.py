"""Everything that a study's report shows, read from the folders of its nodes. Nothing is trained or evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import sha256_of
from megatron.config.errors import CheckpointError, ConfigError, DataError
from megatron.data.ledger import Ledger, StageRecord
from megatron.evaluation.results import read_record
from megatron.planner.ledger_files import read_ledger
from megatron.study.asked_names import unknown_labels
from megatron.study.graph import Node, PlacedArm
from megatron.study.node_config import end_checkpoint, node_folder, study_folder
from megatron.study.node_folder import NodeFolder
from megatron.study.node_results import NodeResults, figures_of, read_results
from megatron.study.node_state import NodeState, study_states
from megatron.study.plan import PlannedStudy, study_plan
from megatron.study.report_section import ReportSection
from megatron.study.steps import AverageStep, TrainStep, trained
from megatron.study.study_file import nearest
from megatron.study.verification import skipped_updates

EVALUATED = "evaluated"
CHANGED = "results.json was changed"
"""In a note on figures that are not those of the files with their items."""


@dataclass(frozen=True)
class ReportNode:
    """A node with what it left. ledger: of the checkpoint at its end; an average's is its first member's · suites: by
    name, the file's record, whose one model is this node · skipped: (steps without an update, steps)."""

    node: Node
    folder: NodeFolder
    state: NodeState
    checkpoint: Path
    ledger: Ledger | None = None
    results: NodeResults | None = None
    suites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped: tuple[int, int] = (0, 0)

    @property
    def trained(self) -> bool:
        """Whether its weights are there, or were."""
        return self.state.done

    @property
    def ends(self) -> str:
        """What it is called where several nodes are: "init 1a2b3c4d, seed 1"."""
        return f"{self.node.label} {self.node.id[:8]}, seed {self.node.seed}"


@dataclass(frozen=True)
class StudyReport:
    """A study's results. plan: `study_plan`'s · baseline: the arm that others are compared with · nodes: by id, parents
    first · missing: what is not trained or not evaluated, in words · notes: what a reader must know."""

    planned: PlannedStudy
    plan: Mapping[str, Any]
    baseline: str | None
    nodes: Mapping[str, ReportNode]
    missing: Sequence[str]
    notes: Sequence[str]

    @property
    def words(self) -> ReportSection:
        """What [report] says."""
        return self.planned.study.words.report

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the file's order."""
        return list(dict.fromkeys(arm.name for arm in self.planned.graph.arms))

    @property
    def seeds(self) -> list[int]:
        """The study's seeds."""
        return list(dict.fromkeys(arm.seed for arm in self.planned.graph.arms))

    def placed(self, arm: str) -> list[PlacedArm]:
        """An arm with each seed."""
        return [one for one in self.planned.graph.arms if one.name == arm]

    def end(self, arm: str, seed: int) -> ReportNode:
        """The node that an arm ends with."""
        return next(self.nodes[one.path[-1]] for one in self.placed(arm) if one.seed == seed)

    def first_of(self, arm: str) -> str:
        """The first member of the average of several that an arm ends with or goes on from, as "arm/stage"; empty of
        an arm without one. Ledgers of such an arm are those of that member's way, and say nothing of the others."""
        step = self.planned.arms[arm].end
        while True:
            if isinstance(step, AverageStep):
                if not step.last:
                    return f"{step.members[0].arm}/{step.members[0].label}"
                step = step.members[0]
            elif step.before is None:
                return ""
            else:
                step = step.before

    def own_record(self, name: str) -> StageRecord | None:
        """What a ledger says of a training node's own stage: its own ledger, else one that goes on from its data."""
        place = len(trained(self.nodes[name].node.step)) - 1
        for one in self.nodes.values():
            goes_on = name == one.node.id or name in one.node.parents[:1]  # of an average: its first member
            if goes_on and one.ledger is not None and len(one.ledger.stages) > place:
                return one.ledger.stages[place]
        return None

    def experiment(self, arm: str) -> str:
        """What the arm is grouped by."""
        return self.placed(arm)[0].experiment

    def label(self, arm: str) -> str:
        """What the arm is called in tables and plots."""
        return self.words.labels.get(arm, arm)


def read_study(planned: PlannedStudy, baseline: str | None = None) -> StudyReport:
    """Reads results, suites' files and ledgers of all nodes. baseline: instead of study.baseline.

    Raises ConfigError for names that are no arm, DataError for results that are damaged.
    """
    arms = list(dict.fromkeys(arm.name for arm in planned.graph.arms))
    chosen = _baseline(planned, arms, baseline)
    states = study_states(planned)
    notes: list[str] = []
    groups = source_groups(planned)
    nodes = {name: _node(planned, name, states[name], groups, notes) for name in planned.graph.nodes}
    if chosen is None:
        notes.append("No baseline: say study.baseline, or --baseline ARM, and differences from it are shown.")
    if wrong := next(unknown_labels(planned.study), ""):
        raise ConfigError(wrong)
    notes += _strangers(planned)
    notes += _dtypes(nodes)
    return StudyReport(planned, study_plan(planned), chosen, nodes, _missing(planned, nodes), notes)


def _baseline(planned: PlannedStudy, arms: Sequence[str], asked: str | None) -> str | None:
    if asked is not None and asked not in arms:
        raise ConfigError(f"--baseline {asked}: no arm is called so: {nearest(asked, arms, 'arms are')}")
    said = asked or planned.study.words.study.baseline
    return said if said in arms else None  # it may be left out by --arm


def source_groups(planned: PlannedStudy) -> dict[str, str]:
    """Group by source, over all arms."""
    groups: dict[str, str] = {}
    for arm in planned.arms.values():
        for step in arm.steps:
            if isinstance(step, TrainStep):
                groups |= {name: step.stage.facts[name].group for name in step.stage.weights.sources}
    return groups


def _node(
    planned: PlannedStudy, name: str, state: NodeState, groups: Mapping[str, str], notes: list[str]
) -> ReportNode:
    node, folder = planned.graph.nodes[name], node_folder(planned, name)
    checkpoint = end_checkpoint(planned, name)
    ledger = None
    if state.done and checkpoint.is_dir():
        try:
            ledger = read_ledger(checkpoint)
        except CheckpointError as error:
            notes.append(f"The ledger of {node.label} {name[:8]} cannot be read: {error}")
    results = read_results(folder.results)
    if results is not None and results.node != name:
        raise DataError(
            f"{folder.results}: of node {results.node}, in the folder of {name}: it was copied there; remove it, and "
            "stagemix study evaluate writes it again"
        )
    suites = {} if results is None else _suites(folder, results, notes)
    if results is not None:
        left_out = [f"Suite {name}: {why}." for name, ones in results.left_out.items() for why in ones.values()]
        notes += [words for words in left_out if words not in notes]  # every node is asked about the same sources
        results = _as_in_files(folder, results, suites, groups, notes)
    skipped = skipped_updates(planned, name) if node.kind == "train" else (0, 0)
    return ReportNode(node, folder, state, checkpoint, ledger, results, suites, skipped)


def _as_in_files(
    folder: NodeFolder,
    results: NodeResults,
    suites: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, str],
    notes: list[str],
) -> NodeResults:
    """The results with the figures that the suites' files give, where results.json says others: it was changed since,
    and its items would belie it."""
    metrics = list(results.metrics)
    for suite, record in suites.items():
        there = {one.key: one for one in figures_of(record, suite, groups)}
        said = {one.key: one for one in results.metrics if one.suite == suite}
        known = ("value", "stderr", "items")
        off = [
            key
            for key in dict.fromkeys([*said, *there])
            if [getattr(said.get(key), name, None) for name in known]
            != [getattr(there.get(key), name, None) for name in known]
        ]
        if not off:
            continue
        values = [f"{one[off[0]].value:g}" if off[0] in one else "absent" for one in (said, there)]
        more = f" and {len(off) - 1} more" if len(off) > 1 else ""
        notes.append(
            f"{folder.path}/{CHANGED}: {off[0]} is {values[0]} there and {values[1]} in "
            f"{results.suites[suite].file}{more}. The file's figures are shown; stagemix study evaluate --node "
            f"{results.node} makes results.json anew."
        )
        place = next((at for at, one in enumerate(metrics) if one.suite == suite), len(metrics))
        rest = [one for one in metrics if one.suite != suite]
        metrics = [
            *rest[:place],
            *(said[key] if key in said and key not in off else there[key] for key in there),
            *rest[place:],
        ]
    return results if metrics == list(results.metrics) else replace(results, metrics=tuple(metrics))


def _suites(folder: NodeFolder, results: NodeResults, notes: list[str]) -> dict[str, Mapping[str, Any]]:
    """Records of the suites' files, by suite; what is gone or was changed since is named, and has no items."""
    found: dict[str, Mapping[str, Any]] = {}
    for suite, entry in results.suites.items():
        path = folder.path / entry.file
        if not path.is_file():
            notes.append(f"{path} is gone: figures of suite {suite} are shown, and not compared item by item.")
            continue
        if sha256_of(path) != entry.sha256:
            notes.append(
                f"{path} is another file than results.json was made from: its items are not used; "
                f"stagemix study evaluate --node {results.node} makes both anew."
            )
            continue
        found[suite] = read_record(path)
    return found


def _missing(planned: PlannedStudy, nodes: Mapping[str, ReportNode]) -> list[str]:
    """Nodes that are not trained, and those that should be evaluated and are not, each in words."""
    ends = {arm.path[-1] for arm in planned.graph.arms}
    every = planned.study.words.results.nodes == "all"
    words = []
    for name, one in nodes.items():
        arms = ", ".join(one.node.arms)
        if not one.trained:
            state = one.state
            why = state.state if state.state != "waiting" else "not begun"
            if state.state in ("stopped", "failed", "training") and state.steps:
                why += f" at step {state.step:,} of {state.steps:,}"
            reason = f": {state.reason}" if state.reason and state.state in ("failed", "blocked", "stopped") else ""
            words.append(f"{one.ends} is not trained ({why}{reason}); needed by {arms}")
        elif one.results is None and (every or name in ends):
            words.append(f"{one.ends} is not evaluated; needed by {arms}")
        elif one.results is not None:
            for part, why in one.results.failed.items():
                words.append(f"{one.ends}: {part} was not evaluated: {why}")
            for suite, tasks in one.results.missing.items():
                words.append(f"{one.ends}: suite {suite} has no data for {', '.join(tasks)}")
    return words


def _strangers(planned: PlannedStudy) -> list[str]:
    """A note where the study's folder has results of nodes that the study as it is now does not have."""
    folder = study_folder(planned).path / "nodes"
    known = set(planned.graph.nodes)
    if not folder.is_dir():
        return []
    others = sorted(path.parent.name for path in folder.glob("*/node.json") if path.parent.name not in known)
    if not others:
        return []
    shown = ", ".join(name[:8] for name in others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
    return [
        f"{folder} holds {len(others)} node{'s' if len(others) > 1 else ''} that this report does not show: {shown}. "
        "They are of other arms or seeds, or of the study before it was edited."
    ]


def _dtypes(nodes: Mapping[str, ReportNode]) -> list[str]:
    """A warning where nodes were not computed alike: rounding alone then makes some of a difference."""
    words = []
    for suite in dict.fromkeys(name for node in nodes.values() for name in node.suites):
        found = sorted({str(node.suites[suite].get("dtype")) for node in nodes.values() if suite in node.suites})
        limits = sorted({str(node.suites[suite].get("limit")) for node in nodes.values() if suite in node.suites})
        if len(found) > 1:
            words.append(f"Suite {suite} was computed in unlike dtypes, {', '.join(found)}: differences hold rounding.")
        if limits != ["None"]:
            words.append(f"Suite {suite} asked at most {', '.join(limits)} items of each task: no figures to publish.")
    return words
