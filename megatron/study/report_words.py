"""What a study's report says in words, made from its figures: numbers as they are printed, and the headline."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.config.quantities import format_count
from megatron.study.report_columns import Column
from megatron.study.report_data import StudyReport
from megatron.study.report_provenance import length_of
from megatron.study.report_tables import Contrast, Entry, Table, few_items

MINUS = "−"
_SAME_LENGTH = 0.02
_TOLD = "told from it"


def number(value: float, column: Column) -> str:
    """A figure: shares of items as percent."""
    return f"{100 * value:.1f}" if column.kind == "share" else f"{value:.4f}"


def signed(value: float, column: Column) -> str:
    """A difference: of shares in percentage points."""
    words = f"{100 * value:+.1f}" if column.kind == "share" else f"{value:+.4f}"
    return words.replace("-", MINUS)


def unit(column: Column) -> str:
    """What stands behind a column's title."""
    return "%" if column.kind == "share" else ""


def value_words(entry: Entry, column: Column) -> str:
    """ "41.5 ± 1.2 (3)" over three seeds; "41.5 ± 3.5" with the standard error over items, "41.5 ± 3.5 (1)" where the
    study has more seeds than that one."""
    words = number(entry.mean, column)
    count = f" ({len(entry.values)})" if entry.seeds > 1 else ""
    if entry.sd is not None:
        return f"{words} ± {number(entry.sd, column)} ({len(entry.values)})"
    return words + count if entry.stderr is None else f"{words} ± {number(entry.stderr, column)}{count}"


def change_words(beside: Contrast) -> str:
    """ "+8.2 %": percent of the baseline, + for better."""
    if beside.same_node:
        return "the same model"
    if beside.relative is None:
        return ""
    words = f"{beside.relative:+.1f} %"
    return "0.0 %" if words in ("+0.0 %", "-0.0 %") else words.replace("-", MINUS)


def cell_change_words(entry: Entry, start: Entry | None) -> str:
    """What stands below a figure: its change, and over which seeds where the figure or the baseline's, `start`, has
    others, too, so that the two figures in the table come to another change."""
    if entry.apart:
        return "no seed in common"
    if entry.beside is None or not (words := change_words(entry.beside)):
        return ""
    mine, theirs = set(entry.values), set(start.values) if start is not None else set(entry.values)
    common = entry.beside.seeds
    if mine == theirs:
        return words
    return f"{words} (seed{'s' if len(common) > 1 else ''} {', '.join(map(str, common))} of both)"


def interval_words(beside: Contrast, column: Column) -> str:
    """ "+3.1 [+0.4, +5.9]"."""
    words = signed(beside.difference, column)
    if beside.found is None:
        return words
    return f"{words} [{signed(beside.found.low, column)}, {signed(beside.found.high, column)}]"


def p_words(p: float | None) -> str:
    """Three digits, or below what is worth telling."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def title_of(table: Table) -> str:
    """The head of an experiment's part."""
    return table.experiment or "Arms"


def headline(report: StudyReport, tables: Sequence[Table]) -> list[str]:
    """What is found in all, and how far it can be trusted, in sentences: of each table how many differences are told,
    and the scores whose best arm is told from the baseline."""
    words = [*_seeds(report, tables), *_skipped(report)]
    for table in tables:
        if table.baseline is not None and table.columns:
            of = f"{title_of(table)}: " if len(tables) > 1 else ""
            first, *others = findings(report, table)
            words += [of + first, *(of + line for line in others if _TOLD in line)]
    columns = {column.key: column for table in tables for column in table.columns if not column.score}
    if few := few_items(columns.values()):
        more = f" and {len(few) - 4} more" if len(few) > 4 else ""
        words.append(f"Few items, so that intervals are too narrow: {', '.join(few[:4])}{more}.")
    return words


_ONE_SEED = (
    "intervals and p-values are over the items that were asked, and over nothing else. What another seed would move is "
    "not known here, so a difference that is told from noise is one of these two models, not yet one of their recipes."
)


def _seeds(report: StudyReport, tables: Sequence[Table]) -> list[str]:
    """What figures and intervals are over; the caution of one seed wherever a comparison has but one."""
    count = len(report.seeds)
    if count == 1:
        return [f"One seed: {_ONE_SEED}"]
    words = [
        f"{count} seeds: figures are means, ± is the standard deviation over seeds; intervals are over seeds and items."
        + (" So few seeds give wide intervals." if count < 4 else "")
    ]
    compared = [one for table in tables for one in table.compared()]
    single = [arm for arm, beside in compared if len(beside.seeds) == 1]
    if single:
        arms = ", ".join(report.label(arm) for arm in dict.fromkeys(single))
        words.append(f"{len(single)} of {len(compared)} comparisons have one seed alone ({arms}): their {_ONE_SEED}")
    fewer = [arm for arm, beside in compared if 1 < len(beside.seeds) < count]
    if fewer:
        arms = ", ".join(report.label(arm) for arm in dict.fromkeys(fewer))
        words.append(
            f"{len(fewer)} of {len(compared)} comparisons are of the seeds that both arms have, fewer: {arms}."
        )
    apart = [arm for table in tables for (arm, _), one in table.entries.items() if one.apart]
    if apart:
        arms = ", ".join(report.label(arm) for arm in dict.fromkeys(apart))
        base = report.label(report.baseline or "")
        words.append(f"Not compared, since they have no seed in common with {base}: {arms}.")
    return words


