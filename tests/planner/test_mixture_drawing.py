"""The drawings say what the weights say: against integrals written out by hand in planned_runs."""

from __future__ import annotations

import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from planned_runs import GROUPS, LENGTHS, RATES, integral, planned

from megatron.planner.mixture_slices import column_widths, corners_of, inks, shared_out, slices_of, sources_in_order
from megatron.planner.resolve import ResolvedRun, resolve_run
from megatron.planner.terminal_chart import MARGIN, ROWS, Slice, stacked, terminal_chart


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ResolvedRun:
    return resolve_run(planned(tmp_path_factory.mktemp("plan")))


@pytest.mark.parametrize("columns", [4, 23, 72, 200])
def test_slices_are_integrals_of_the_weights(run: ResolvedRun, columns: int) -> None:
    slices = slices_of(run.schedule, run.lr, columns)
    assert len(slices) == columns
    assert [part.start for part in slices[1:]] == [part.end for part in slices[:-1]]
    assert slices[0].start == 0 and slices[-1].end == run.schedule.tokens
    for part in slices:
        stage = run.schedule.stages[part.stage]
        assert sum(part.shares.values()) == 1
        start, end = ((at - stage.start_token) / stage.tokens for at in (part.start, part.end))
        # slices end at whole samples, of which a stage has samples: a bound may be off by one of them
        slack = 2 * stage.seq_length / (part.end - part.start) + 1e-5
        for source in GROUPS:
            expected = integral(stage.name, source, start, end) / (part.end - part.start)
            assert abs(float(part.shares.get(source, 0)) - expected) <= slack, (stage.name, source)


def test_every_stage_has_a_column_and_columns_are_in_proportion(run: ResolvedRun) -> None:
    widths = Counter(part.stage for part in slices_of(run.schedule, run.lr, 72))
    assert sum(widths.values()) == 72 and widths[3] == 1
    total = sum(LENGTHS.values())
    for number, name in enumerate(LENGTHS):
        assert abs(widths[number] - 72 * LENGTHS[name] / total) < 2


def test_widths_leave_no_stage_out() -> None:
    widths = column_widths({"a": Fraction(10**9), "b": Fraction(1), "c": Fraction(3)}, 10)
    assert widths == {"a": 8, "b": 1, "c": 1}
    assert column_widths({"a": Fraction(5), "b": Fraction(5)}, 2) == {"a": 1, "b": 1}


def test_shares_of_units_are_floor_or_ceiling() -> None:
    rng = random.Random(5)
    for _ in range(300):
        sizes = {str(n): Fraction(rng.choice([0, 1, 3, 50, 1000, 10**6])) for n in range(rng.randint(1, 30))}
        if not sum(sizes.values()):
            continue
        units = rng.randint(1, 128)
        given = shared_out(sizes, units)
        assert sum(given.values()) == units
        for name, size in sizes.items():
            exact = size * units / sum(sizes.values())
            assert abs(given.get(name, 0) - exact) < 1


@pytest.mark.parametrize("units", [16, 128])
def test_a_stacked_column_is_within_one_part_of_every_share_and_group(units: int) -> None:
    rng = random.Random(11)
    for _ in range(300):
        order = [f"s{n}" for n in range(rng.randint(1, 30))]
        raw = [rng.choice([0, 1, 2, 40, 900]) for _ in order]
        raw[0] = max(1, raw[0])
        shares = {name: Fraction(part, sum(raw)) for name, part in zip(order, raw, strict=True)}
        column = stacked(Slice(0, 0, 1, shares, 0.0), order, units)
        assert len(column) == units
        seen = Counter(column)
        for name in order:
            assert abs(seen[name] - shares[name] * units) <= 1
        bound = rng.randrange(len(order))  # sources side by side, as those of a group are
        together = sum(shares[name] for name in order[: bound + 1]) * units
        assert abs(sum(seen[name] for name in order[: bound + 1]) - together) <= Fraction(1, 2)


def lines_of(run: ResolvedRun, width: int, *, colour: bool = False, ascii_only: bool = False) -> list[str]:
    return [line.plain for line in terminal_chart(run.schedule, run.lr, width, colour=colour, ascii_only=ascii_only)]


def test_letters_in_a_cell_follow_the_weights(run: ResolvedRun) -> None:
    lines = lines_of(run, 80)
    assert all(len(line) <= 80 for line in lines)
    rows = [line[MARGIN:] for line in lines[1 : 1 + ROWS]]
    bands = [row.split("│") for row in rows]
    assert all(len(parts) == 4 for parts in bands), "a rule between any two stages"
    letters = {name: ink.letter for name, ink in inks(run.schedule).items()}
    assert len(set(letters.values())) == len(letters)
    for number, name in enumerate(LENGTHS):
        cells = [[row[number][column] for row in bands] for column in range(len(bands[0][number]))]
        for column, stack in enumerate(cells):
            start, end = column / len(cells), (column + 1) / len(cells)
            for source, letter in letters.items():
                exact = ROWS * integral(name, source, start, end) / (LENGTHS[name] / len(cells))
                assert abs(stack.count(letter) - exact) <= 1.1, (name, column, source)
    # groups lie side by side, so that a column names each group's letters without a gap
    order = [letters[name] for name in sources_in_order(run.schedule)]
    for column in zip(*rows, strict=True):
        from_below = [order.index(letter) for letter in reversed(column) if letter != "│"]
        assert from_below == sorted(from_below)


