"""What a plan says of arms: sharing that is lost and why, arms that are one, controls of order, averages, axes."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from study.made_studies import BASE, LR, planned, stage, tables

from megatron.study.order_controls import totals
from megatron.study.plan import study_plan

STAGES = {"init": stage(), "on": stage(mixture={"code": 1}), "cool": stage(mixture={"rust": 1})}


def plan(folder: Path, words: dict[str, Any], *only: str) -> dict[str, Any]:
    return study_plan(planned(folder, words, *only))


def warnings(found: dict[str, Any], kind: str) -> list[str]:
    return [row["text"] for row in found["warnings"] if row["kind"] == kind]


LOST = {
    "optimizer.weight_decay": (Decimal("0.2"), ("optimizer.weight_decay is 0.1 there and 0.2 here",)),
    "model.rope_theta": (5000, ("model.rope_theta is 10000.0 there and 5000.0 here",)),
    "sources.web.tokens": (90_000, ("sources.web.fingerprint is planned:100000 there and planned:90000 here",)),
    "train.precision": ("bf16", ("train.precision is fp32 there and bf16 here",)),
    "train.global_batch_size": (8, ("stage.samples is 16 there and 32 here",)),
}


@pytest.mark.parametrize("key", LOST)
def test_an_override_that_changes_a_trunk_says_what_is_lost_and_why(tmp_path: Path, key: str) -> None:
    value, said = LOST[key]
    arms = {"a": {"stages": ["init", "on"]}, "b": {"stages": ["init", "cool"], "set": {key: value}}}
    found = plan(tmp_path, tables(arms, STAGES))
    (text,) = warnings(found, "lost-sharing")
    for part in ("arm b does not share stage 'init' with arm a", f"arms.b.set: {key}", *said):
        assert part in text
    assert found["trained"] == found["naive"]


def test_an_axis_over_the_whole_run_is_told_and_one_over_its_own_stage_is_not(tmp_path: Path) -> None:
    axes = {"decay": {"set": ["optimizer.weight_decay"], "values": [Decimal("0.1"), Decimal("0.3")]}}
    arms = {"a": {"stages": ["init", "on"], "axes": ["decay"]}}
    (text,) = warnings(
        plan(tmp_path, tables(arms, STAGES, study={"name": "s", "output": "o"}, axes=axes)), "lost-sharing"
    )
    assert "arm a-0.3" in text and "axis decay" in text
    axes = {"length": {"set": ["stages.on.steps"], "values": [1, 2]}}
    arms = {"a": {"stages": ["init", "on"], "axes": ["length"]}}
    found = plan(tmp_path, tables(arms, STAGES, study={"name": "s", "output": "o"}, axes=axes))
    assert not warnings(found, "lost-sharing") and len(found["lost"]) == 1 and found["lost"][0]["asked"]
    assert len(found["nodes"]) == 3


def test_an_axis_over_another_stage_that_changes_the_trunk_is_told(tmp_path: Path) -> None:
    """A cap over the whole run makes the mixture of the first stage depend on the length of the second."""
    stages = {**STAGES, "init": stage(steps=100, mixture={"web": 1, "rust": 9}, cap={"epochs": 1, "over": "run"})}
    axes = {"length": {"set": ["stages.on.steps"], "values": [200, 400]}}
    arms = {"a": {"stages": ["init", "on"], "axes": ["length"]}}
    found = plan(tmp_path, tables(arms, stages, study={"name": "s", "output": "o"}, axes=axes))
    (text,) = warnings(found, "lost-sharing")
    assert "arm a-400 does not share stage 'init'" in text and "(by axis length: stages.on.steps)" in text
    assert not found["lost"][0]["asked"]


def test_phases_that_begin_elsewhere_are_told_apart(tmp_path: Path) -> None:
    """Where a source runs dry decides where its mixture changes, and shares alone look the same."""
    base = {**BASE, "sources": {**BASE["sources"], "rust": {"tokens": 2000, "max_epochs": 1, "dry": "renormalise"}}}
    axes = {"epochs": {"set": ["sources.rust.max_epochs"], "values": [1, 2]}}
    stages = {"init": stage(steps=200, mixture={"web": 1, "rust": 1})}
    arms = {"a": {"stages": ["init"], "axes": ["epochs"]}}
    words = tables(arms, stages, study={"name": "s", "output": "o"}, axes=axes, base=base)
    (text,) = warnings(plan(tmp_path, words), "lost-sharing")
    assert text.count("(steps begin at samples 0, ") == 2


def test_of_two_axes_the_one_that_changes_the_whole_run_is_told(tmp_path: Path) -> None:
    axes = {
        "mix": {"set": ["stages.init.mixture"], "values": [{"web": 1}, {"rust": 1}], "labels": ["w", "r"]},
        "decay": {"set": ["optimizer.weight_decay"], "values": [Decimal("0.1"), Decimal("0.3")]},
    }
    arms = {"plain": {"stages": ["init"]}, "a": {"stages": ["init"], "axes": ["mix", "decay"]}}
    found = plan(tmp_path, tables(arms, STAGES, study={"name": "s", "output": "o"}, axes=axes))
    texts = warnings(found, "lost-sharing")
    assert len(texts) == 2 and all("weight_decay is 0.1 there and 0.3 here" in text for text in texts)
    assert [row["asked"] for row in found["lost"]] == [False, True, False]
    assert "arm a-r-0.3 does not share stage 'init' with arm a-r-0.1" in texts[1]


def test_a_branch_keeps_the_trunk_whatever_it_sets(tmp_path: Path) -> None:
    arms = {"a": {"stages": ["init"]}, "b": {"from": "a/init", "stages": ["on"], "set": {"optimizer.weight_decay": 1}}}
    found = plan(tmp_path, tables(arms, STAGES))
    assert len(found["nodes"]) == 2 and not found["lost"]


def test_lengths_as_a_share_of_the_run_stay_those_of_the_trunk(tmp_path: Path) -> None:
    base = {**BASE, "train": BASE["train"] | {"tokens": 640}}
    stages = {"init": {"share": Decimal("0.5"), "mixture": {"web": 1}, "lr": LR}, "on": stage()}
    arms = {"a": {"stages": ["init"]}, "b": {"from": "a", "stages": ["on"], "set": {"train.tokens": 6400}}}
    found = plan(tmp_path, tables(arms, stages, base=base))
    assert len(found["nodes"]) == 2 and found["nodes"][0]["tokens"] == 320


def test_arms_that_are_the_same_are_said(tmp_path: Path) -> None:
    arms = {"a": {"stages": ["init", "on"]}, "b": {"from": "a/init", "stages": ["on"], "set": {"log.every": 3}}}
    found = plan(tmp_path, tables(arms, STAGES))
    assert found["same_arms"] == [["a", "b"]]
    assert "a, b are the same arm" in warnings(found, "same-arms")[0]


# -- controls of order -------------------------------------------------------------------------------------------------

PHASES = {
    "increase": {
        "steps": 20,
        "phases": [
            {"mixture": {"web": Decimal(share), "rust": 1 - Decimal(share)}} for share in ("0.8", "0.6", "0.4", "0.2")
        ],
        "lr": LR,
    },
    "decrease": {"steps": 20, "reverse": "increase", "lr": LR},
    "uniform": {"aggregate_of": ["increase"], "lr": LR},
    "other": stage(steps=20, mixture={"web": 1}),
}


def test_orders_of_one_aggregate_are_named(tmp_path: Path) -> None:
    arms = {name: {"stages": [name]} for name in PHASES}
    result = planned(tmp_path, tables(arms, PHASES))
    (row,) = study_plan(result)["same_aggregate"]
    assert row["arms"] == ("increase", "decrease", "uniform")
    for name in row["arms"]:
        samples, tokens = totals(result.arms[name].end)
        assert samples == {"web": 40, "rust": 40} == row["samples"] and tokens == row["tokens"]


def test_arms_with_one_order_are_no_test_of_order(tmp_path: Path) -> None:
    arms = {"a": {"stages": ["other"]}, "b": {"stages": ["other"], "set": {"optimizer.weight_decay": 1}}}
    assert plan(tmp_path, tables(arms, PHASES))["same_aggregate"] == []


UNLIKE: dict[str, dict[str, Any]] = {
    "peak 0.002": {"lr": {"peak": Decimal("0.002")}},
    "objective is instruction": {"objective": "instruction"},
    "packing is padded": {"packing": "padded", "too_long": "drop"},
    "seq_length is 8": {"seq_length": 8},
    "take is optimizer fresh": {"take": {"optimizer": "fresh"}},
}


@pytest.mark.parametrize("said", UNLIKE)
def test_arms_that_differ_in_more_than_order_are_no_test_of_it(tmp_path: Path, said: str) -> None:
    phases = {**PHASES, "uniform": PHASES["uniform"] | UNLIKE[said]}
    base = {**BASE, "sources": {name: one | {"documents": 10_000} for name, one in BASE["sources"].items()}}
    arms = {name: {"stages": ["other", name]} for name in ("increase", "decrease", "uniform")}
    found = plan(tmp_path, tables(arms, phases, base=base))
    (row,) = found["same_aggregate"]
    assert row["arms"] == ("increase", "decrease")
    (text,) = warnings(found, "unlike-control")
    assert "stage 'uniform' has aggregate_of 'increase'" in text and said in text
    assert found["warnings"] and not warnings(plan(tmp_path, tables(arms, PHASES)), "unlike-control")


def test_an_optimizer_of_its_own_and_a_stage_swapped(tmp_path: Path) -> None:
    stages = {"up": stage(), "down": stage(mixture={"rust": 1})}
    stages = {name: {key: one[key] for key in one if key != "lr"} for name, one in stages.items()}
    first = {"lr": LR | {"horizon": "9 steps"}}
    both = [{"use": one, **first} for one in stages]
    arms = {"a": {"stages": [both[0], "down"]}, "b": {"stages": [both[1], "up"]}}
    assert [row["arms"] for row in plan(tmp_path, tables(arms, stages))["same_aggregate"]] == [("a", "b")]
    arms["b"]["set"] = {"optimizer.weight_decay": 1}
    assert plan(tmp_path, tables(arms, stages))["same_aggregate"] == []


def test_a_cooldown_on_a_mixture_is_no_control(tmp_path: Path) -> None:
    cool = {"steps": 4, "like": "increase", "lr": {"peak": Decimal("0.0001")}, "take": {"optimizer": "fresh"}}
    arms = {"a": {"stages": ["increase", "cool"]}}
    assert not warnings(plan(tmp_path, tables(arms, {**PHASES, "cool": cool})), "unlike-control")
    cool["objective"] = "instruction"
    (text,) = warnings(plan(tmp_path, tables(arms, {**PHASES, "cool": cool})), "unlike-control")
    assert "has like = 'increase'" in text and "objective is instruction and there language-modelling" in text


def test_a_control_that_misses_its_aggregate_is_told(tmp_path: Path) -> None:
    odd = {
        "up": {"steps": 3, "phases": [{"mixture": {"web": 1}}, {"mixture": {"rust": 1, "web": 2}}], "lr": LR},
        "down": {"steps": 3, "reverse": "up", "lr": LR},
    }
    result = planned(tmp_path, tables({name: {"stages": [name]} for name in odd}, odd))
    mine, theirs = (totals(result.arms[name].end)[0] for name in odd)
    texts = warnings(study_plan(result), "unequal-control")
    assert bool(texts) == (mine != theirs)
    odd["down"]["steps"] = 6
    (text,) = warnings(study_plan(planned(tmp_path, tables({n: {"stages": [n]} for n in odd}, odd))), "unequal-control")
    assert "stage 'down' is a control of the order of 'up', and has 24 samples where that has 12" in text


# -- names in [results] and [report] -----------------------------------------------------------------------------------


def test_names_that_study_run_or_the_report_would_find_wrong_are_told(tmp_path: Path) -> None:
    def found(results: dict[str, Any], **scores: list[str]) -> list[tuple[str, str]]:
        return of_names(tmp_path, results, {"scores": scores})

    heldout = {"suites": [{"name": "heldout"}]}
    right = ["loss/web/loss", "loss/*/loss", "code", "heldout/heldout_web", "heldout_rust*", "*/python/bits_per_byte"]
    assert found(heldout, text=right) == []
    ((kind, text),) = found(heldout, text=["loss/wbe/loss"])
    assert (
        kind == "unknown-figure"
        and "report.scores.text: 'loss/wbe/loss'" in text
        and "did you mean 'loss/web'?" in text
    )
    assert [kind for kind, _ in found({"loss": False}, text=["loss/web/loss"])] == ["unknown-figure"]
    ((kind, text),) = found({"suites": [{"name": "heldot"}]}, text=["heldot/x"])
    assert kind == "study-run-refuses" and "suite 'heldot'" in text and "did you mean heldout?" in text
    some = {"suites": [{"name": "heldout", "sources": ["web"]}], "loss": False}
    assert found(some, text=["heldout_web"]) == [] and found(some, text=["heldout_rust"])[0][0] == "unknown-figure"
    ((kind, text),) = found({"suites": [{"name": "heldout", "sources": ["wbe"]}]})
    assert kind == "study-run-refuses" and "did you mean 'web'?" in text
    ((kind, text),) = found({"loss": {"sources": ["wbe"]}}, text=["loss/web/loss"])
    assert kind == "study-run-refuses" and "did you mean 'web'?" in text
    harness = {"suites": [{"name": "mine", "suite": "harness", "tasks": ["piqa"], "online": True}]}
    assert found(harness, text=["mine/piqa", "piqa", "mine/piqa/acc"]) == []
    assert [kind for kind, _ in found(harness, text=["mien/piqa/acc"])] == ["unknown-figure"]


def of_names(
    folder: Path, results: dict[str, Any], report: dict[str, Any], held_out: str = "0.1"
) -> list[tuple[str, str]]:
    """Kinds and texts of the warnings about [results] and [report]."""
    base = {**BASE, "validation": {"fraction": Decimal(held_out)}}
    words = tables({"a": {"stages": ["init"]}, "b": {"stages": ["on"]}}, STAGES, results=results, report=report)
    rows = plan(folder, words | {"base": base})["warnings"]
    return [(row["kind"], row["text"]) for row in rows if row["kind"] in ("study-run-refuses", "unknown-figure")]


REFUSED = {
    "no held-out documents": ({"suites": [{"name": "heldout"}]}, "results.suites: heldout is about held-out documents"),
    "no held-out documents for losses": ({"loss": {"tokens": 9}}, "results.loss is about held-out documents"),
    "programs": ({"suites": [{"name": "code-vs-text"}]}, "humaneval, mbpp run programs that the model writes"),
    "prompts": ({"samples": {"prompts": "nope.txt"}}, "results.samples.prompts = 'nope.txt': no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_study_run_will_refuse_of_results_is_told_by_the_plan(tmp_path: Path, name: str) -> None:
    results, words = REFUSED[name]
    ((kind, text),) = of_names(tmp_path, results, {}, "0" if "held-out" in name else "0.1")
    assert kind == "study-run-refuses" and words in text and "study.toml:" in text


NAMELESS = {
    "label": ({"labels": {"aa": "x"}}, "report.labels names 'aa', which is no arm: did you mean 'a'?"),
    "labels": ({"labels": {"a": "b"}}, "report.labels: 2 arms are called 'b'"),
    "share": ({"share": "codee"}, "report.share = 'codee' is no group or source: did you mean 'code'?"),
    "plane": ({"pareto": ["code", "txt"]}, "report.pareto names 'txt', which is no score: scores are: "),
}


@pytest.mark.parametrize("name", NAMELESS)
def test_names_of_the_report_that_nothing_is_called_by_are_told(tmp_path: Path, name: str) -> None:
    report, words = NAMELESS[name]
    ((kind, text),) = of_names(tmp_path, {}, report)
    assert kind == "unknown-figure" and words in text


# -- averages ----------------------------------------------------------------------------------------------------------


def test_averages_are_nodes_of_several_parents(tmp_path: Path) -> None:
    arms = {
        "a": {"stages": ["init", "on"]},
        "b": {"stages": ["init", "cool"]},
        "soup": {"stages": [{"name": "mean", "average": ["a/on", "b/cool"], "weights": [3, 1]}]},
        "same": {"stages": [{"name": "soup", "average": ["a", "b"], "weights": ["1.5", "0.5"]}]},
        "turned": {"stages": [{"name": "mean", "average": ["b/cool", "a/on"], "weights": [1, 3]}]},
        "tuned": {
            "stages": [
                {"name": "mean", "average": ["a", "b"]},
                {"use": "on", "name": "t", "take": {"optimizer": "fresh"}},
            ]
        },
        "last": {"stages": ["init", "on", {"name": "late", "last": 2}]},
    }
    result = planned(tmp_path, tables(arms, STAGES))
    found, graph = study_plan(result), result.graph
    ends = {arm.name: graph.nodes[arm.path[-1]] for arm in graph.arms}
    assert ends["soup"].id == ends["same"].id and ends["soup"].tokens == 0
    assert ends["turned"].id != ends["soup"].id, "what goes on from it goes on from another data position"
    assert set(ends["soup"].parents) == {ends["a"].id, ends["b"].id}
    assert ends["last"].parents == (ends["a"].id,)
    # alone, a soup of two arms needs both: 16 x 16 tokens a stage
    naive = {arm.name: arm.naive for arm in graph.arms}
    assert naive == {"a": 512, "b": 512, "soup": 1024, "same": 1024, "turned": 1024, "tuned": 1280, "last": 512}
    assert graph.trained == 3 * 256 + 256
    words = {arm["name"]: arm["stages"][-1]["words"] for arm in found["arms"]}
    assert words["soup"] == "average of a/on, b/cool: 75 %, 25 %"
    assert graph.nodes[ends["tuned"].parents[0]].kind == "average"


# -- axes --------------------------------------------------------------------------------------------------------------


def test_axes_make_arms_as_a_grid_or_side_by_side(tmp_path: Path) -> None:
    axes = {
        "share": {
            "set": ["stages.init.mixture.web", "stages.init.mixture.rust"],
            "rows": [[1, 0], [3, 1]],
            "labels": ["0", "25"],
        },
        "peak": {"set": ["stages.init.lr.peak"], "values": [Decimal("0.001"), Decimal("0.002")]},
    }
    arms = {
        "g": {"stages": ["init"], "axes": ["share", "peak"]},
        "z": {"stages": ["init"], "axes": ["share", "peak"], "combine": "zip"},
    }
    found = plan(tmp_path, tables(arms, STAGES, study={"name": "s", "output": "o"}, axes=axes))
    names = [arm["name"] for arm in found["arms"]]
    assert names == ["g-0-0.001", "g-0-0.002", "g-25-0.001", "g-25-0.002", "z-0-0.001", "z-25-0.002"]
    assert {arm["name"]: arm["stages"][0]["words"] for arm in found["arms"]}["g-25-0.002"] == "web 75 %, rust 25 %"
    assert len(found["nodes"]) == 4


def test_an_axis_over_whole_tables_has_numbers_for_names(tmp_path: Path) -> None:
    axes = {"mix": {"set": ["stages.init.mixture"], "values": [{"web": 1}, {"rust": 1}]}}
    found = plan(
        tmp_path,
        tables({"a": {"stages": ["init"], "axes": ["mix"]}}, STAGES, study={"name": "s", "output": "o"}, axes=axes),
    )
    assert [arm["name"] for arm in found["arms"]] == ["a-1", "a-2"]


def test_what_no_arm_uses_is_said(tmp_path: Path) -> None:
    found = plan(
        tmp_path, tables({"a": {"stages": ["init"]}}, STAGES, axes={"x": {"set": ["log.every"], "values": [1]}})
    )
    said = warnings(found, "study")
    assert {"[stages.on] is used by no arm", "[axes.x] is used by no arm"} <= set(said)
    assert {row["text"] for row in found["warnings"] if row["kind"] == "never-used"} == {
        "python is used by no arm",
        "rust is used by no arm",
    }


def test_chosen_arms_and_what_they_need(tmp_path: Path) -> None:
    arms = {"a": {"stages": ["init"]}, "b-1": {"from": "a", "stages": ["on"]}, "b-2": {"from": "a", "stages": ["cool"]}}
    assert len(plan(tmp_path, tables(arms, STAGES), "b-*")["nodes"]) == 3
    assert len(plan(tmp_path, tables(arms, STAGES), "b-1")["nodes"]) == 2
