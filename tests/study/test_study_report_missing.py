"""What a study's report says of what is missing, changed or contradicts itself; and of ledgers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from study.made_results import make_evaluated, make_study, words
from study.made_studies import stage
from study.made_studies import tables as study_tables
from study.report_files import arm_node, links_of, right_share, rows_of

from megatron.checkpoint.manifest import build_manifest, manifest_bytes
from megatron.commands.study import main
from megatron.config.errors import ConfigError, DataError
from megatron.study.node_config import end_checkpoint, node_folder
from megatron.study.plan import PlannedStudy

# -- what is missing, and what is odd ----------------------------------------------------------------------------------


def test_what_is_missing_is_named_and_the_rest_is_shown(
    seeds: tuple[PlannedStudy, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = seeds
    html = (folder / "index.html").read_text()
    assert "Incomplete: 6 missing." in html
    assert html.index("Incomplete") < html.index("<h2>")
    for arm, said in (("balanced", "is not evaluated"), ("cooled", "is not trained (not begun)")):
        for seed in (1, 2, 3):
            assert f"{arm_node(study, arm, seed)[:8]}, seed {seed} {said}; needed by {arm}" in html
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    assert "incomplete: 6 missing" in capsys.readouterr().out
    with pytest.raises(DataError, match="incomplete: on-half .* and 5 more"):
        main(["report", str(study.study.path), "--no-run-reports", "--strict"])


def test_a_complete_study_passes_strict(whole: tuple[PlannedStudy, Path]) -> None:
    assert main(["report", str(whole[0].study.path), "--strict"]) == 0
    assert "Incomplete" not in (whole[1] / "index.html").read_text()


def test_a_study_of_which_nothing_was_run(tmp_path: Path) -> None:
    labels = ["init-text", "init-half", "on-text", "on-half", "to-text", "cooldown", "sweep"]
    make_study(tmp_path, [1], untrained=labels)
    assert main(["report", str(tmp_path / "study.toml")]) == 0
    html = (tmp_path / "runs/report/index.html").read_text()
    assert "Incomplete: 9 missing." in html
    assert "Nothing of these arms is evaluated yet." in html
    assert "Nothing is trained yet" in html
    assert "pale: as planned, where there are no metrics" in html
    links_of(tmp_path / "runs/report/index.html")


def test_trained_and_not_evaluated_still_shows_losses_and_ledgers(tmp_path: Path) -> None:
    labels = ["init-text", "init-half", "on-text", "on-half", "to-text", "cooldown", "sweep"]
    make_study(tmp_path, [1], unevaluated=labels)
    assert main(["report", str(tmp_path / "study.toml")]) == 0
    html = (tmp_path / "runs/report/index.html").read_text()
    assert "Loss: web" in html
    assert "diffs/cooled-vs-text.html" in html


def test_one_seed_is_said_to_be_one(whole: tuple[PlannedStudy, Path], seeds: tuple[PlannedStudy, Path]) -> None:
    assert "One seed: intervals and p-values are over the items" in (whole[1] / "index.html").read_text()
    assert "3 seeds: figures are means" in (seeds[1] / "index.html").read_text()


def test_items_that_were_changed_since_are_not_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path, [1])
    path = node_folder(study, arm_node(study, "balanced", 1)).evaluation("bench")
    path.write_text(path.read_text() + " ")
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    html = (tmp_path / "runs/report/index.html").read_text()
    assert "is another file than results.json was made from" in html
    row = next(
        row
        for row in rows_of(tmp_path / "runs/report/table.csv")
        if (row["arm"], row["figure"]) == ("balanced", "bench/logic/acc")
    )
    assert row["mean"]
    assert row["p"] == row["low"] == row["holm_p"] == ""
    path.unlink()
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    assert "is gone: figures of suite bench are shown" in (tmp_path / "runs/report/index.html").read_text()


def test_models_that_answered_other_items_are_not_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path, [1])
    make_evaluated(study, arm_node(study, "cooled", 1), items=80)
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    assert (
        "answered other items than the rest: shown, and not compared"
        in (tmp_path / "runs/report/index.html").read_text()
    )
    rows = {(row["arm"], row["figure"]): row for row in rows_of(tmp_path / "runs/report/table.csv")}
    assert rows["cooled", "bench/logic/acc"]["p"] == ""
    assert rows["balanced", "bench/logic/acc"]["p"]
    assert rows["cooled", "loss/web/loss"]["p"]


def test_results_of_another_node_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, [1])
    one, other = (node_folder(study, arm_node(study, arm, 1)).results for arm in ("text", "balanced"))
    shutil.copy(one, other)
    with pytest.raises(DataError, match="it was copied there"):
        main(["report", str(study.study.path)])
    other.write_text("{")
    with pytest.raises(DataError, match="not a node's results"):
        main(["report", str(study.study.path)])


def test_words_that_name_nothing_are_refused_or_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, [1])
    with pytest.raises(ConfigError, match="--baseline balance: no arm is called so: did you mean 'balanced'"):
        main(["report", str(study.study.path), "--baseline", "balance"])
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        main(["report", str(study.study.path), "--output", str(file)])
    for over, message in (
        ({"labels": {"txt": "x"}}, "report.labels names 'txt', which is no arm"),
        ({"pareto": ["text"]}, "give two different scores"),
        ({"scores": {"a": ["logic"]}, "pareto": ["a", "b"]}, "pareto names 'b', which is no score"),
        ({"alpha": 2}, "alpha"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(["report", str(make_study(tmp_path, [1], report=over).study.path)])
    over = {"scores": {"mine": ["logik"], "mixed": ["logic", "loss/web/loss"], "good": ["bench/logic", "programs"]}}
    over["scores"] |= {"wild": ["bench/*c"], "key": ["*/choice/acc"]}
    study = make_study(tmp_path, [1], report=over)
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    said = capsys.readouterr().err
    assert "report.scores.mine: 'logik' is no figure of any node" in said
    assert "Score 'mixed' is not shown: it would average unlike figures" in said
    rows = {(row["arm"], row["figure"]): row for row in rows_of(tmp_path / "runs/report/table.csv")}
    values = [right_share(study, "cooled", 1, task) for task in ("logic", "programs")]
    assert float(rows["cooled", "good"]["mean"]) == pytest.approx(sum(values) / 2)
    assert float(rows["cooled", "wild"]["mean"]) == pytest.approx(values[0])  # logic alone ends so
    assert float(rows["cooled", "key"]["mean"]) == pytest.approx(right_share(study, "cooled", 1, "choice"))
    with pytest.raises(DataError, match="logik"):
        main(["report", str(study.study.path), "--no-run-reports", "--strict"])


def test_another_baseline_and_some_arms(whole: tuple[PlannedStudy, Path]) -> None:
    study, folder = whole
    other = folder.parent / "some"
    words = ["report", str(study.study.path), "--output", str(other), "--no-run-reports"]
    assert main([*words, "--arm", "share-*", "--baseline", "share-50"]) == 0
    rows = rows_of(other / "table.csv")
    assert {row["arm"] for row in rows} == {f"share-{share}" for share in (0, 25, 50, 75, 100)}
    assert {row["baseline"] for row in rows} == {"share-50"}
    assert main([*words, "--arm", "share-*"]) == 0  # the study's baseline stands beside them
    assert {row["arm"] for row in rows_of(other / "table.csv")} == {"text"} | {
        f"share-{share}" for share in (0, 25, 50, 75, 100)
    }
    with pytest.raises(ConfigError, match="--arm sharp"):
        main([*words, "--arm", "sharp"])


def test_what_an_earlier_report_wrote_and_this_does_not_is_removed(whole: tuple[PlannedStudy, Path]) -> None:
    study, folder = whole
    other = folder.parent / "stale"
    words = ["report", str(study.study.path), "--output", str(other), "--no-run-reports"]
    assert main(words) == 0
    (other / "plots" / "mine.svg").write_text("")  # not ours, so it stays
    assert (other / "diffs" / "cooled-vs-text.html").is_file()
    assert main([*words, "--arm", "balanced"]) == 0
    assert [path.name for path in (other / "diffs").iterdir()] == ["balanced-vs-text.html"]
    assert (other / "plots" / "mine.svg").is_file()
    assert {path.name for path in (other / "plots").iterdir()} > {"mine.svg", "graph.svg"}


def test_without_a_baseline_figures_stand_alone(tmp_path: Path) -> None:
    tables = words(tmp_path, [1])
    del tables["study"]["baseline"]
    make_study(tmp_path, [1], tables=tables)
    assert main(["report", str(tmp_path / "study.toml"), "--no-run-reports"]) == 0
    other = tmp_path / "runs" / "report"
    assert {row["p"] for row in rows_of(other / "table.csv")} == {""}
    assert "No baseline" in (other / "index.html").read_text()
    assert not (other / "diffs").exists()
    links_of(other / "index.html")


def test_one_arm_alone(tmp_path: Path) -> None:
    tables = study_tables({"only": {"stages": ["one"]}}, {"one": stage(steps=12)})
    tables["study"]["output"] = str(tmp_path / "runs")
    make_study(tmp_path, [1234], tables=tables)
    assert main(["report", str(tmp_path / "study.toml")]) == 0
    assert {row["arm"] for row in rows_of(tmp_path / "runs/report/table.csv")} == {"only"}
    links_of(tmp_path / "runs/report/index.html")


def test_labels_and_chosen_columns(tmp_path: Path) -> None:
    over = {"labels": {"cooled": "with <cooldown> | x"}, "metrics": ["loss/*"], "resamples": 1000}
    study = make_study(tmp_path, [1], report=over)
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    figures = {row["figure"] for row in rows_of(tmp_path / "runs/report/table.csv")}
    assert figures == {"text", "code", "loss/web/loss", "loss/python/loss", "loss/rust/loss"}
    html, text = ((tmp_path / "runs/report" / name).read_text() for name in ("index.html", "report.md"))
    assert "with &lt;cooldown&gt; | x" in html
    assert "with \\<cooldown\\> \\| x" in text
    links_of(tmp_path / "runs/report/index.html")


# -- ledgers -----------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_in_the_ledgers(seeds: tuple[PlannedStudy, Path], tmp_path: Path) -> None:
    study, folder = seeds
    graph = study.graph
    html = (folder / "index.html").read_text()
    there = [node for node in graph.nodes.values() if node.label != "cooldown"]
    trained = sum(node.tokens for node in there)
    naive = sum(arm.naive for arm in graph.arms if arm.name != "cooled")
    assert f"{trained:,} tokens were trained once, {naive:,} for each arm alone: {trained / naive:.4f}" in html
    assert "as far as nodes are trained" in html


def test_a_ledger_that_says_other_than_the_plan_is_named(tmp_path: Path) -> None:
    study = make_study(tmp_path, [1])
    name = arm_node(study, "text", 1)
    path = end_checkpoint(study, name)
    state = json.loads((path / "state.json").read_text())
    state["data"]["stages"][-1]["samples"] -= 4
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_bytes(manifest_bytes(build_manifest(path, state["step"], True)))
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    assert "2,496 tokens by its ledger, 2,560 planned" in (tmp_path / "runs/report/index.html").read_text()


def order_study(folder: Path) -> PlannedStudy:
    """Paper A's test of order: stepwise increase, decrease and uniform, with one aggregate."""
    phases = [["0.7", "0.3"], ["0.7", "0.3"], ["0.6", "0.4"], ["0.5", "0.5"]]
    stages = {
        "increase": stage(steps=40, phases=[{"mixture": {"web": a, "python": b}} for a, b in phases]),
        "decrease": stage(steps=40, reverse="increase"),
        "uniform": stage(steps=40, aggregate_of=["increase"]),
    }
    for name in stages:
        del stages[name]["mixture"]
    arms = {name: {"stages": [name]} for name in ("uniform", "increase", "decrease")}
    words = study_tables(arms, stages)
    words["study"] |= {"output": str(folder / "runs"), "seeds": [5]}
    return make_study(folder, [5], tables=words)


