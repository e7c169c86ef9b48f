"""A study's report claims no more than its inputs bear: seeds, averages, order, padding, updates, what it replaces."""

from __future__ import annotations

import json
import re
import statistics
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from study.made_results import make_study
from study.made_studies import stage, tables
from study.report_files import arm_node, right_share, rows_of

from megatron.checkpoint.manifest import build_manifest, manifest_bytes
from megatron.commands.study import main
from megatron.config.errors import ConfigError, DataError
from megatron.data.ledger_events import averaged_event
from megatron.study.node_config import end_checkpoint, node_folder
from megatron.study.node_state import study_states
from megatron.study.plan import PlannedStudy
from megatron.study.report_curves import share_of_group
from megatron.study.report_data import read_study
from megatron.study.verification import skipped_updates, verify

HALF = {"web": "0.5", "code": "0.5"}


def small(folder: Path, seeds: list[int], **more: Any) -> PlannedStudy:
    """Three arms that end apart: text, the baseline, half and code; and what is added. more: arms, stages."""
    stages = {
        "web": stage(steps=10),
        "half": stage(steps=10, mixture=HALF),
        "code": stage(steps=10, mixture={"code": 1}),
    }
    arms = {"text": {"stages": ["web"]}, "half": {"stages": ["half"]}, "code": {"stages": ["code"]}}
    words = tables(arms | more.pop("arms", {}), stages | more.pop("stages", {}), **more)
    words["study"] |= {"output": str(folder / "runs"), "seeds": seeds}
    return make_study(folder, seeds, tables=words)


def report(study: PlannedStudy, *words: str) -> Path:
    """The report of a study, into its own folder where nothing else is said."""
    assert main(["report", str(study.study.path), "--no-run-reports", *words]) == 0
    return Path(study.study.words.study.output) / "report"


def forget(study: PlannedStudy, arm: str, seed: int) -> None:
    """An arm's end is not evaluated with this seed."""
    node_folder(study, arm_node(study, arm, seed)).results.unlink()


def rewrite_state(study: PlannedStudy, name: str, change: Any) -> None:
    """Changes state.json of a node's last checkpoint, which stays whole."""
    path = end_checkpoint(study, name)
    state = json.loads((path / "state.json").read_text())
    change(state["data"])
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_bytes(manifest_bytes(build_manifest(path, state["step"], True)))


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_a_comparison_is_of_the_seeds_that_both_have_and_says_so(tmp_path: Path) -> None:
    study = small(tmp_path, [1, 2])
    forget(study, "text", 1)
    folder = report(study)
    row = next(r for r in rows_of(folder / "table.csv") if (r["arm"], r["figure"]) == ("half", "bench/logic/acc"))
    mine = {seed: right_share(study, "half", seed, "logic") for seed in (1, 2)}
    base = right_share(study, "text", 2, "logic")
    assert float(row["mean"]) == pytest.approx(statistics.fmean(mine.values()))
    assert float(row["difference"]) == pytest.approx(mine[2] - base)
    for name in ("report.md", "index.html"):
        text = (folder / name).read_text()
        change = f"{100 * (mine[2] - base) / base:+.1f} % (seed 2 of both)".replace("-", "−")
        assert change in text
        assert re.search(r"(\d+) of \1 comparisons have one seed alone \(half, code\): their intervals and p-val", text)
        assert f"{100 * base:.1f} ± " in text and " (1)" in text  # the figure of the baseline says its one seed
        # the mean of two seeds is never set against the one that the baseline has
        assert "over seed 2" in text
        assert not re.search(r"against \d+\.\d %(?! over seed 2)", text)


def test_arms_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    study = small(tmp_path, [1, 2])
    forget(study, "text", 1)
    forget(study, "half", 2)
    folder = report(study)
    rows = [row for row in rows_of(folder / "table.csv") if row["arm"] == "half"]
    assert rows
    for row in rows:
        assert row["mean"] and not row["difference"] and not row["p"] and row["best"] == "0"
    for name in ("report.md", "index.html"):
        text = (folder / name).read_text()
        assert "no seed in common with text: half." in text
        assert "no seed in common</small>" in text or "<br>no seed in common" in text


def test_whole_seeds_need_no_caution(seeds: tuple[PlannedStudy, Path]) -> None:
    text = (seeds[1] / "report.md").read_text()
    assert "one seed alone" not in text and "of both" not in text and "in common" not in text


# -- averages ----------------------------------------------------------------------------------------------------------


def soup(folder: Path) -> PlannedStudy:
    """An average of half and code, three to one, and the same way round for what goes on from it."""
    last = {"name": "soup", "average": ["half", "code"], "weights": [3, 1]}
    on = stage(steps=10, mixture={"web": 1}, take={"optimizer": "fresh"}) | {"name": "after"}
    arms = {"soup": {"stages": [last]}, "after": {"from": "soup", "stages": [on]}}
    return small(folder, [1], arms=arms)


