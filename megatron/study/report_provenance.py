"""What a report's figures rest on: tokens by the ledgers, seeds, the study's file, versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.quantities import format_count
from megatron.config.version import VERSION
from megatron.study.report_data import StudyReport
from megatron.study.steps import TrainStep


@dataclass(frozen=True)
class Tokens:
    """Input positions trained over those naive. verified: both are of ledgers, for every node and arm; else of what is
    there · planned: of the whole study · wrong: nodes whose ledger says other than the plan · padding: of those
    trained, positions that hold no token."""

    trained: int
    naive: int
    verified: bool
    planned: tuple[int, int]
    wrong: tuple[str, ...]
    redone_steps: int
    padding: int = 0

    @property
    def ratio(self) -> float:
        """Trained over naive; 1 of nothing."""
        return self.trained / self.naive if self.naive else 1.0

    def words(self) -> str:
        """For people."""
        of = "of every node and arm" if self.verified else "as far as nodes are trained"
        again = (
            "no step was trained twice"
            if not self.redone_steps
            else (f"{self.redone_steps:,} steps were trained again after stops, from their last checkpoints")
        )
        if not self.trained:
            return f"Nothing is trained yet of {self.planned[0]:,} tokens."
        padding = f", of the former {self.padding:,} padding" if self.padding else ""
        return (
            f"By the ledgers {self.trained:,} tokens were trained once, {self.naive:,} for each arm alone{padding}: "
            f"{self.ratio:.4f} ({of}); {again}."
        )


def tokens_of(report: StudyReport) -> Tokens:
    """Counts every trained node's own tokens, and every arm's from its beginning, in the ledgers of their checkpoints.

    Of a node that was removed since, in the ledger of one that goes on from it.
    """
    graph = report.planned.graph
    once, padding, wrong, whole = 0, 0, [], True
    for name, one in report.nodes.items():
        if one.node.kind != "train":
            continue
        own = _own_tokens(report, name)
        if own is None:
            whole = False
            continue
        once += own
        padding += padding_of(report, name)
        if own != one.node.tokens:
            wrong.append(f"{one.ends}: {own:,} tokens by its ledger, {one.node.tokens:,} planned")
    naive = 0
    for arm in graph.arms:
        if (found := _whole_tokens(report, arm.path[-1])) is None:
            whole = False
        else:
            naive += found
    redone = sum(one.state.redone_steps for one in report.nodes.values())
    return Tokens(once, naive, whole, (graph.trained, graph.naive), tuple(wrong), redone, padding)


def padding_of(report: StudyReport, name: str) -> int:
    """Input positions of a training node's own stage that hold no token: by a ledger, else as an epoch has them."""
    if (record := report.own_record(name)) is not None:
        return sum(use.padding for use in record.use.values())
    step = report.nodes[name].node.step
    assert isinstance(step, TrainStep)
    stage = step.stage
    if not stage.padded:
        return 0
    epochs = ((stage.counts.get(source, 0), epoch) for source, epoch in stage.padded.items())
    return stage.tokens - round(sum(count * epoch.tokens / max(1, epoch.samples) for count, epoch in epochs))


def tokens_words(report: StudyReport, name: str) -> str:
    """A node's own input positions, and how many of them are padding."""
    node = report.nodes[name].node
    if node.kind != "train":
        return "average"
    padding = padding_of(report, name)
    return format_count(node.tokens) + (f", {format_count(padding)} padding" if padding else "")


def length_of(report: StudyReport, name: str) -> tuple[int, int]:
    """(input positions, of which padding) that training a node alone takes, as planned: of an average, all that it
    averages, as the plan counts it."""
    one = report.nodes[name].node
    own = (one.tokens, padding_of(report, name)) if one.kind == "train" else (0, 0)
    before = [length_of(report, parent) for parent in one.parents]
    return own[0] + sum(positions for positions, _ in before), own[1] + sum(padding for _, padding in before)


def _own_tokens(report: StudyReport, name: str) -> int | None:
    """A training node's own tokens by a ledger that has its stage: its own, or that of a node that goes on from it."""
    record = report.own_record(name)
    return None if record is None else int(record.stage_shapes.tokens_at(record.samples))


def _whole_tokens(report: StudyReport, name: str) -> int | None:
    """Tokens that training a node alone takes, by ledgers; of an average, of all that it averages."""
    one = report.nodes[name]
    if one.node.kind == "train":
        own = _own_tokens(report, name)
        before = [_whole_tokens(report, parent) for parent in one.node.parents]
        return None if own is None or None in before else own + sum(one for one in before if one is not None)
    parents = [_whole_tokens(report, parent) for parent in one.node.parents]
    return None if None in parents else sum(one for one in parents if one is not None)


def facts_of(report: StudyReport, tokens: Tokens) -> dict[str, str]:
    """Label by label."""
    nodes = report.nodes.values()
    study = report.planned.study
    text = study.path.read_bytes()
    facts = {
        "study": f"{report.plan['study']}, {report.plan['file']}",
        "SHA-256 of the file": hashlib.sha256(text).hexdigest(),
        "seeds": ", ".join(map(str, report.seeds)),
        "baseline": report.baseline or "none",
        "nodes": f"{len(report.nodes)}: {sum(one.trained for one in nodes)} trained, "
        f"{sum(one.results is not None for one in nodes)} evaluated",
        "tokens": tokens.words(),
        "planned": f"{tokens.planned[0]:,} tokens trained of {tokens.planned[1]:,} naive",
        "report by Stagemix": VERSION,
    }
    if versions := _versions(report):
        facts["trained by Stagemix"] = ", ".join(versions)
    if study.words.study.base is not None:
        base = study.path.parent / study.words.study.base
        facts["SHA-256 of its base"] = f"{hashlib.sha256(base.read_bytes()).hexdigest()} ({study.words.study.base})"
    for key, label in (("harness", "evaluated by"), ("dtype", "evaluated in"), ("device", "evaluated on")):
        found = sorted({str(record[key]) for one in nodes for record in one.suites.values() if record.get(key)})
        if found:
            facts[label] = ", ".join(found)
    return facts


def _versions(report: StudyReport) -> list[str]:
    """Of the programs that trained the nodes, as their checkpoints tell."""
    found: set[str] = set()
    for one in report.nodes.values():
        state = one.checkpoint / "state.json"
        if one.ledger is not None and state.is_file():
            content: Mapping[str, Any] = json.loads(state.read_bytes())
            if content.get("version"):
                found.add(str(content["version"]))
    return sorted(found)


def study_texts(report: StudyReport) -> dict[str, str]:
    """The study's file, and its base, by name."""
    study = report.planned.study
    texts = {study.path.name: study.path.read_text(encoding="utf-8")}
    if study.words.study.base is not None:
        texts[study.words.study.base] = (study.path.parent / study.words.study.base).read_text(encoding="utf-8")
    return texts
