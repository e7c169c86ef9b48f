"""The tables of a study's report: arms by figures for each experiment, with what is told from the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from megatron.evaluation.paired import FEW_ITEMS, Difference, holm
from megatron.study.node_results import WIN_RATE
from megatron.study.report_columns import Column, Value
from megatron.study.report_data import ReportNode, StudyReport
from megatron.study.report_statistics import contrast, mean_and_sd, relative_change

Place = TypeVar("Place")


@dataclass(frozen=True)
class Contrast:
    """An arm beside another. seeds: those that both have, which alone were compared · relative: percent of the
    baseline, + better · found: None where nothing is known of the noise · means: of the arm and of the other over these
    seeds · holm: its p-value among all of its family; None without one."""

    seeds: tuple[int, ...]
    difference: float
    relative: float | None
    found: Difference | None
    means: tuple[float, float]
    same_node: bool = False
    holm: float | None = None

    def told(self, alpha: float) -> bool:
        """Whether the two are told from each other."""
        return self.holm is not None and self.holm < alpha


@dataclass(frozen=True)
class Entry:
    """A figure of an arm. values: by seed · mean, sd: over them · stderr: over items, where there is one seed · seeds:
    how many the study has · beside: the baseline, None for itself and where nothing can be compared · apart: both have
    the figure, and no seed in common · best: no arm is better, and it is told from all."""

    values: Mapping[int, Value]
    mean: float
    sd: float | None
    stderr: float | None
    seeds: int = 1
    beside: Contrast | None = None
    apart: bool = False
    best: bool = False


@dataclass(frozen=True)
class Table:
    """One experiment's. rows: arms, the baseline first · entries: by arm and column; absent where nothing is known ·
    family: how many comparisons Holm's correction is over."""

    experiment: str
    arms: tuple[str, ...]
    columns: tuple[Column, ...]
    entries: Mapping[tuple[str, str], Entry]
    baseline: str | None
    family: int

    def entry(self, arm: str, column: Column) -> Entry | None:
        """A cell."""
        return self.entries.get((arm, column.key))

    def compared(self) -> list[tuple[str, Contrast]]:
        """(arm, its comparison) of every cell whose noise is known."""
        return [
            (arm, one.beside)
            for (arm, _), one in self.entries.items()
            if one.beside is not None and one.beside.found is not None
        ]

    def usual_half(self, column: Column) -> float | None:
        """The middle one of the half widths of a column's intervals."""
        halves = [
            (one.beside.found.high - one.beside.found.low) / 2
            for arm in self.arms
            if (one := self.entry(arm, column)) is not None
            and one.beside is not None
            and one.beside.found is not None
            and one.beside.found.high > one.beside.found.low
        ]
        return statistics.median(halves) if halves else None


def tables_of(report: StudyReport, columns: Sequence[Column]) -> list[Table]:
    """A table for each experiment, in the file's order; the baseline stands first in each."""
    groups: dict[str, list[str]] = {}
    for arm in report.arms:
        groups.setdefault(report.experiment(arm), []).append(arm)
    tables = []
    for experiment, arms in groups.items():
        if report.baseline is not None:
            arms = [report.baseline, *(arm for arm in arms if arm != report.baseline)]
        if len(arms) > 1 or len(groups) == 1:
            tables.append(_table(report, experiment, arms, columns))
    return tables


def _table(report: StudyReport, experiment: str, arms: Sequence[str], columns: Sequence[Column]) -> Table:
    entries: dict[tuple[str, str], Entry] = {}
    for column in columns:
        for arm in arms:
            if (entry := _entry(report, arm, column)) is not None:
                entries[arm, column.key] = entry
    by_key = {column.key: column for column in columns}
    for (arm, key), entry in entries.items():
        if report.baseline is None or arm == report.baseline:
            continue
        if key.startswith(f"{WIN_RATE}/"):
            entries[arm, key] = replace(entry, beside=_against_half(report, by_key[key], arm, entry))
        elif (report.baseline, key) in entries:
            beside = _contrast(report, by_key[key], arm, report.baseline)
            entries[arm, key] = replace(entry, beside=beside, apart=beside is None)
    corrected = _corrected({place: one.beside for place, one in entries.items() if one.beside is not None})
    for place, beside in corrected.items():
        entries[place] = replace(entries[place], beside=beside)
    for column in columns:
        for arm in _best(report, column, [arm for arm in arms if (arm, column.key) in entries], entries):
            entries[arm, column.key] = replace(entries[arm, column.key], best=True)
    shown = tuple(column for column in columns if any((arm, column.key) in entries for arm in arms))
    family = sum(one.holm is not None for one in corrected.values())
    return Table(experiment, tuple(arms), shown, entries, report.baseline, family)


def ends_with(report: StudyReport, arm: str, column: Column) -> dict[int, ReportNode]:
    """The nodes that an arm ends with and that have the figure, by seed."""
    nodes = {seed: report.end(arm, seed) for seed in report.seeds}
    return {seed: node for seed, node in nodes.items() if node.node.id in column.values}


