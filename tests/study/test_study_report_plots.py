"""Plots of a study's report: what is drawn is what the files say, and words hide nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study.made_results import make_study, words
from study.made_studies import stage

from megatron.commands.study import main
from megatron.metrics.report_svg import NARROW, WIDE, Axis, Drawing
from megatron.study.node_config import node_folder
from megatron.study.report_columns import columns_of
from megatron.study.report_curves import curves_of, path_of, share_of_group
from megatron.study.report_data import StudyReport, read_study
from megatron.study.report_plots import loss_plots, mixture_plot
from megatron.study.report_score_plots import Mark, _boxes_along, _name, _overlap, _shifts, pareto_plot, share_plots
from megatron.study.report_svg_files import svg_file
from megatron.study.report_tables import tables_of


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> StudyReport:
    return read_study(make_study(tmp_path_factory.mktemp("plots"), [1, 2], untrained=["cooldown"]))


def rows_of(report: StudyReport, node: str) -> list[dict]:
    path = node_folder(report.planned, node).path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_curves_are_the_rows_along_the_path_joined(report: StudyReport) -> None:
    curves, notes = curves_of(report)
    assert notes == []
    arm = report.placed("balanced-to-text")[0]
    path = path_of(report, arm, curves)
    assert [one.label for one in path] == ["init-half", "to-text"]
    assert path[0].end == path[1].start
    points = [point for one in path for point in one.raw["web"]]
    rows = [row for node in arm.path for row in rows_of(report, node) if "loss" in row]
    expected = [
        (row["consumed_tokens"], row["loss_by_source"]["web"]) for row in rows if "web" in row["loss_by_source"]
    ]
    assert points == expected
    held = [point for one in path for point in one.held_out["python"]]
    assert held == [
        (row["consumed_tokens"], row["validation"]["python"])
        for node in arm.path
        for row in rows_of(report, node)
        if "validation" in row
    ]


def test_rows_of_before_the_nodes_own_stage_are_left_out(report: StudyReport, tmp_path: Path) -> None:
    """A run that keeps its parent's rows, or was resumed beyond its end in another study, shows its own stage alone."""
    study = make_study(tmp_path, [1])
    name = next(node.id for node in study.graph.nodes.values() if node.label == "to-text")
    path = node_folder(study, name).path / "metrics.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    strangers = [first | {"step": step, "consumed_tokens": 1} for step in (1, 40, 81)]
    path.write_text("".join(json.dumps(row) + "\n" for row in strangers) + path.read_text())
    curves, _ = curves_of(read_study(study))
    assert len([point for of in curves[name].raw.values() for point in of]) == len(
        [x for row in rows_of(read_study(study), name) if 40 < row["step"] <= 80 for x in row.get("loss_by_source", {})]
    )


def test_mixture_says_the_counted_shares_and_marks_what_is_shared(report: StudyReport) -> None:
    curves, _ = curves_of(report)
    plot = mixture_plot(report, ["text", "balanced", "balanced-to-text", "cooled"], curves, "mixture")
    assert plot is not None
    arm = report.placed("balanced-to-text")[0]
    taken: dict[str, int] = {}
    for row in rows_of(report, arm.path[1]):
        for source, count in row.get("samples_by_source", {}).items():
            taken[source] = taken.get(source, 0) + count
    total = sum(taken.values())
    said = re.search(r"balanced-to-text: init-half .*?, then to-text (.*?)(;|\.\")", plot.wide)
    assert said is not None
    assert said[1] == ", ".join(f"{name} {100 * taken[name] / total:.0f} %" for name in sorted(taken))
    # init-text (with share-0), init-half twice and to-text (with cooled) twice and once more by cooled itself
    assert plot.wide.count('<rect class="trunk"') == 1 + 1 + 2 + 2
    assert "pale: as planned, where there are no metrics" in plot.caption
    assert "planned" in plot.wide
    assert ("trunk", "trunk: trained once for several arms") in plot.legend


def test_heights_of_a_strip_add_up(report: StudyReport) -> None:
    curves, _ = curves_of(report)
    plot = mixture_plot(report, ["balanced"], curves, "mixture")
    assert plot is not None
    heights: dict[str, float] = {}
    for x, height in re.findall(
        r'<rect class="fill[^"]*" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', plot.wide
    ):
        heights[x] = heights.get(x, 0) + float(height)
    assert len(heights) > 30
    assert all(height == pytest.approx(30, abs=0.05) for height in heights.values())


def test_what_arms_share_is_drawn_once(report: StudyReport) -> None:
    curves, _ = curves_of(report)
    for plot in loss_plots(report, ["balanced", "balanced-to-text", "cooled"], curves, "loss"):
        lines = re.findall(r'<path class="line ([^"]+)"', plot.wide)
        assert len([css for css in lines if "faint" not in css]) == 3  # trunk, on-half, to-text; cooldown is untrained
        assert "shared" in lines
        assert "shared faint" in lines


def test_shares_are_those_of_the_ledger_or_of_the_plan(report: StudyReport, tmp_path: Path) -> None:
    for arm, share in (("text", 0.0), ("balanced", 0.5), ("balanced-to-text", 0.3), ("share-75", 0.75)):
        found = share_of_group(report, report.placed(arm)[0])
        assert found == pytest.approx(share, abs=0.01)
    planned = share_of_group(report, report.placed("cooled")[0])
    assert planned == pytest.approx((0.3 * 320 + 0.4 * 64) / 384, abs=0.01)
    study = make_study(tmp_path, [1], report={"share_of": "last-stage"})
    last = read_study(study)
    assert share_of_group(last, last.placed("balanced-to-text")[0]) == pytest.approx(0.1, abs=0.01)
    source = read_study(make_study(tmp_path, [1], report={"share": "rust"}))
    assert 0 < (share_of_group(source, source.placed("balanced")[0]) or 0) < 0.5


