"""A page for each arm beside the baseline: what `stagemix ledger diff` says of the checkpoints that they end with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from megatron.data.ledger import Ledger
from megatron.metrics.report_page import Cell, table
from megatron.metrics.report_style import STYLE
from megatron.planner.ledger_comparison import differences, parting, same_samples
from megatron.planner.ledger_sides import (
    aggregate_words,
    beyond_order,
    merged,
    repeated_tokens,
    repeated_words,
    side_by_side,
    totals_by_source,
)
from megatron.study.report_data import ReportNode, StudyReport
from megatron.study.report_style import OWN_STYLE
from megatron.study.steps import trained

_RECIPE = {
    "model": "model",
    "optimizer": "optimizer",
    "train": "training",
    "take": "what stages take over",
    "spikes": "spikes",
    "kernels": "kernels",
}
"""Of what a node is known by: what a ledger doesn't keep, and what it is called."""
_OF_NODE = re.compile(r"^.*/(?=nodes/[0-9a-f]{16}/)")
_MOST_PLACES = 200


@dataclass(frozen=True)
class LedgerDiff:
    """An arm's ledger (B) beside the baseline's (A), of one seed. besides: what else differs than amounts and order ·
    first: of each of the two that has an average of several behind it, the member whose ledger alone this is · facts:
    in words, the most important first."""

    arm: str
    seed: int
    same_aggregate: bool
    same_order: bool
    besides: tuple[str, ...]
    first: tuple[str, ...]
    repeated: int
    facts: tuple[str, ...]
    html: str

    def cells(self) -> tuple[str, str, str]:
        """(aggregate, order, what else differs) in a line of a table."""
        aggregate = "the same" if self.same_aggregate else "another"
        besides = ", ".join(self.besides) or "nothing"
        if self.first:
            return f"{aggregate}, of {' and '.join(self.first)} alone", "not told: an average", "not told: an average"
        return aggregate, "the same" if self.same_order else "another", besides


def diffs_of(report: StudyReport, arm: str) -> list[LedgerDiff]:
    """One for each seed of which both have a ledger. None of the baseline itself."""
    if report.baseline is None or arm == report.baseline:
        return []
    found = []
    for seed in report.seeds:
        mine, theirs = report.end(arm, seed), report.end(report.baseline, seed)
        if mine.ledger is not None and theirs.ledger is not None:
            names = (f"{report.baseline}: {theirs.ends}", f"{arm}: {mine.ends}")
            first = tuple(name for one in (report.baseline, arm) if (name := report.first_of(one)))
            besides = *beyond_order(theirs.ledger, mine.ledger), *_recipe(report, theirs, mine)
            found.append(_diff(arm, seed, (theirs.ledger, mine.ledger), names, besides, first))
    return found


def _recipe(report: StudyReport, one: ReportNode, other: ReportNode) -> list[str]:
    """What differs of the recipe of two nodes that no ledger keeps, as the study plans them."""
    graph = report.planned.graph

    def said(end: ReportNode, key: str) -> list[object]:
        ids = [graph.steps[(id(step), end.node.seed)] for step in trained(end.node.step)]
        return merged(graph.nodes[name].document.get(key) for name in ids)

    return [words for key, words in _RECIPE.items() if said(one, key) != said(other, key)]


def diff_name(arm: str, baseline: str) -> str:
    """The file of an arm's page, in the report's folder."""
    return f"diffs/{_safe(arm)}-vs-{_safe(baseline)}.html"


def diff_page(report: StudyReport, arm: str, diffs: Sequence[LedgerDiff]) -> str:
    """The document."""
    title = f"{arm} beside {report.baseline}"
    parts = [f"<section><h2>Seed {one.seed}</h2>{one.html}</section>" for one in diffs]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · ledgers</title><style>{STYLE}{OWN_STYLE}</style></head><body><main>"
        f'<header><p class="kind">Stagemix · ledgers of two arms</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(report.plan["study"])}: what both were trained on, from the checkpoints that they '
        f'end with.</p><p><a href="../index.html">the report</a></p></header>{"".join(parts)}'
        "<footer>As <code>stagemix ledger diff</code> tells it.</footer></main></body></html>\n"
    )