def test_an_average_is_not_reported_as_its_first_member(tmp_path: Path) -> None:
    study = soup(tmp_path)
    folder = report(study, "--baseline", "half")
    row = next(line for line in (folder / "report.md").read_text().splitlines() if "soup-vs-half" in line)
    assert "| another, of half/half alone |" in row or "| the same, of half/half alone |" in row
    assert "| not told: an average | not told: an average |" in row
    page = (folder / "diffs/soup-vs-half.html").read_text()
    assert "its ledger is that of half/half, its first member, and says nothing of the others" in page
    assert "the same samples in the same order" not in page
    text = (folder / "report.md").read_text()
    assert "1.28K (soup, all members)" in text and "1.92K (after, all members)" in text
    assert "soup averages several, the way of half/half is drawn" in (folder / "index.html").read_text()


def test_the_share_of_an_average_is_that_of_its_members_by_weight(tmp_path: Path) -> None:
    study = soup(tmp_path)
    shares = {arm.name: share_of_group(read_study(study), arm) for arm in study.graph.arms}
    assert shares["half"] == pytest.approx(0.5) and shares["code"] == 1
    assert shares["soup"] == pytest.approx(0.75 * 0.5 + 0.25 * 1)
    assert shares["after"] == pytest.approx(0.625 / 2)  # as many tokens of text again


def test_pages_name_no_place_of_this_machine(tmp_path: Path) -> None:
    study = soup(tmp_path)
    member = end_checkpoint(study, arm_node(study, "half", 1)).absolute()
    event = averaged_event("half", 10, 40, [{"path": str(member), "step": 10, "share": "3/4", "manifest": "00"}])
    rewrite_state(study, arm_node(study, "soup", 1), lambda data: data["events"].append(event))
    folder = report(study, "--baseline", "half")
    page = (folder / "diffs/soup-vs-half.html").read_text()
    assert f"3/4 of nodes/{arm_node(study, 'half', 1)}/checkpoints/step-000000010" in page
    assert not [path for path in (folder / "diffs").iterdir() if str(tmp_path) in path.read_text()]


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "other", "said"),
    [
        ({}, {"lr": {"peak": Decimal("0.002")}}, "learning rate"),
        ({}, {"global_batch_size": 8, "steps": 10}, "sequence lengths or batches"),
        ({"set": {"optimizer.weight_decay": Decimal("0.03")}}, {}, "optimizer"),
    ],
)
def test_a_pair_that_differs_in_more_than_order_is_no_test_of_order(
    arm: dict[str, Any], other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    phases = [{"mixture": {"web": a, "python": b}} for a, b in (("0.8", "0.2"), ("0.2", "0.8"))]
    up, down = stage(steps=20, phases=phases), stage(steps=20, reverse="up") | other
    del up["mixture"], down["mixture"]
    words = tables({"up": {"stages": ["up"]}, "down": {"stages": ["down"]} | arm}, {"up": up, "down": down})
    words["study"] |= {"output": str(tmp_path / "runs"), "seeds": [1]}
    folder = report(make_study(tmp_path, [1], tables=words))
    page = (folder / "diffs/down-vs-up.html").read_text()
    assert "the same aggregate" in page and f"no test of order alone: these differ, too: {said}" in page
    row = next(line for line in (folder / "report.md").read_text().splitlines() if "down-vs-up" in line)
    assert f"| the same | another | {said} |" in row


def test_another_objective_or_packing_is_no_test_of_order(tmp_path: Path) -> None:
    """Of ledgers whose totals are equal to the token."""
    study = small(tmp_path, [1], arms={"again": {"stages": ["web2"]}}, stages={"web2": stage(steps=10, lr={"peak": 1})})
    objective = {
        "name": "instruction",
        "whole_loss": [],
        "weigh_by": "samples",
        "masks": {"web": "ab"},
        "loss_tokens": {},
    }

    def change(data: dict[str, Any]) -> None:
        data["stages"][0] |= {"objective": objective, "packing": "padded, too_long drop"}

    rewrite_state(study, arm_node(study, "again", 1), change)
    row = next(line for line in (report(study) / "report.md").read_text().splitlines() if "again-vs-text" in line)
    assert "| the same | another | what the loss is on, packing, learning rate |" in row


def test_another_mixture_is_no_other_recipe(tmp_path: Path) -> None:
    study = small(
        tmp_path, [1], arms={"longer": {"from": "half", "stages": ["half2"]}}, stages={"half2": stage(steps=10)}
    )
    lines = (report(study) / "report.md").read_text().splitlines()
    for arm in ("half", "longer", "code"):
        row = next(line for line in lines if f"{arm}-vs-text" in line)
        assert "| another | another | nothing |" in row or arm == "longer" and "| learning rate |" in row, row


# -- tokens, updates, figures ------------------------------------------------------------------------------------------


def test_padding_is_no_length(tmp_path: Path) -> None:
    study = small(tmp_path, [1])

    def pad(data: dict[str, Any]) -> None:
        use = data["stages"][0]["use"]["web"]
        use |= {"tokens": use["tokens"] - 200, "padding": 200}

    rewrite_state(study, arm_node(study, "half", 1), pad)
    folder = report(study)
    text = (folder / "report.md").read_text()
    assert "not all arms are as long as text with its 640 tokens, padding not counted: 440 (half)" in text
    assert "1,920 tokens were trained once, 1,920 for each arm alone, of the former 200 padding" in text
    assert verify(study, study_states(study)).padding == 200


def test_steps_without_an_update_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path, [1])
    name = arm_node(study, "half", 1)
    path = node_folder(study, name).path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in (row for row in rows if "validation" not in row):
        row |= {"skipped": row["step"] != 4, "skipped_total": row["step"] - (row["step"] >= 4)}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert skipped_updates(study, name) == (9, 10)
    assert skipped_updates(study, arm_node(study, "text", 1)) == (0, 10)
    folder = report(study)
    said = f"half {name[:8]}, seed 1 9 of 10 (arms half)"
    assert said in (folder / "index.html").read_text() and said in capsys.readouterr().out
    assert main(["status", str(study.study.path)]) == 0
    assert f"half {name[:8]}: 9 of 10 steps" in " ".join(capsys.readouterr().out.split())


