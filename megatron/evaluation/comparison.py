"""Two models of one or more results files, item by item: which task's figure differs, by how much, how surely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.config.errors import DataError
from megatron.evaluation.bleu import bleu_of
from megatron.evaluation.harness_results import ACCURACIES
from megatron.evaluation.paired import (
    FEW_ITEMS,
    RESAMPLES,
    Array,
    Difference,
    Statistic,
    differing_items,
    holm,
    resampled_differences,
    summary,
)
from megatron.evaluation.pass_at_k import pass_at_k
from megatron.evaluation.results import alike

_LOSSES = {"loss": "token_loss", "targets_loss": "targets"}
"""What is kept of documents for a metric in nats a token."""


@dataclass(frozen=True)
class Items:
    """One task of one model, item by item: counts [items, columns] whose sums `statistic` turns into the figure."""

    metric: str
    counts: Array
    statistic: Statistic
    digest: str
    lower_is_better: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a comparison. `better`: which model is, "" where the interval holds 0."""

    task: str
    metric: str
    items: int
    a: float
    b: float
    found: Difference
    better: str
    holm: float = 1.0


@dataclass(frozen=True)
class _Drawn:
    """One task's resampled differences [resamples], both figures, and how many items were answered differently."""

    differences: Array
    a: float
    b: float
    metric: str
    differing: int


def items_of(result: Mapping[str, Any], metric: str | None = None) -> Items | None:
    """The items of a task's entry for one metric, by default the one that counts; None where none were kept.

    Files of format 1 kept right and wrong alone, without knowing of which items.
    """
    records: Mapping[str, Any] = result.get("records", {})
    digest = str(records.get("digest", ""))
    right: Mapping[str, str] = records.get("correct", {})
    if not right and "correct" in result:
        first = next((name for name in ACCURACIES if name in result["metrics"]), "acc")
        right = {first: result["correct"]}
    wanted = metric or result.get("metric") or next((name for name in ACCURACIES if name in right), None)
    if wanted in right:
        values = np.array([[float(mark), 1.0] for mark in right[str(wanted)]])
        return Items(str(wanted), values, _ratio, digest)
    if (kept := _LOSSES.get(str(wanted), "")) in records:  # nats and tokens of documents (source_loss.py)
        nats_and_tokens = np.array(records[kept], dtype=np.float64)
        return Items(str(wanted), nats_and_tokens, _ratio, digest, lower_is_better=True)
    if "loss" in records and wanted in (None, "bits_per_byte"):
        losses = np.array([[-nats / math.log(2), float(size)] for nats, size in records["loss"]])
        return Items("bits_per_byte", losses, _ratio, digest, lower_is_better=True)
    if "bleu" in records and (wanted == "bleu" or "passed" not in records):
        return Items("bleu", np.array(records["bleu"], dtype=np.float64), bleu_of, digest)
    if "passed" in records and (wanted is None or wanted.startswith("pass@")):
        k = int((wanted or "pass@1").removeprefix("pass@"))
        solved = np.array([[pass_at_k(int(n), int(c), k), 1.0] for n, c in records["passed"]])
        return Items(f"pass@{k}", solved, _ratio, digest)
    return None


