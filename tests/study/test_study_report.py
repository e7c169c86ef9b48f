"""The report of a study shows what lies in its nodes' folders, and every figure leads to its evidence."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from urllib.parse import unquote

import pytest
from study.made_results import ITEMS, TASKS
from study.report_files import arm_node, links_of, right_share, rows_of

from megatron.commands.study import main
from megatron.study.node_config import node_folder
from megatron.study.plan import PlannedStudy

MINUS = "−"


# -- files and links ---------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_needs_nothing_from_outside(whole: tuple[PlannedStudy, Path]) -> None:
    pages = [whole[1] / "index.html", *(whole[1] / "diffs").iterdir()]
    assert len(pages) > 5
    for page in pages:
        html = page.read_text()
        assert not re.search(r"https?://|<script|<link|<img|@import|url\((?!#clip)", html)
        links_of(page)


def test_plots_are_files_of_their_own(whole: tuple[PlannedStudy, Path]) -> None:
    for path in (whole[1] / "plots").iterdir():
        text = path.read_text()
        ElementTree.fromstring(text)
        assert not re.search(r"https?://(?!www.w3.org/2000/svg)|url\((?!#clip)", text)
        assert "prefers-color-scheme:dark" in text
        ids = re.findall(r'id="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        for used in re.findall(r"url\(#([^)]+)\)", text):
            assert used in ids
    html = (whole[1] / "index.html").read_text()
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_every_link_leads_somewhere_also_after_the_study_was_moved(
    whole: tuple[PlannedStudy, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole[1].parent, moved)
    pages = [moved / "report" / "index.html", *(moved / "report" / "diffs").iterdir()]
    links = [(page.parent, link) for page in pages for link in links_of(page)]
    text = (moved / "report" / "report.md").read_text()
    links += [(moved / "report", link) for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert len(links) > 300
    for base, link in links:
        assert not link.startswith("/")
        assert (base / unquote(link)).exists(), link


def test_each_figure_leads_to_run_report_items_model_and_ledger_diff(whole: tuple[PlannedStudy, Path]) -> None:
    study, folder = whole
    html = (folder / "index.html").read_text()
    cells = re.findall(r"<td[^>]*><details><summary>.*?</details></td>", html)
    assert len(cells) == 10 * 9  # two tables, the baseline in both; two scores, four tasks, three sources
    for arm in ("balanced", "share-75"):
        node = arm_node(study, arm, 1)
        mine = [cell for cell in cells if node in cell]
        assert mine
        for cell in mine:
            assert f"../nodes/{node}/" in cell
            assert f"runs/{node}.html" in cell
            assert f"../nodes/{node}/evaluation-{'loss' if 'evaluation loss' in cell else 'bench'}.json" in cell
            assert f"../nodes/{node}/export/" in cell
            assert f"diffs/{arm}-vs-text.html" in cell


def test_the_same_results_give_the_same_bytes(whole: tuple[PlannedStudy, Path]) -> None:
    study, folder = whole
    other = folder.parent / "again"
    assert main(["report", str(study.study.path), "--output", str(other)]) == 0
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    shutil.rmtree(other)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_of_the_table_are_those_of_the_items(seeds: tuple[PlannedStudy, Path]) -> None:
    study, folder = seeds
    rows = [row for row in rows_of(folder / "table.csv") if row["figure"] == "bench/logic/acc"]
    assert {row["arm"] for row in rows} == {
        "text", "balanced-to-text", "share-0", "share-25", "share-50", "share-75", "share-100",
    }  # fmt: skip
    for row in rows:
        values = [right_share(study, row["arm"], seed, "logic") for seed in (1, 2, 3)]
        assert float(row["mean"]) == pytest.approx(statistics.fmean(values))
        assert float(row["sd"]) == pytest.approx(statistics.stdev(values))
        assert row["stderr"] == ""
        if row["arm"] != "text":
            base = statistics.fmean(right_share(study, "text", seed, "logic") for seed in (1, 2, 3))
            assert float(row["difference"]) == pytest.approx(statistics.fmean(values) - base)
            assert float(row["change_percent"]) == pytest.approx(100 * (statistics.fmean(values) - base) / base)
            assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])


def test_a_score_is_the_mean_of_its_tasks(whole: tuple[PlannedStudy, Path]) -> None:
    study, folder = whole
    rows = {(row["arm"], row["figure"]): row for row in rows_of(folder / "table.csv")}
    for group in ("text", "code"):
        values = [right_share(study, "cooled", 1, task) for task, of in TASKS.items() if of == group]
        row = rows["cooled", group]
        assert float(row["mean"]) == pytest.approx(sum(values) / 2)
        errors = [value * (1 - value) / (ITEMS - 1) for value in values]
        assert float(row["stderr"]) == pytest.approx((sum(errors) ** 0.5) / 2)
        assert row["sd"] == ""


def test_losses_improve_downwards(whole: tuple[PlannedStudy, Path]) -> None:
    rows = [row for row in rows_of(whole[1] / "table.csv") if row["figure"] == "loss/python/loss" and row["p"]]
    assert rows
    for row in rows:
        assert (float(row["difference"]) < 0) == (float(row["change_percent"]) > 0)
    best = [row["arm"] for row in rows if row["best"] == "1"]
    lowest = {
        table: min((row for row in rows if row["experiment"] == table), key=lambda row: float(row["mean"]))["arm"]
        for table in ("", "shares")
    }
    assert set(best) <= set(lowest.values())


def test_holm_is_over_all_comparisons_of_a_table(seeds: tuple[PlannedStudy, Path]) -> None:
    for experiment in ("", "shares"):
        rows = [row for row in rows_of(seeds[1] / "table.csv") if row["experiment"] == experiment and row["p"]]
        assert rows
        assert {int(row["family"]) for row in rows} == {len(rows)}
        ordered = sorted(rows, key=lambda row: float(row["p"]))
        reached = 0.0
        for rank, row in enumerate(ordered):  # Holm 1979: the k-th smallest of m times m - k + 1, and never falling
            reached = max(reached, min(1.0, (len(rows) - rank) * float(row["p"])))
            assert float(row["holm_p"]) == pytest.approx(reached)
            assert (row["told"] == "1") == (reached < 0.05)


def test_best_is_marked_only_where_it_is_told_from_the_baseline_too(seeds: tuple[PlannedStudy, Path]) -> None:
    rows = rows_of(seeds[1] / "table.csv")
    marked = [row for row in rows if row["best"] == "1"]
    for row in marked:
        column = [one for one in rows if (one["experiment"], one["figure"]) == (row["experiment"], row["figure"])]
        sign = 1 if row["higher_is_better"] == "1" else -1
        assert max(column, key=lambda one: sign * float(one["mean"]))["arm"] == row["arm"]
        others = [one for one in column if one["arm"] != "text"] if row["arm"] == "text" else [row]
        assert all(one["told"] == "1" for one in others)


def test_results_csv_has_every_figure_of_every_node(whole: tuple[PlannedStudy, Path]) -> None:
    study, folder = whole
    rows = rows_of(folder / "results.csv")
    expected = 0
    for arm in study.graph.arms:
        for name in arm.path:
            metrics = json.loads(node_folder(study, name).results.read_text())["metrics"]
            expected += len(metrics)
            mine = [row for row in rows if row["arm"] == arm.name and row["node"] == name]
            assert {(r["suite"], r["task"], r["metric"]): float(r["value"]) for r in mine} == {
                (m["suite"], m["task"], m["metric"]): m["value"] for m in metrics
            }
            assert {row["end_of_arm"] for row in mine} == {str(int(name == arm.path[-1]))}
    assert len(rows) == expected
    for row in rows[:20]:
        for column in ("run", "results", "evaluation", "export"):
            assert not row[column] or (folder / unquote(row[column])).exists()


def test_page_markdown_and_csv_say_the_same(seeds: tuple[PlannedStudy, Path]) -> None:
    html, text = (seeds[1] / "index.html").read_text(), (seeds[1] / "report.md").read_text()
    row = next(r for r in rows_of(seeds[1] / "table.csv") if (r["arm"], r["figure"]) == ("share-100", "code"))
    words = f"{100 * float(row['mean']):.1f} ± {100 * float(row['sd']):.1f} (3)"
    assert words in html
    assert words in text
    interval = (
        f"{100 * float(row['difference']):+.1f} [{100 * float(row['low']):+.1f}, {100 * float(row['high']):+.1f}]"
    )
    assert interval.replace("-", MINUS) in html
    assert interval.replace("-", MINUS) in text
