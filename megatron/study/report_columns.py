"""The columns of a study's table: figures that count, and named scores, each by node, with resamples of their items."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from megatron.evaluation.comparison import Items, items_of
from megatron.evaluation.paired import Array
from megatron.evaluation.results import alike
from megatron.metrics.in_loop import main_metric
from megatron.study.node_results import LOSS, WIN_RATE, Figure
from megatron.study.report_data import StudyReport
from megatron.study.report_statistics import resampled_figures

SHARE_METRICS = ("acc", "exact_match", "pass@", "win_rate")
MEAN = "mean"
"""The metric of a group's mean in results.json."""


@dataclass(frozen=True)
class Value:
    """A column's figure at a node. stderr: over items, of a score as of independent figures; None where not known."""

    value: float
    stderr: float | None
    items: int


@dataclass(frozen=True)
class Column:
    """One figure of every node that has it. key: "SUITE/TASK/METRIC", of a score its name · parts: keys that a score
    is the mean of · values, draws: by node; draws [resamples] are of the same items for all nodes that have them ·
    answers: each node's items [items, columns], of every part · chance: what guessing gives."""

    key: str
    title: str
    kind: str
    higher_is_better: bool
    values: Mapping[str, Value]
    parts: tuple[str, ...] = ()
    draws: Mapping[str, Array] = field(default_factory=dict)
    answers: Mapping[str, Sequence[Array]] = field(default_factory=dict)
    chance: float | None = None

    @property
    def score(self) -> bool:
        """Whether it is a named mean of others."""
        return bool(self.parts)

    def differing_over(self, pairs: Iterable[tuple[str, str]]) -> int:
        """Items that the nodes of any pair answered differently: an item counts once, however many seeds it is in."""
        marks: list[Array] = []
        for a, b in pairs:
            for number, (one, other) in enumerate(zip(self.answers.get(a, ()), self.answers.get(b, ()), strict=False)):
                apart = (one != other).any(axis=1)
                if number < len(marks):
                    marks[number] = marks[number] | apart
                else:
                    marks.append(apart)
        return sum(int(mark.sum()) for mark in marks)


def kind_of(metric: str) -> str:
    """What a metric is, so that only like ones are averaged: "share" of items, else its own name."""
    return "share" if metric.startswith(SHARE_METRICS) else metric


def columns_of(report: StudyReport) -> tuple[list[Column], list[str]]:
    """(columns, notes): scores first, then single figures in the order of results, losses last.

    The columns that count are one metric a task (the suite's, else the usual one) and the loss by source, but for those
    that are a score by themselves; `report.metrics` chooses others. Notes name patterns that match nothing and figures
    that are not compared.
    """
    notes: list[str] = []
    figures = _figures(report)
    counting = _counting(report, figures)
    words = report.words
    shown = _chosen(words.metrics, figures, counting, "report.metrics", notes) if words.metrics else counting
    made: dict[str, Column] = {}
    resamples = _resamples(report, len(shown) + len(_scores(report, figures, counting)))

    def column(key: str) -> Column:
        if key not in made:
            made[key] = _column(report, key, figures[key], resamples, notes)
        return made[key]

    scores = []
    for name, patterns in _scores(report, figures, counting).items():
        keys = _chosen(patterns, figures, counting, f"report.scores.{name}", notes)
        if keys and (found := _score(name, [column(key) for key in keys], notes)) is not None:
            scores.append(found)
    alone = {score.parts[0] for score in scores if len(score.parts) == 1 and not words.metrics}
    return [*scores, *(column(key) for key in shown if key not in alone)], notes


def _resamples(report: StudyReport, columns: int) -> int:
    """As many as the study says, and at least so many that the least p-value there can be, 2 / (1 + resamples), stays
    below half of alpha when Holm multiplies it by all comparisons of the largest table."""
    experiments = [report.experiment(arm) for arm in report.arms]
    family = columns * max(experiments.count(one) for one in set(experiments))
    return max(report.words.resamples, math.ceil(4 * family / report.words.alpha))


def _figures(report: StudyReport) -> dict[str, dict[str, Figure]]:
    """Every figure of every node: by key, then node. Means of groups are left to scores."""
    found: dict[str, dict[str, Figure]] = {}
    for name, node in report.nodes.items():
        for figure in node.results.metrics if node.results is not None else ():
            if figure.metric != MEAN and math.isfinite(figure.value):
                found.setdefault(figure.key, {})[name] = figure
    return found