def test_a_ramp_and_a_step_are_visible(run: ResolvedRun) -> None:
    rows = [line[MARGIN:].split("│") for line in lines_of(run, 80)[1 : 1 + ROWS]]
    letter = inks(run.schedule)["python"].letter
    heights = [sum(row[1][column] == letter for row in rows) for column in range(len(rows[0][1]))]
    assert heights[0] <= 2 and heights[-1] >= 10 and heights == sorted(heights)
    books = inks(run.schedule)["books"].letter
    step = [sum(row[2][column] == books for row in rows) for column in range(len(rows[0][2]))]
    assert set(step[: len(step) // 5]) == {0} and set(step[len(step) // 3 :]) == {8}


def test_rates_are_drawn_in_proportion(run: ResolvedRun) -> None:
    lines = lines_of(run, 80)
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{1e-3:.2g}".rjust(MARGIN - 1)))
    rows = [line[MARGIN:].ljust(73).split("│") for line in lines[start : start + 5]]
    heights = {
        name: [
            sum(" ▁▂▃▄▅▆▇█".index(row[number][column]) for row in rows) / 8 for column in range(len(rows[-1][number]))
        ]
        for number, name in enumerate(LENGTHS)
    }
    assert heights["even"][0] < heights["even"][-1] == 5 == heights["ramp"][0] == heights["ramp"][-1]
    assert set(heights["steps"]) == {2.5}
    assert RATES["steps"][0] / RATES["ramp"][1] == 0.5


def test_ascii_alone_where_the_output_has_nothing_else(run: ResolvedRun) -> None:
    lines = lines_of(run, 80, ascii_only=True)
    assert all(line.isascii() for line in lines)
    assert sum(line.count("|") == 3 for line in lines) > ROWS


def test_colour_shows_the_same_shares_in_eighths(run: ResolvedRun) -> None:
    lines = terminal_chart(run.schedule, run.lr, 80, colour=True, ascii_only=False)
    ink = inks(run.schedule)
    assert len({its.light for its in ink.values()}) == len(ink), "every source has a colour of its own"
    # the first column of "even": python 20 %, rust 10 %, web 70 %
    eighths: Counter[str] = Counter()
    for line in lines[1 : 1 + ROWS]:
        letter = line.plain[MARGIN]
        style = next(span.style for span in line.spans if span.start <= MARGIN < span.end)
        height = " ▁▂▃▄▅▆▇█".find(letter)
        if height <= 0:  # a letter that names the band
            eighths[style.bgcolor.name] += 8
        else:
            eighths[style.color.name] += height
            if height < 8:
                eighths[style.bgcolor.name] += 8 - height
    assert sum(eighths.values()) == 8 * ROWS
    for source, share in (("python", 0.2), ("rust", 0.1), ("web", 0.7)):
        assert abs(eighths[ink[source].light] / (8 * ROWS) - share) <= 1 / (8 * ROWS) + 0.001


def test_many_sources_in_few_columns(tmp_path: Path) -> None:
    from made_runs import run_config

    names = [f"source-{n:02}" for n in range(70)]
    sources = {name: {"tokens": 10**6} for name in names}
    stages = [{"name": f"s{n}", "tokens": 6400, "mixture": dict.fromkeys(names, 1)} for n in range(30)]
    run = resolve_run(run_config(tmp_path, sources, stages))
    lines = lines_of(run, 60)
    assert all(len(line) <= 60 for line in lines)
    legend = "\n".join(lines)
    assert all(name in legend for name in names) and "too thin to be seen" in legend


def test_corners_are_exact_at_both_sides_of_a_step(run: ResolvedRun) -> None:
    corners = corners_of(run.schedule.stages[2], list(GROUPS))
    assert [round(corner.shares["books"], 6) for corner in corners] == [0, 0, 0.5, 0.5]
    assert corners[1].token == corners[2].token
    ends = corners_of(run.schedule.stages[1], list(GROUPS))
    assert [round(corner.shares["python"], 5) for corner in ends] == [0.1, 0.7]


def test_sources_of_a_group_stand_together(run: ResolvedRun) -> None:
    groups = [GROUPS[name] for name in sources_in_order(run.schedule)]
    assert re.fullmatch(r"(web)+(code)+(quality)+", "".join(groups))
