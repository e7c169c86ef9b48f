"""The report shows what a run could do while it trained, with error bars that have the length that they claim."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from metrics.made_metrics import make_evaluation, make_run

from megatron.commands.report import gather
from megatron.metrics.in_loop import evaluation_row, main_metric
from megatron.metrics.report import render_report
from megatron.metrics.report_data import ReportData, read_metrics
from megatron.metrics.sinks import flat_numbers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """A run whose three evaluated models lie at three steps of it."""
    folder = tmp_path_factory.mktemp("report")
    gathered = gather(make_run(folder / "run"), [])
    whole = json.loads(make_evaluation(folder / "evaluation.json").read_text())
    rows = [gathered.steps[len(gathered.steps) * part // 3 - 1] for part in (1, 2, 3)]
    records = []
    for model, row in zip(whole["models"], rows, strict=True):
        about = {key: row[key] for key in ("step", "training_stage", "consumed_samples", "consumed_tokens")}
        records.append({**whole, "models": [model], "evaluated": about})
    return replace(gathered, in_loop=records)


def figures(html: str) -> list[str]:
    return re.findall(r'<figure id="in-loop-\d".*?</figure>', html, re.DOTALL)


def test_a_table_of_tasks_by_steps_and_a_plot_a_metric(data: ReportData) -> None:
    html = render_report(data)
    accuracy, bits = figures(html)
    assert "Tasks while it trained" in accuracy and "Bits per byte while it trained" in bits
    for record in data.in_loop:
        about = record["evaluated"]
        assert f"{about['training_stage']}, step {about['step']:,}" in html
    assert "58.0% ± 3.5" in html and "chance 25%" in accuracy and "No evaluation was given" not in html
    for drawing in re.findall(r"<svg.*?</svg>", accuracy + bits, re.DOTALL):
        root = ElementTree.fromstring(drawing)
        assert len(root.findall(".//line[@class='bar c0']")) == 3 and len(root.findall(".//circle")) == 6
        width, height = map(float, root.get("viewBox", "").split()[2:])
        for node in root.iter("circle"):
            assert 0 < float(node.get("cx", -1)) < width and 0 < float(node.get("cy", -1)) < height


def test_a_bar_spans_1_96_standard_errors_each_way(data: ReportData) -> None:
    drawing = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", figures(render_report(data))[0], re.DOTALL)[0])
    points = [(float(node.get("cy", 0))) for node in drawing.findall(".//circle[@class='dot c0']")]
    bars = [float(n.get("y2", 0)) - float(n.get("y1", 0)) for n in drawing.findall(".//line[@class='bar c0']")]
    metrics = [record["models"][0]["results"]["heldout_code"]["metrics"]["acc"] for record in data.in_loop]
    scale = (points[2] - points[0]) / (metrics[0]["value"] - metrics[2]["value"])
    for bar, metric in zip(bars, metrics, strict=True):
        assert bar == pytest.approx(2 * 1.96 * metric["stderr"] * scale, rel=0.02)


def test_rows_are_numbers_under_names_of_their_own(data: ReportData, tmp_path: Path) -> None:
    record: dict[str, Any] = json.loads(json.dumps(data.in_loop[0]))
    record["models"][0]["results"]["heldout_code"]["metrics"]["acc"]["stderr"] = None
    row = evaluation_row(900, record)
    numbers = flat_numbers(row)
    assert numbers["step"] == 900 and numbers["evaluated_step"] == record["evaluated"]["step"]
    assert numbers["evaluation/heldout_code/acc"] == 0.58
    assert "evaluation_stderr/heldout_code/acc" not in numbers and "consumed_tokens" not in numbers
    path = tmp_path / "metrics.jsonl"
    step = {"step": 900, "loss": 1.0}
    path.write_text("".join(json.dumps(one) + "\n" for one in (step, row)))
    assert read_metrics(path) == ([step], []), "the row does not take the step's place"


def test_the_metric_that_counts() -> None:
    assert main_metric(["acc_norm", "acc"]) == "acc" and main_metric(["f1"]) == "f1" and main_metric([]) is None
    assert main_metric(["acc", "exact_match"], said="exact_match") == "exact_match"