def _counting(report: StudyReport, figures: Mapping[str, Mapping[str, Figure]]) -> list[str]:
    """Keys of the metric of each task that counts."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for by_node in figures.values():
        figure = next(iter(by_node.values()))
        tasks.setdefault((figure.suite, figure.task), []).append(figure.metric)
    keys = []
    for (suite, task), metrics in tasks.items():
        records = (node.suites[suite] for node in report.nodes.values() if suite in node.suites)
        known = (record.get("tasks", {}).get(task, {}).get("metric") for record in records)
        said = LOSS if suite == LOSS else next((metric for metric in known if metric), None)
        keys.append(f"{suite}/{task}/{main_metric(metrics, said)}")
    return sorted(keys, key=lambda key: key.startswith(f"{LOSS}/"))


def _matches(key: str, pattern: str, figures: Mapping[str, Mapping[str, Figure]], counting: Sequence[str]) -> bool:
    """Whether a pattern means a figure: by its whole key where it has three parts, else by suite and task, task or
    group, and then only the metric that counts."""
    if pattern.count("/") >= 2:
        return fnmatchcase(key, pattern)
    figure = next(iter(figures[key].values()))
    names = (f"{figure.suite}/{figure.task}", figure.task, figure.group)
    return key in counting and any(fnmatchcase(name, pattern) for name in names if name)


def _chosen(
    patterns: Sequence[str],
    figures: Mapping[str, Mapping[str, Figure]],
    counting: Sequence[str],
    place: str,
    notes: list[str],
) -> list[str]:
    chosen: dict[str, None] = {}
    order = [*counting, *(key for key in figures if key not in counting)]
    for pattern in patterns:
        found = [key for key in order if _matches(key, pattern, figures, counting)]
        if not found and figures:
            tasks = ", ".join(counting[:8]) + (", …" if len(counting) > 8 else "")
            notes.append(f"{place}: {pattern!r} is no figure of any node. Figures that count are: {tasks}.")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _scores(
    report: StudyReport, figures: Mapping[str, Mapping[str, Figure]], counting: Sequence[str]
) -> Mapping[str, Sequence[str]]:
    """Patterns by score; where the study says none, of each group the shares of its tasks, or its losses."""
    if report.words.scores:
        return report.words.scores
    groups: dict[str, dict[str, list[str]]] = {}
    for key in counting:
        figure = next(iter(figures[key].values()))
        if figure.group and figure.suite != WIN_RATE:
            groups.setdefault(figure.group, {}).setdefault(kind_of(figure.metric), []).append(key)
    return {group: kinds.get("share") or next(iter(kinds.values())) for group, kinds in groups.items()}


# -- one column --------------------------------------------------------------------------------------------------------


def _column(report: StudyReport, key: str, by_node: Mapping[str, Figure], resamples: int, notes: list[str]) -> Column:
    figure = next(iter(by_node.values()))
    values = {name: Value(one.value, one.stderr, one.items) for name, one in by_node.items()}
    items = _items(report, figure, by_node, notes)
    draws: dict[str, Array] = {}
    if items:
        counts = np.stack([one.counts for one in items.values()])
        statistic = next(iter(items.values())).statistic
        # a figure's resamples are the same in every report of as many
        resampled = resampled_figures(counts, statistic, resamples, zlib.crc32(key.encode()))
        draws = dict(zip(items, resampled, strict=True))
    records = [node.suites[figure.suite] for node in report.nodes.values() if figure.suite in node.suites]
    known = [record.get("tasks", {}).get(figure.task, {}) for record in records]
    chance = next((one["chance"] for one in known if one.get("chance") is not None), None)
    return Column(
        key,
        _title(figure),
        kind_of(figure.metric),
        figure.higher_is_better or kind_of(figure.metric) == "share",
        values,
        draws=draws,
        answers={name: [one.counts] for name, one in items.items()},
        chance=chance if figure.metric.startswith("acc") else None,
    )


def _title(figure: Figure) -> str:
    if figure.suite == WIN_RATE:
        return f"win rate {figure.task}"
    return f"{figure.metric} {figure.task}" if figure.suite == LOSS else f"{figure.task} {figure.metric}"


def _items(report: StudyReport, figure: Figure, by_node: Mapping[str, Figure], notes: list[str]) -> dict[str, Items]:
    """Items of the arms' ends that answered the same ones; those that most did, where there are several sets."""
    found: dict[str, Items] = {}
    ends = {arm.path[-1] for arm in report.planned.graph.arms}
    for name in (name for name in by_node if name in ends):
        record = report.nodes[name].suites.get(figure.suite)
        result = record["models"][0]["results"].get(figure.task) if record is not None else None
        items = items_of(result, figure.metric) if result is not None else None
        if items is not None and items.metric == figure.metric and len(items.counts):
            found[name] = items
    sets: dict[tuple[object, ...], list[str]] = {}
    for name, items in found.items():
        sets.setdefault((items.digest, items.counts.shape), []).append(name)
    if len(sets) < 2:
        return found
    most = max(sets.values(), key=len)
    others = ", ".join(report.nodes[name].ends for name in found if name not in most)
    notes.append(f"{figure.suite}/{figure.task}: {others} answered other items than the rest: shown, and not compared.")
    return {name: found[name] for name in most}


def _score(name: str, parts: Sequence[Column], notes: list[str]) -> Column | None:
    """The plain mean of columns at every node that has them all."""
    if len({part.higher_is_better for part in parts}) > 1 or not _averages(parts):
        kinds = ", ".join(f"{part.key} ({part.kind})" for part in parts[:4])
        notes.append(
            f"Score {name!r} is not shown: it would average unlike figures, {kinds}. Give patterns of one kind."
        )
        return None
    nodes = [node for node in parts[0].values if all(node in part.values for part in parts)]
    partly = {node for part in parts for node in part.values} - set(nodes)
    if partly:
        notes.append(f"Score {name!r} is left out for {len(partly)} nodes that have only some of its figures.")
    values = {}
    for node in nodes:
        of = [part.values[node] for part in parts]
        errors = [one.stderr for one in of]
        stderr = None
        if all(error is not None for error in errors):
            stderr = math.sqrt(sum(error**2 for error in errors if error is not None)) / len(of)
        values[node] = Value(sum(one.value for one in of) / len(of), stderr, sum(one.items for one in of))
    drawn = [node for node in nodes if all(node in part.draws for part in parts)]
    first = parts[0]
    chances = [part.chance for part in parts]
    return replace(
        first,
        key=name,
        title=name,
        values=values,
        parts=tuple(part.key for part in parts),
        draws={node: np.mean([part.draws[node] for part in parts], axis=0) for node in drawn},
        answers={node: [answers for part in parts for answers in part.answers[node]] for node in drawn},
        chance=None if None in chances else sum(one for one in chances if one is not None) / len(chances),
    )


def _averages(parts: Sequence[Column]) -> bool:
    """Whether a mean over these is a figure: shares of items, or all of one other kind."""
    kinds = {part.kind for part in parts}
    return len(kinds) == 1 and alike(part.kind for part in parts)