def _entry(report: StudyReport, arm: str, column: Column) -> Entry | None:
    values = {seed: column.values[node.node.id] for seed, node in ends_with(report, arm, column).items()}
    if not values:
        return None
    mean, sd = mean_and_sd([one.value for one in values.values()])
    stderr = next(iter(values.values())).stderr if sd is None else None
    return Entry(values, mean, sd, stderr, len(report.seeds))


def _contrast(report: StudyReport, column: Column, arm: str, other: str) -> Contrast | None:
    """`arm` minus `other`, over the seeds that both have; None where they have none in common."""
    mine, theirs = ends_with(report, arm, column), ends_with(report, other, column)
    seeds = sorted({*mine} & {*theirs})
    if not seeds:
        return None
    a = {seed: column.values[mine[seed].node.id].value for seed in seeds}
    b = {seed: column.values[theirs[seed].node.id].value for seed in seeds}
    middle, base = mean_and_sd(list(a.values()))[0], mean_and_sd(list(b.values()))[0]
    relative = relative_change(middle, base, column.higher_is_better)
    if all(mine[seed].node.id == theirs[seed].node.id for seed in seeds):
        return Contrast(tuple(seeds), 0.0, relative, None, (middle, base), same_node=True)
    found = contrast(
        a,
        b,
        {seed: column.draws[node.node.id] for seed, node in mine.items() if node.node.id in column.draws},
        {seed: column.draws[node.node.id] for seed, node in theirs.items() if node.node.id in column.draws},
        column.differing_over((theirs[seed].node.id, mine[seed].node.id) for seed in seeds),
        max((len(drawn) for drawn in column.draws.values()), default=report.words.resamples),
    )
    return Contrast(tuple(seeds), middle - base, relative, found, (middle, base))


def _against_half(report: StudyReport, column: Column, arm: str, entry: Entry) -> Contrast | None:
    """A win rate is a comparison with the baseline already: it is held against one half. Of one seed with the judge's
    p-value, the exact sign test over pairs; of several by their spread. None where it was won against another node."""
    mine = ends_with(report, arm, column)
    for seed, node in mine.items():
        against = node.results.win_rate if node.results is not None else None
        if against is None or against["against"] != report.end(report.baseline or "", seed).node.id:
            return None
    if entry.sd is None:
        (node,) = mine.values()
        p = node.results.win_rate["p"] if node.results is not None and node.results.win_rate is not None else None
        half = 1.96 * (entry.stderr or 0.0)
        off = entry.mean - 0.5
        found = Difference(off, off - half, off + half, float(p)) if p is not None else None
        return Contrast(tuple(mine), off, None, found, (entry.mean, 0.5))
    values = {seed: column.values[node.node.id].value for seed, node in mine.items()}
    found = contrast(values, dict.fromkeys(values, 0.5), {}, {}, 0, report.words.resamples)
    return Contrast(tuple(mine), entry.mean - 0.5, None, found, (entry.mean, 0.5))


def _corrected(contrasts: Mapping[Place, Contrast]) -> dict[Place, Contrast]:
    """The same with Holm's p-values over all of them that have one."""
    tested = [place for place, one in contrasts.items() if one.found is not None]
    values = holm([one.p for place in tested if (one := contrasts[place].found) is not None])
    return dict(contrasts) | {place: replace(contrasts[place], holm=p) for place, p in zip(tested, values, strict=True)}


def _best(
    report: StudyReport, column: Column, arms: Sequence[str], entries: Mapping[tuple[str, str], Entry]
) -> list[str]:
    """The arm with the best mean, if it is told from every other: Holm over these comparisons, and beside the baseline
    over the whole table. With the arms that are the same nodes."""
    if len(arms) < 2:
        return []
    sign = 1 if column.higher_is_better else -1
    top = max(arms, key=lambda arm: sign * entries[arm, column.key].mean)
    beside = {arm: _contrast(report, column, top, arm) for arm in arms if arm != top}
    alike = [arm for arm, one in beside.items() if one is not None and one.same_node]
    others = {arm: one for arm, one in beside.items() if arm not in alike}
    known = _corrected({arm: one for arm, one in others.items() if one is not None})
    better = (one.told(report.words.alpha) and sign * one.difference > 0 for one in known.values())
    told = bool(others) and len(known) == len(others) and all(better)
    if report.baseline in arms:
        beyond = others if report.baseline in (top, *alike) else [top]
        beside_base = [entries[arm, column.key].beside for arm in beyond]
        told = told and all(one is not None and one.told(report.words.alpha) for one in beside_base)
    return [top, *alike] if told else []


def few_items(columns: Iterable[Column]) -> list[str]:
    """Titles of columns with so few items that percentile intervals are too narrow."""
    return [
        f"{one.title} ({least})"
        for one in columns
        if one.draws and 0 < (least := min(value.items for value in one.values.values())) < FEW_ITEMS
    ]
