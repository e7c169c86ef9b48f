"""The graph of a study: each distinct training stage or average is one node, trained once, whoever needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig, RunSection, StageSection
from megatron.study.identity import Document, average_document, hash_of, train_document
from megatron.study.steps import AverageStep, ResolvedArm, Step, TrainStep, naive_tokens, trained


@dataclass
class Node:
    """One node. document: what it is known by, `id` its hash · parents: ids of what it goes on from, or averages ·
    step: as the first arm that needs it says it · labels: what arms call it · arms: those that need it, in order."""

    id: str
    seed: int
    step: Step
    document: Document
    parents: tuple[str, ...]
    labels: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What the first arm that needs it calls it."""
        return self.labels[0]

    @property
    def tokens(self) -> int:
        """Tokens that it trains on; 0 of an average."""
        return self.step.stage.tokens if isinstance(self.step, TrainStep) else 0

    @property
    def kind(self) -> str:
        """ "train" or "average"."""
        return "train" if isinstance(self.step, TrainStep) else "average"


@dataclass(frozen=True)
class PlacedArm:
    """An arm with one seed. path: ids of its steps, in order · naive: tokens of training it alone."""

    name: str
    seed: int
    experiment: str
    path: tuple[str, ...]
    naive: int


@dataclass(frozen=True)
class Graph:
    """nodes: by id, parents before children · arms: for each seed and arm · steps: ids by a step's id() and seed ·
    averaged: by id of a training node, steps whose checkpoints averages need besides its last."""

    nodes: Mapping[str, Node]
    arms: tuple[PlacedArm, ...]
    steps: Mapping[tuple[int, int], str]
    averaged: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def naive(self) -> int:
        """Tokens of training every arm alone."""
        return sum(arm.naive for arm in self.arms)

    @property
    def trained(self) -> int:
        """Tokens of training every node once."""
        return sum(node.tokens for node in self.nodes.values())

    def needed(self, ids: Iterable[str]) -> set[str]:
        """Nodes that must be there for these, themselves included."""
        found: set[str] = set()
        queue = list(ids)
        while queue:
            here = queue.pop()
            if here not in found:
                found.add(here)
                queue += self.nodes[here].parents
        return found

    def run_config(self, name: str, output: str) -> RunConfig:
        """The config of the run that trains a node: its whole chain of training stages, to be resumed from what is
        before it. Trunks are said as their own nodes say them, whatever the arm calls them: resumes compare names.
        Checkpoints that averages need are kept for good.

        output: the study's folder; the run's is below it, by the node's id.
        """
        step = self.nodes[name].step
        assert isinstance(step, TrainStep)
        stages: list[StageSection] = []
        templates: dict[str, StageSection] = {}
        for section, known in self._chain(step, self.nodes[name].seed):
            names = {stage.name for stage in stages}
            title = section.name
            while title in names:
                title += "+"
            stages.append(section.model_copy(update={"name": title}))
            templates = {one.name: one for one in known} | templates
        names = {stage.name for stage in stages}
        run = RunSection(
            name=f"{self.nodes[name].label}-{name[:8]}", output=f"{output}/nodes/{name}", seed=self.nodes[name].seed
        )
        kept = [template for template in templates.values() if template.name not in names]
        update: dict[str, Any] = {"run": run, "stages": stages, "templates": kept}
        if averaged := self.averaged.get(name):
            saves = step.config.checkpoint
            steps = sorted({*saves.keep_steps, *averaged})
            update["checkpoint"] = saves.model_copy(update={"keep_steps": steps})
        return step.config.model_copy(update=update)

    def _chain(self, step: TrainStep, seed: int) -> list[tuple[StageSection, list[StageSection]]]:
        """Each training stage behind a step, in the words of its node, with the templates that these may refer to."""
        found = []
        for one in trained(step):
            said = self.nodes[self.steps[(id(one), seed)]].step
            assert isinstance(said, TrainStep)
            found.append((said.section, said.config.templates))
        return found

    def tokens_of(self, arms: Sequence[PlacedArm]) -> tuple[int, int]:
        """(trained once, trained for each alone) of some arms."""
        once = sum(self.nodes[node].tokens for node in self.needed(arm.path[-1] for arm in arms))
        return once, sum(arm.naive for arm in arms)


def graph_of(
    arms: Mapping[str, ResolvedArm], seeds: Sequence[int], others: Mapping[str, ResolvedArm] | None = None
) -> Graph:
    """The nodes that arms need, for every seed. others: all arms of the study, where these are some of them: what their
    averages need is kept, too.

    Raises ConfigError for an average of one and the same node.
    """
    builder = _Builder({name: arm.place for name, arm in {**(others or {}), **arms}.items()})
    placed = []
    for seed in seeds:
        for arm in arms.values():
            path = tuple(builder.node(step, seed).id for step in arm.steps)
            for node in builder.behind(path[-1]):
                if arm.name not in node.arms:
                    node.arms.append(arm.name)
            placed.append(PlacedArm(arm.name, seed, arm.experiment, path, naive_tokens(arm.end)))
    averaged = _averaged({**(others or {}), **arms}, seeds)
    return Graph(builder.nodes, tuple(placed), {key: node.id for key, node in builder.known.items()}, averaged)


def _averaged(arms: Mapping[str, ResolvedArm], seeds: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """By id of a training node, the steps whose checkpoints averages need besides its last."""
    builder, found = _Builder({name: arm.place for name, arm in arms.items()}), dict[str, set[int]]()
    for seed in seeds:
        for arm in arms.values():
            for step in arm.steps:
                if isinstance(step, AverageStep) and step.last:
                    found.setdefault(builder.node(step.members[0], seed).id, set()).update(step.last_steps[1:])
    return {name: tuple(sorted(steps)) for name, steps in found.items()}


class _Builder:
    """places: of arms, for messages."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self.nodes: dict[str, Node] = {}
        self.known: dict[tuple[int, int], Node] = {}

    def node(self, step: Step, seed: int) -> Node:
        """The node of a step, made when it is first asked for."""
        if (found := self.known.get((id(step), seed))) is not None:
            return found
        if isinstance(step, AverageStep):
            above = [self.node(member, seed).id for member in step.members]
            if len(set(above)) == 1 and not step.last:
                raise ConfigError(
                    f"{self._places[step.arm]}: arm {step.arm!r}: stage {step.label!r} averages "
                    f"{', '.join(f'{member.arm}/{member.label}' for member in step.members)}, which are one and the "
                    "same node, so there is nothing to average: name stages that differ, or use last = N"
                )
            document = average_document(step, above, self.node(trained(step)[-1], seed).id)
        else:
            above = [self.node(step.before, seed).id] if step.before is not None else []
            document = train_document(step, seed, above[0] if above else None, self._position(step, seed))
        name = hash_of(document)
        node = self.nodes.setdefault(name, Node(name, seed, step, document, tuple(dict.fromkeys(above))))
        if step.label not in node.labels:
            node.labels.append(step.label)
        self.known[(id(step), seed)] = node
        return node

    def behind(self, name: str) -> list[Node]:
        """A node and everything that it needs."""
        found: dict[str, Node] = {}
        queue = [name]
        while queue:
            here = self.nodes[queue.pop()]
            if here.id not in found:
                found[here.id] = here
                queue += here.parents
        return list(found.values())

    def _position(self, step: TrainStep, seed: int) -> str | None:
        """The node whose data position a training stage goes on from."""
        chain = trained(step.before)
        return self.node(chain[-1], seed).id if chain else None