def compare_results(
    name_a: str,
    results_a: Mapping[str, Mapping[str, Any]],
    name_b: str,
    results_b: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[list[Row], list[str]]:
    """(rows, notes): a row a task that both have, then a row a group of two or more of these; notes name the rest.

    groups: names of tasks by group. A group's figure is the plain mean over its tasks; its resamples are those of its
    tasks, each drawn by itself. Raises DataError where the two answered different items.
    """
    rows: list[Row] = []
    notes: list[str] = []
    draws: dict[str, _Drawn] = {}
    for number, task in enumerate(results_a):
        if task not in results_b:
            continue
        a, b = items_of(results_a[task]), items_of(results_b[task])
        if a is None or b is None or a.metric != b.metric:
            notes.append(f"{task}: no items of the same metric were kept for both, so it is not compared")
            continue
        if a.counts.shape != b.counts.shape or a.digest and b.digest and a.digest != b.digest:
            raise DataError(
                f"task {task}: {name_a} and {name_b} did not answer the same items ({len(a.counts)} and "
                f"{len(b.counts)}): evaluate both on the same data, with the same --limit"
            )
        if not (a.digest and b.digest):
            notes.append(f"{task}: from a file of format 1, which cannot tell whether the items were the same")
        figures = float(a.statistic(a.counts.sum(axis=0))), float(b.statistic(b.counts.sum(axis=0)))
        drawn = resampled_differences(a.counts, b.counts, a.statistic, resamples, seed + number)
        differing = differing_items(a.counts, b.counts)
        found = summary(figures[1] - figures[0], drawn, differing)
        rows.append(_row(task, a.metric, len(a.counts), figures, found, (name_a, name_b), a.lower_is_better))
        if not a.lower_is_better:
            draws[task] = _Drawn(drawn, *figures, a.metric, differing)
    for group, tasks in groups.items():
        present = [task for task in tasks if task in draws]
        if len(present) > 1 and alike(draws[task].metric for task in present):
            rows.append(_group_row(group, present, len(tasks), draws, (name_a, name_b)))
    if few := [f"{row.task} ({row.items})" for row in rows if 0 < row.items < FEW_ITEMS]:
        notes.append(f"warning: few items, so intervals are too narrow (below about {FEW_ITEMS}): {', '.join(few)}")
    adjusted = holm([row.found.p for row in rows])
    return [Row(**{**vars(row), "holm": p}) for row, p in zip(rows, adjusted, strict=True)], notes


def _group_row(
    group: str,
    tasks: Sequence[str],
    of: int,
    draws: Mapping[str, _Drawn],
    names: tuple[str, str],
) -> Row:
    parts = [draws[task] for task in tasks]
    a, b = sum(part.a for part in parts) / len(parts), sum(part.b for part in parts) / len(parts)
    drawn = np.mean([part.differences for part in parts], axis=0)
    whole = f"mean of {len(tasks)}" if len(tasks) == of else f"mean of {len(tasks)} of {of}"
    found = summary(b - a, drawn, sum(part.differing for part in parts))
    return _row(f"[{group}]", whole, 0, (a, b), found, names, False)


def _row(
    task: str,
    metric: str,
    items: int,
    figures: tuple[float, float],
    found: Difference,
    names: tuple[str, str],
    lower_is_better: bool,
) -> Row:
    better = ""
    if found.low > 0 or found.high < 0:
        better = names[(found.value > 0) != lower_is_better]
    return Row(task, metric, items, *figures, found, better)


def comparison_table(name_a: str, name_b: str, rows: Sequence[Row]) -> list[str]:
    """The rows for the terminal."""
    width = max([12, *(len(row.task) for row in rows)])
    columns = f"{'task':<{width}}  {'metric':<16} {'items':>6}  {name_a[:12]:>12} {name_b[:12]:>12}"
    lines = [f"{columns}  {'difference':>10}  {'95 % interval':>19}  {'p':>7}  {'Holm':>7}  better"]
    for row in rows:
        found = row.found
        figures = f"{row.a:>12.4f} {row.b:>12.4f}  {found.value:>+10.4f}  [{found.low:>+8.4f}, {found.high:>+8.4f}]"
        items = f"{row.items:,}" if row.items else ""
        certain = f"{found.p:>7.4f}  {row.holm:>7.4f}"
        lines.append(f"{row.task:<{width}}  {row.metric:<16} {items:>6}  {figures}  {certain}  {row.better}".rstrip())
    return lines


def _ratio(sums: Array) -> Array:
    found: Array = sums[..., 0] / sums[..., 1]
    return found