def test_what_was_trained_twice_is_steps_and_not_looks_at_held_out_documents(tmp_path: Path) -> None:
    study = small(tmp_path, [1])
    folder = node_folder(study, arm_node(study, "half", 1)).path
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation" in row for row in rows) == 1
    (folder / "metrics.discarded.jsonl").write_text("".join(json.dumps(row | {"tokens": 64}) + "\n" for row in rows))
    found = verify(study, study_states(study))
    assert (found.redone_steps, found.redone_tokens) == (10, 640)


def test_results_that_were_changed_by_hand_do_not_stand(tmp_path: Path) -> None:
    study = small(tmp_path, [1])
    name = arm_node(study, "half", 1)
    path = node_folder(study, name).results
    content = json.loads(path.read_text())
    figure = next(one for one in content["metrics"] if one["task"] == "logic")
    true, figure["value"] = figure["value"], 0.99
    path.write_text(json.dumps(content))
    folder = report(study)
    text = (folder / "index.html").read_text()
    assert f"results.json was changed: bench/logic/acc is 0.99 there and {true:g} in evaluation-bench.json." in text
    row = next(r for r in rows_of(folder / "table.csv") if (r["arm"], r["figure"]) == ("half", "bench/logic/acc"))
    assert float(row["mean"]) == pytest.approx(true)
    with pytest.raises(DataError, match="results.json was changed"):
        report(study, "--strict")


def test_marks_are_explained_as_they_are_made(seeds: tuple[PlannedStudy, Path]) -> None:
    text, html = (seeds[1] / "report.md").read_text(), (seeds[1] / "index.html").read_text()
    assert "with a \\* where it is told" in text and "Bold: the best of a column" in text
    assert "bold where it is told" not in text and "Underlined" not in text
    assert "bold where it is told" in html and "Underlined: the best of a column" in html


# -- where it is written -----------------------------------------------------------------------------------------------


def test_a_report_of_a_part_leaves_the_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path, [1, 2])
    folder = report(study)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for words, name in (
        (["--arm", "half"], "report-arms-half"),
        (["--seeds", "2"], "report-seeds-2"),
        (["--arm", "half", "--seeds", "2"], "report-arms-half-seeds-2"),
    ):
        report(study, *words)
        assert f"{folder.with_name(name)}/index.html" in capsys.readouterr().out
        assert (folder.with_name(name) / "index.html").is_file()
    report(study, "--arm", "h*")
    assert len(list(folder.parent.glob("report-arms-h_-*"))) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    report(study, "--arm", "*")  # all of them
    report(study, "--seeds", "1,2")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    capsys.readouterr()
    report(study, "--arm", "half", "--output", str(folder))
    assert "removed what an earlier report had there and this one has not: diffs/code-vs-text.html" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="--seeds 9: nothing was trained with this seed, and study.seeds are 1, 2"):
        report(study, "--seeds", "9")


@pytest.mark.parametrize("place", ["/proc/zz", "/proc"])
def test_a_folder_that_cannot_be_is_told_in_words(place: str, whole: tuple[PlannedStudy, Path]) -> None:
    with pytest.raises(ConfigError, match=rf"{place}: no report can be written there .*--output"):
        report(whole[0], "--output", place)