def test_marks_stand_where_the_figures_are(report: StudyReport) -> None:
    columns, _ = columns_of(report)
    table = next(one for one in tables_of(report, columns) if one.experiment == "shares")
    scores = [column for column in columns if column.score]
    plots = share_plots(report, table, scores, "share")
    assert len(plots) == 2
    for plot, column in zip(plots, scores, strict=True):
        for svg in (plot.wide, plot.narrow):
            centres = [
                tuple(map(float, at)) for at in re.findall(r'<circle class="dot[^"]*" cx="([\d.]+)" cy="([\d.]+)"', svg)
            ]
            ticks = [
                (float(y) - 4, float(value))
                for y, value in re.findall(r'<text class="tick end" x="[\d.]+" y="([\d.]+)">([\d.]+)%</text>', svg)
            ]
            (y0, v0), (y1, v1) = ticks[0], ticks[-1]
            for (_, y), arm in zip(centres, table.arms, strict=True):
                entry = table.entry(arm, column)
                assert entry is not None
                assert 100 * entry.mean == pytest.approx(v0 + (y - y0) * (v1 - v0) / (y1 - y0), abs=0.3)
    assert pareto_plot(report, table, columns, "pareto") is not None


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.3), st.floats(0, 0.3), st.integers(1, 22)),
        min_size=1,
        max_size=14,
    ),
    st.booleans(),
)
def test_names_of_marks_hide_no_mark_and_no_other_name(rows: list, wide: bool) -> None:
    size = WIDE if wide else NARROW
    drawing = Drawing(size, Axis("x", -0.3, 1.3), Axis("y", -0.3, 1.3))
    marks = [Mark("n" * letters, x, y, up, across, "c0") for x, y, up, across, letters in rows]
    shifts = _shifts(drawing, marks)
    _name(drawing, marks, [], shifts)
    boxes = []
    for x, y, text in re.findall(
        r'<text class="task[^"]*" x="([-\d.]+)" y="([-\d.]+)">([^<]*)</text>', drawing.svg("i", "")
    ):
        boxes.append((float(x), float(y) - 10, float(x) + 6.5 * len(text), float(y) + 3))
    for number, box in enumerate(boxes):
        assert box[0] >= size.left
        assert box[2] <= size.width
        assert box[3] <= size.height - size.bottom
        assert not any(_overlap(box, other) for other in boxes[:number])
        for mark, beside in zip(marks, shifts, strict=True):
            x, y = drawing.px(mark.x) + beside, drawing.py(mark.y)
            assert not _overlap(box, (x - 4, y - 4, x + 4, y + 4))


def test_marks_at_one_place_stand_side_by_side() -> None:
    drawing = Drawing(WIDE, Axis("x", 0, 1), Axis("y", 0, 1))
    marks = [Mark(str(n), 0.5, 0.2, 0.1, 0.0, "c0", line) for n, line in enumerate([None, "axis", None, None])]
    shifts = _shifts(drawing, marks)
    assert shifts[0] == shifts[1] == 0  # the first stands, and what is on a line
    assert len({*shifts}) == 3
    assert _shifts(drawing, [Mark("a", 0.1, 0, 0, 0, "c0"), Mark("b", 0.9, 0, 0, 0, "c0")]) == [0, 0]


def test_small_boxes_cover_a_line() -> None:
    drawing = Drawing(WIDE, Axis("x", 0, 1), Axis("y", 0, 1))
    boxes = _boxes_along(drawing, [(0.0, 0.0), (1.0, 0.7)])
    for step in range(101):
        x, y = drawing.px(step / 100), drawing.py(0.7 * step / 100)
        assert any(box[0] - 3 <= x <= box[2] + 3 and box[1] - 3 <= y <= box[3] + 3 for box in boxes)


def test_a_file_of_its_own_holds_title_legend_and_caption(report: StudyReport) -> None:
    curves, _ = curves_of(report)
    plot = mixture_plot(report, ["text", "balanced"], curves, "mixture")
    assert plot is not None
    text = svg_file(plot)
    for words_ in (plot.title, *(row for _, row in plot.legend), "tokens trained on"):
        assert words_ in text


def test_an_average_stands_at_its_place(tmp_path: Path) -> None:
    """Of several arms, and one that goes on from it."""
    tables = words(tmp_path, [1])
    tables["arms"] |= {
        "soup": {"stages": [{"name": "soup", "average": ["text/on-text", "balanced/on-half"]}]},
        "after": {"from": "soup", "stages": ["more"]},
    }
    tables["stages"]["more"] = stage(steps=20, mixture={"web": 1}, take={"optimizer": "fresh"})
    study = make_study(tmp_path, [1], tables=tables)
    assert main(["report", str(tmp_path / "study.toml")]) == 0
    html = (tmp_path / "runs/report/index.html").read_text()
    assert "Incomplete" not in html
    naive = sum(arm.naive for arm in study.graph.arms)
    assert f"{study.graph.trained:,} tokens were trained once, {naive:,} for each arm alone" in html
    report = read_study(study)
    curves, _ = curves_of(report)
    path = path_of(report, report.placed("after")[0], curves)
    assert [one.label for one in path] == ["init-text", "on-text", "more"]
    assert (tmp_path / "runs/report/diffs/soup-vs-text.html").is_file()