def _diff(
    arm: str,
    seed: int,
    ledgers: tuple[Ledger, Ledger],
    names: tuple[str, str],
    besides: tuple[str, ...],
    first: tuple[str, ...],
) -> LedgerDiff:
    a, b = ledgers
    one, other = totals_by_source(a), totals_by_source(b)
    aggregate, order = one == other, same_samples(a, b)
    repeated = repeated_tokens(b)
    parted = parting(a, b)
    where = f"they part at sample {parted.sample:,}: {parted.reason}" if parted.sample is not None else parted.reason
    same = "the same samples in the same order" if order else "not the same samples in the same order"
    facts = (
        *(
            f"an average: its ledger is that of {name}, its first member, and says nothing of the others"
            for name in first
        ),
        aggregate_words(one, other),
        *(() if first else (same, *_test_words(aggregate, order, besides))),
        where,
        f"{names[1]}: {repeated_words(repeated)}",
        f"{names[0]}: {repeated_words(repeated_tokens(a))}",
    )
    found = differences(_without_places(a), _without_places(b))
    words = [escape(one.words) for one in found[:_MOST_PLACES]]
    if len(found) > _MOST_PLACES:
        words.append(f"{len(found) - _MOST_PLACES} more: see stagemix ledger diff")
    html = (
        f'<p class="note">A: {escape(names[0])}, order {a.order_hash}<br>'
        f"B: {escape(names[1])}, order {b.order_hash}</p>"
        f'<ul class="said">{"".join(f"<li>{escape(fact)}</li>" for fact in facts)}</ul>'
        f"{_totals(one, other)}{_rows(a, b)}"
    )
    if words:
        html += f'<h3>What differs, A and B</h3><ul class="said">{"".join(f"<li>{word}</li>" for word in words)}</ul>'
    return LedgerDiff(arm, seed, aggregate, order, besides, first, sum(repeated.values()), facts, html)


def _test_words(aggregate: bool, order: bool, besides: Sequence[str]) -> tuple[str, ...]:
    """Of the same aggregate in another order: whether it is a test of order."""
    if not aggregate or order:
        return ()
    if besides:
        return (f"no test of order alone: these differ, too: {', '.join(besides)}",)
    return ("a test of order: nothing else differs",)


def _without_places(ledger: Ledger) -> Ledger:
    """The ledger with paths of averaged checkpoints below the study's folder alone: pages may be shown to others, and
    the study may be moved."""
    events = [
        {**event, "members": [{**one, "path": _OF_NODE.sub("", str(one["path"]))} for one in event["members"]]}
        if "members" in event
        else event
        for event in ledger.events
    ]
    return replace(ledger, events=events)


def _totals(a: dict[str, tuple[int, int]], b: dict[str, tuple[int, int]]) -> str:
    rows: list[list[Cell]] = []
    for name in sorted({*a, *b}):
        (samples_a, tokens_a), (samples_b, tokens_b) = a.get(name, (0, 0)), b.get(name, (0, 0))
        numbers = (samples_a, samples_b, samples_b - samples_a, tokens_b - tokens_a)
        signed = [f"{number:+,}" if place > 1 else f"{number:,}" for place, number in enumerate(numbers)]
        rows.append([("left", name), *(("", words) for words in signed)])
    return table(["source, whole run", "samples A", "samples B", "B − A", "tokens B − A"], rows, 1)


def _rows(a: Ledger, b: Ledger) -> str:
    rows: list[list[Cell]] = [
        [
            ("left", row["training_stage"]),
            ("left", row["source"]),
            ("", f"{row['samples_a']:,}"),
            ("", f"{row['samples_b']:,}"),
            ("", f"{row['samples_b'] - row['samples_a']:+,}"),
            ("", f"{row['tokens_b'] - row['tokens_a']:+,}"),
            ("", f"{row['epochs_a']:.4f}"),
            ("", f"{row['epochs_b']:.4f}"),
        ]
        for row in side_by_side(a, b)
    ]
    heads = ["stage", "source", "samples A", "samples B", "B − A", "tokens B − A", "epochs A", "epochs B"]
    return table(heads, rows, 2)


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
