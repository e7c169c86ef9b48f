"""The report is one self-contained file that shows what the run's files say, and says what they do not."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from metrics.made_metrics import BATCH, SEQ, make_evaluation, make_run

from megatron.commands.report import gather, main
from megatron.config.errors import DataError
from megatron.metrics.report import render_report
from megatron.metrics.report_data import planned_shares, read_metrics, realised_shares
from megatron.metrics.report_svg import Axis, nice_step
from megatron.metrics.sinks import cut_after


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return render_report(gather(run, [make_evaluation(run / "evaluation.json")]))


class Balance(HTMLParser):
    """Fails at a tag that is closed and was not opened, or that stays open."""

    void = {"meta", "br", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opened and closed in one."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag


def test_the_file_needs_nothing_else(html: str) -> None:
    assert not re.search(r"https?://|<script|<link|<img|@import|url\((?!#clip)", html)
    checker = Balance()
    checker.feed(html)
    assert checker.open == []


def test_every_plot_has_labelled_axes_a_legend_and_words_for_screen_readers(html: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(figures) == 6
    for figure in figures:
        assert '<ul class="legend"><li>' in figure and "<figcaption>" in figure
        drawings = re.findall(r"<svg.*?</svg>", figure, re.DOTALL)
        assert len(drawings) == 2
        for drawing in drawings:
            root = ElementTree.fromstring(drawing)
            assert root.get("role") == "img" and len(root.get("aria-label", "")) > 30
            labels = [node.text for node in root.iter("text") if "label" in node.get("class", "")]
            assert labels and all(labels)


def test_every_mark_lies_inside_its_drawing(html: str) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ElementTree.fromstring(drawing)
        width, height = map(float, root.get("viewBox", "").split()[2:])
        for node in root.iter("text"):
            assert 0 <= float(node.get("x", -1)) <= width and 0 <= float(node.get("y", -1)) <= height
        assert "nan" not in drawing and "inf" not in drawing.replace("line", "")


def test_realised_shares_are_the_counts_and_cover_every_token(run: Path) -> None:
    data = gather(run, [])
    stretches = realised_shares(data)
    assert stretches[0][0] == 0 and stretches[-1][1] == data.tokens
    assert all(one[1] == other[0] for one, other in zip(stretches, stretches[1:], strict=False))
    for source in data.sources:
        together = sum((end - start) * shares[source] for start, end, shares in stretches)
        counted = sum(row["samples_by_source"].get(source, 0) for row in data.steps)
        assert together == pytest.approx(counted * SEQ)
    bounds = {band.end for band in data.bands()}
    assert bounds <= {end for _, end, _ in stretches}


def test_planned_and_realised_mixtures_agree_on_a_run_that_followed_its_plan(run: Path) -> None:
    data = gather(run, [])
    planned = planned_shares(data)
    area = sum(
        (right - left) * (a["code"] + b["code"]) / 2
        for (left, a), (right, b) in zip(planned, planned[1:], strict=False)
    )
    counted = sum(row["samples_by_source"].get("code", 0) for row in data.steps)
    assert area == pytest.approx(counted * SEQ, abs=3 * SEQ * BATCH)


def test_ledger_and_evaluation_stand_in_the_tables(html: str) -> None:
    assert "every source stays within one sample of its target" in html
    assert "58.0% ± 3.5" in html and "heldout_text_loss" in html and "1.96 standard errors" in html
    assert "<td>bf16</td>" in html and ">a step took 0.58 s" in html and "[[stages]]" in html


def test_missing_parts_are_said(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (bare / "metrics.jsonl").write_text("\n".join(row for row in rows if "validation" not in row) + "\n")
    said = render_report(gather(bare, []))
    for words in ("no config.toml", "No evaluation was given", "No checkpoint with a ledger", "not validated"):
        assert words in said
    (bare / "metrics.jsonl").write_text("")
    assert "The run has no steps yet" in render_report(gather(bare, []))


def test_a_damaged_checkpoint_is_named_on_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0.2)
    state = next(folder.glob("checkpoints/*/state.json"))
    state.write_text(state.read_text().replace("1234", "4321"))
    said = render_report(gather(folder, []))
    assert "A damaged checkpoint was passed over" in said and "No checkpoint with a ledger" in said


def test_names_are_never_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0.1, {"code": "<script>alert(1)</script>", "text": "text"})
    evaluation = json.loads(make_evaluation(tmp_path / "e.json").read_text())
    evaluation["models"][0]["name"] = "<img src=x>"
    (tmp_path / "e.json").write_text(json.dumps(evaluation))
    said = render_report(gather(folder, [tmp_path / "e.json"]))
    assert "<script" not in said and "<img" not in said


def test_a_run_that_is_going_on_or_was_resumed_reads_well(run: Path, tmp_path: Path) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines()
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*rows[:20], *rows[10:30], rows[30][:40]]))
    steps, validations = read_metrics(path)
    assert [row["step"] for row in steps] == list(range(1, 31)) and validations == []


MANY = {"layout": "8 processes: tensor 2 x data 4", "data shard": "full", "engine": "torch", "device": "H200"}
ALONE = {"engine": "deepspeed", "device": "CPU, 2 threads"}
SAID = "8 processes: tensor 2 x data 4, data shard full, torch"


def with_starts(run: Path, folder: Path, starts: dict[int, dict[str, str]], steps: int = 9) -> Path:
    """A run of so many steps, with a record of a start at some of them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        for row in rows[:steps]:
            if row["step"] > len(path.read_text().splitlines()):
                start = {"start": starts[row["step"]]} if row["step"] in starts else {}
                file.write(json.dumps(row | start) + "\n")
                file.flush()
    return folder