def test_controls_of_order_have_one_aggregate_another_order_and_no_replay(tmp_path: Path) -> None:
    study = order_study(tmp_path)
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    for arm in ("increase", "decrease"):
        page = (tmp_path / "runs/report" / f"diffs/{arm}-vs-uniform.html").read_text()
        assert "the same aggregate: as many samples and tokens of each source, to the sample" in page
        assert "not the same samples in the same order" in page
        assert page.count("0 tokens trained on twice") == 2
        assert "a test of order: nothing else differs" in page
    html = (tmp_path / "runs/report/index.html").read_text()
    row = "".join(f'<td class="left">{cell}</td>' for cell in ("the same", "another", "nothing"))
    assert html.count(f"{row}<td>5</td><td>0</td>") == 2


def test_arms_of_other_lengths_are_named(seeds: tuple[PlannedStudy, Path]) -> None:
    html = (seeds[1] / "index.html").read_text()
    assert "not all arms are as long as text with its 5.12K tokens: 6.14K (cooled)." in html
    assert "not all arms are as long as text with its 5.12K tokens: 2.56K (share-0, share-25, share-50, …)" in html


# -- a judge's win rate ------------------------------------------------------------------------------------------------


def test_a_win_rate_is_held_against_one_half(tmp_path: Path) -> None:
    """It is a comparison with the baseline already, with the judge's own p-value."""
    study = make_study(tmp_path, [1])
    base = arm_node(study, "text", 1)
    for arm, rate, p in (("balanced", 0.9, 1e-6), ("cooled", 0.55, 0.4)):
        folder = node_folder(study, arm_node(study, arm, 1))
        content = json.loads(folder.results.read_text())
        content["metrics"].append(
            {"suite": "win-rate", "task": "against on-text", "group": "win rate", "metric": "win_rate"}
            | {"value": rate, "stderr": 0.03, "items": 60, "higher_is_better": True}
        )
        content["win_rate"] = {"file": "win-rate.json", "against": base, "judge": "j", "p": p}
        (folder.path / "win-rate.json").write_text("{}")
        folder.results.write_text(json.dumps(content))
    assert main(["report", str(study.study.path), "--no-run-reports"]) == 0
    rows = {
        row["arm"]: row for row in rows_of(tmp_path / "runs/report/table.csv") if row["figure"].startswith("win-rate")
    }
    assert set(rows) == {"balanced", "cooled"}
    assert float(rows["balanced"]["difference"]) == pytest.approx(0.4)
    assert float(rows["balanced"]["p"]) == 1e-6
    assert (rows["balanced"]["told"], rows["cooled"]["told"]) == ("1", "0")
    assert rows["balanced"]["change_percent"] == ""
    assert "win-rate.json" in (tmp_path / "runs/report/index.html").read_text()
    other = ["report", str(study.study.path), "--no-run-reports", "--baseline", "cooled"]
    assert main(other) == 0  # it was not won against that one
    rows = {
        row["arm"]: row for row in rows_of(tmp_path / "runs/report/table.csv") if row["figure"].startswith("win-rate")
    }
    assert rows["balanced"]["p"] == ""