def _skipped(report: StudyReport) -> list[str]:
    """Nodes with steps that made no update: their tokens were consumed, and their weights have not seen them."""
    found = [
        f"{one.ends} {one.skipped[0]:,} of {one.skipped[1]:,} (arms {', '.join(map(report.label, one.node.arms))})"
        for one in report.nodes.values()
        if one.skipped[0]
    ]
    if not found:
        return []
    more = f"; and {len(found) - 6} more nodes" if len(found) > 6 else ""
    return [
        f"Steps without an update (gradients not finite, or a spike): {'; '.join(found[:6])}{more}. Differences of "
        "these arms are also of the updates that they lack."
    ]


def findings(report: StudyReport, table: Table) -> list[str]:
    """Of one table: how many differences are told, first; then each score's, or each figure's where there is none."""
    if table.baseline is None or not table.columns:
        return []
    told = sum(entry.beside is not None and entry.beside.told(report.words.alpha) for entry in table.entries.values())
    base = report.label(table.baseline)
    if not table.family:
        return [f"nothing can be told from {base} yet: no two arms have figures with known noise."]
    verb = "is" if told == 1 else "are"
    single = [beside for _, beside in table.compared() if len(beside.seeds) == 1]
    one_seed = sum(beside.told(report.words.alpha) for beside in single)
    of_items = f" Of these, {one_seed} with one seed alone: from noise of items." if single and one_seed else ""
    words = [
        f"{told} of {table.family} differences from {base} {verb} told from noise (Holm's p below "
        f"{report.words.alpha:g} over all {table.family} of the table).{of_items if len(report.seeds) > 1 else ''}"
    ]
    words += _unequal(report, table)
    scores = [column for column in table.columns if column.score] or list(table.columns)
    return words + [line for column in scores if (line := _of_column(report, table, column, base))]


def _unequal(report: StudyReport, table: Table) -> list[str]:
    """A caution where arms were trained on another number of tokens than the baseline."""
    lengths: dict[int, list[str]] = {}
    padding = 0
    for arm in table.arms:
        positions, empty = length_of(report, report.end(arm, report.seeds[0]).node.id)
        padding += empty
        lengths.setdefault(positions - empty, []).append(arm)
    own = next(tokens for tokens, arms in lengths.items() if table.baseline in arms)
    others = [
        f"{format_count(tokens)} ({_some_arms(report, arms)})"
        for tokens, arms in lengths.items()
        if abs(tokens - own) > _SAME_LENGTH * own
    ]
    if not others:
        return []
    without = ", padding not counted" if padding else ""
    return [
        f"not all arms are as long as {report.label(table.baseline or '')} with its {format_count(own)} tokens"
        f"{without}: {'; '.join(others)}. Where lengths differ, a difference is of tokens as well as of mixtures."
    ]


def _some_arms(report: StudyReport, arms: Sequence[str]) -> str:
    words = [report.label(arm) + (", all members" if report.first_of(arm) else "") for arm in arms[:3]]
    return ", ".join(words) + (", …" if len(arms) > 3 else "")


def _of_column(report: StudyReport, table: Table, column: Column, base: str) -> str:
    """The best arm of a score beside the baseline, and from where on differences are told."""
    others = [
        (arm, entry.beside)
        for arm in table.arms
        if arm != table.baseline and (entry := table.entry(arm, column)) is not None and entry.beside is not None
    ]
    if not others or table.entry(table.baseline or "", column) is None:
        return ""
    sign = 1 if column.higher_is_better else -1
    arm, beside = max(others, key=lambda one: sign * one[1].difference)
    lower = "" if column.higher_is_better else ", lower is better"
    mine, theirs = (number(mean, column) for mean in beside.means)
    pair = f"{mine} against {theirs}{' %' if unit(column) else ''}"
    if len(beside.seeds) < len(report.seeds):
        pair += f" over seed{'s' if len(beside.seeds) > 1 else ''} {', '.join(map(str, beside.seeds))}"
    better = sign * beside.difference > 0
    change = change_words(beside)
    start_words = "best beside" if better else "none is above" if sign > 0 else "none is below"
    if any((one := table.entry(arm, column)) is not None and one.apart for arm in table.arms):
        start_words = f"of the arms compared {start_words}"
    title = f"score {column.title}" if column.score else column.title
    text = f"{title}{lower}: {start_words} {base} "
    if better:
        text += f"is {report.label(arm)}, {pair}" + (f" ({change})" if change else "")
    else:
        text += f"({theirs}{' %' if unit(column) else ''}); nearest is {report.label(arm)}, {pair}"
    if beside.found is None:
        return f"{text}; the noise of this figure is not known."
    text += f", {_TOLD} (Holm's p {_is(beside.holm)})" if beside.told(report.words.alpha) else ", not told from noise"
    usual = table.usual_half(column)
    if usual is None:
        return f"{text}."
    points = " points" if unit(column) else ""
    return f"{text}; most differences below {number(usual, column)}{points} cannot be told from noise here."


def _is(p: float | None) -> str:
    words = p_words(p)
    return words if words.startswith("<") else f"= {words}"


def note_of(table: Table, report: StudyReport, told: str = "bold", best: str = "Underlined") -> str:
    """What stands below a table. told, best: how it marks changes that are told, and the best of a column."""
    alpha = f"{report.words.alpha:g}"
    words = [
        "Shares of items in percent. ± is the standard deviation over seeds (how many), of one seed the standard error "
        "over items."
    ]
    if table.baseline is not None:
        words.append(
            f"Small: change in percent of {report.label(table.baseline)}, + is better; {told} where it is told from it "
            f"(Holm's p below {alpha}, over {table.family} comparisons: every arm and column of this table)."
        )
    words.append(
        f"{best}: the best of a column, where it is told from every other arm (Holm over that column's, {alpha})."
    )
    return " ".join(words)