def test_each_layout_is_shown_with_the_steps_that_it_trained(run: Path, tmp_path: Path) -> None:
    with_starts(run, tmp_path, {1: MANY, 5: ALONE})
    cut_after(tmp_path / "metrics.jsonl", 6)  # the last of them were not in a checkpoint yet
    data = gather(with_starts(run, tmp_path, {7: MANY, 8: MANY}), [])
    assert [row["step"] for row in data.steps] == list(range(1, 10))
    assert data.facts["layout"] == f"steps 1–4: {SAID}; 5–6: one process, deepspeed; 7–9: {SAID}"
    assert data.facts["device"] == "steps 1–4: H200; 5–6: CPU, 2 threads; 7–9: H200"
    assert f"7–9: {SAID}</td>" in render_report(data) and "engine" not in data.facts
    cut_after(tmp_path / "metrics.jsonl", 4)  # a start whose steps were set aside trained nothing that counts
    data = gather(with_starts(run, tmp_path, {5: ALONE | {"pipeline": "1f1b"}, 9: MANY}), [])
    assert data.facts["layout"] == f"steps 1–4: {SAID}; 5–8: one process, pipeline 1f1b, deepspeed; 9: {SAID}"


def test_what_computed_is_shown_as_each_start_recorded_it(run: Path, tmp_path: Path) -> None:
    before = {"precision": "fp32", "attention": "torch's SDPA", "kernels": "norm eager", "optimizer": "SGD"}
    after = before | {
        "precision": "bf16, fp32 master weights, fp32 gradients",
        "kernels": "norm triton, layers compiled",
    }
    data = gather(with_starts(run, tmp_path, {1: before, 6: after}), [])
    assert data.facts["precision"] == "steps 1–5: fp32; 6–9: bf16, fp32 master weights, fp32 gradients"
    assert data.facts["kernels"] == "steps 1–5: norm eager; 6–9: norm triton, layers compiled"
    assert data.facts["attention"] == "torch's SDPA" and data.facts["optimizer"] == "SGD"
    assert "6–9: norm triton, layers compiled</td>" in render_report(data)
    kept = gather(run, []).facts  # without a record, what checkpoint and config say
    assert kept["precision"] == "bf16" and kept["optimizer"] == "adamw" and "kernels" not in kept
    assert kept["why this choice of precision"] == "a step took 0.58 s in bf16, 1.21 s in fp32"


def test_one_layout_needs_no_steps_and_what_was_not_recorded_is_said(run: Path, tmp_path: Path) -> None:
    for number, (starts, said) in enumerate(
        [
            ({1: ALONE, 4: ALONE}, "one process, deepspeed"),
            ({4: ALONE}, "steps 1–3: not recorded; 4–9: one process, deepspeed"),
            ({}, None),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert gather(with_starts(run, folder, starts), []).facts.get("layout") == said
    assert gather(run, []).facts["engine"] == "torch", "without a record, what the config says"


def test_B1_damage_is_named_by_file_and_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        gather(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        gather(tmp_path, [])
    (tmp_path / "e.json").write_text("[]")
    for path, words in ((tmp_path / "e.json", "not a result"), (tmp_path / "gone.json", "no such file")):
        with pytest.raises(DataError, match=words):
            gather(run, [path])


def test_the_command_writes_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "report.html"
    assert main(["--run", str(run), "--output", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>") and str(out) in capsys.readouterr().out


@pytest.mark.parametrize("high", [1e-5, 0.03, 1.0, 7.3, 1e6, 2.6e11])
def test_ticks_are_round_and_inside(high: float) -> None:
    ticks = Axis("x", 0.0, high).ticks(6)
    assert 3 <= len(ticks) <= 13 and all(0 <= tick <= high * 1.0000001 for tick in ticks)
    assert f"{nice_step(high):e}"[0] in "125"
