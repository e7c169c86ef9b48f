"""What arms were trained on and what they learnt, over tokens: rows of metrics.jsonl along an arm's path of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import DataError
from megatron.metrics.report_data import Band, Point, ReportData, binned, planned_shares, read_metrics, realised_shares
from megatron.study.graph import PlacedArm
from megatron.study.node_config import end_step, start_step
from megatron.study.report_data import StudyReport, source_groups
from megatron.study.steps import AverageStep, Step, TrainStep

Stretch = tuple[float, float, Mapping[str, float]]
"""(start, end, share of each source) of tokens."""
_BINS = 70


@dataclass(frozen=True)
class NodeCurve:
    """One training node along the token axis [start, end]. shares: as they were trained on, or as planned where it has
    not been trained yet (`realised` says which) · losses, raw, held_out: by source, (tokens, nats a token), smoothed,
    of single steps and on held-out documents."""

    node: str
    label: str
    start: float
    end: float
    realised: bool
    shares: Sequence[Stretch]
    losses: Mapping[str, Sequence[Point]]
    raw: Mapping[str, Sequence[Point]]
    held_out: Mapping[str, Sequence[Point]]


def groups_of(report: StudyReport) -> dict[str, str]:
    """Group by source, over all arms."""
    return source_groups(report.planned)


def curves_of(report: StudyReport) -> tuple[dict[str, NodeCurve], list[str]]:
    """(curves, notes): of every training node, by id. Notes name files that are damaged."""
    groups = groups_of(report)
    curves, notes = {}, []
    for name, one in report.nodes.items():
        if one.node.kind != "train":
            continue
        try:
            rows = _rows(report, name)
        except DataError as error:
            notes.append(f"Not in the plots: {error}")
            rows = [], []
        curves[name] = _curve(report, name, groups, *rows)
    return curves, notes


def path_of(report: StudyReport, arm: PlacedArm, curves: Mapping[str, NodeCurve]) -> list[NodeCurve]:
    """The training nodes behind an arm, in the order of its tokens. Of averages: the path of the first member."""
    path: list[NodeCurve] = []
    here: str | None = arm.path[-1]
    while here is not None:
        if here in curves:
            path.append(curves[here])
        parents = report.nodes[here].node.parents
        here = parents[0] if parents else None
    return path[::-1]


def _rows(report: StudyReport, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The node's own steps and validations; none where it has no metrics yet. Raises DataError."""
    one = report.nodes[name]
    path = one.folder.path / "metrics.jsonl"
    if not path.is_file():
        return [], []
    steps, validations = read_metrics(path)
    first, last = start_step(one.node.step), end_step(one.node.step)
    return (
        [row for row in steps if first < row["step"] <= last],
        [row for row in validations if first <= row["step"] <= last],
    )


def _curve(
    report: StudyReport,
    name: str,
    groups: Mapping[str, str],
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
) -> NodeCurve:
    node = report.nodes[name].node
    assert isinstance(node.step, TrainStep)
    stage = node.step.stage
    start, end = float(stage.start_token), float(stage.start_token + stage.tokens)
    planned = {
        "name": node.label,
        "start_token": stage.start_token,
        "tokens": stage.tokens,
        "samples": stage.samples,
        "weights": stage.weights.to_json(),
    }
    data = ReportData(node.label, steps, validations, [planned], [], groups)
    shares = _realised(data, start) if steps else _planned(data)
    losses, raw, held = {}, {}, {}
    for source in data.sources:
        points = _points(steps, "loss_by_source", source)
        if points:
            losses[source], raw[source] = binned(points, _BINS), binned(points, 4 * _BINS)
        if dots := _points(validations, "validation", source):
            held[source] = dots
    return NodeCurve(name, node.label, start, end, bool(steps), shares, losses, raw, held)


def _realised(data: ReportData, start: float) -> list[Stretch]:
    stretches = realised_shares(data, 60)
    return [(max(begin, start), end, shares) for begin, end, shares in stretches]


def _planned(data: ReportData) -> list[Stretch]:
    points = planned_shares(data)
    found: list[Stretch] = []
    for (begin, shares), (end, after) in zip(points, points[1:], strict=False):
        if end > begin:
            found.append((begin, end, {name: (shares[name] + after[name]) / 2 for name in shares}))
    return found


def _points(rows: Sequence[Mapping[str, Any]], key: str, source: str) -> list[Point]:
    found = []
    for row in rows:
        value = row.get(key, {}).get(source)
        if isinstance(value, int | float) and value == value and abs(value) != float("inf"):
            found.append((float(row["consumed_tokens"]), float(value)))
    return found


def bands_of(path: Sequence[NodeCurve]) -> list[Band]:
    """The path's stages along the token axis."""
    return [Band(one.label, one.start, one.end) for one in path]


def share_of_group(report: StudyReport, arm: PlacedArm) -> float | None:
    """The share of `report.share`'s group in an arm's tokens: by ledgers, else by the plan.

    Of all tokens so far, or of the last training stage's. An average of several has the mean of its members' shares by
    its weights. None where nothing is trained.
    """
    step = report.nodes[arm.path[-1]].node.step
    named, total = _share(report, step, arm.seed, groups_of(report), report.words.share_of == "last-stage")
    return named / total if total else None


def _share(report: StudyReport, step: Step, seed: int, groups: Mapping[str, str], last: bool) -> tuple[float, float]:
    """(tokens of the group, tokens) behind a step, or of its last stage."""
    if isinstance(step, AverageStep):
        members = step.members[:1] if step.last else step.members
        found = [_share(report, member, seed, groups, last) for member in members]
        weights = [1.0] if step.last else [float(weight) for weight in step.weights]
        total = sum(weight * tokens for weight, (_, tokens) in zip(weights, found, strict=True))
        share = sum(weight * named / (tokens or 1) for weight, (named, tokens) in zip(weights, found, strict=True))
        return share * total, total
    record = report.own_record(report.planned.graph.steps[(id(step), seed)])
    uses = step.stage.source_tokens if record is None else {name: use.tokens for name, use in record.use.items()}
    named = float(sum(count for name, count in uses.items() if report.words.share in (name, groups.get(name))))
    total = float(sum(uses.values()))
    if step.before is None or last:
        return named, total
    before = _share(report, step.before, seed, groups, last)
    return before[0] + named, before[1] + total
