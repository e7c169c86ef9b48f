"""Learned weights with their provenance, and caps p <= k N / R."""

from __future__ import annotations

import hashlib
import json
import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from study.made_studies import BASE, LR, planned, stage, tables

from megatron.config.errors import ConfigError
from megatron.study.caps import capped
from megatron.study.learned_weights import read_weights
from megatron.study.plan import study_plan
from megatron.study.sections import WeightsFromSection
from megatron.study.steps import TrainStep

GROUPS = {"web": "web", "python": "code", "rust": "code"}
WANTED = {"web": Decimal("0.5"), "python": Decimal("0.3"), "rust": Decimal("0.2")}

FORMS = {
    "w.csv": "source,weight\nweb,0.5\npython,0.3\nrust,0.2\n",
    "domains.csv": "# learned\nrank;Domain;share\n1;web;0.5\n2;python;0.3\n3;rust;0.2\n",
    "plain.tsv": "web\t0.5\npython\t0.3\nrust\t0.2\n",
    "swarm.csv": "index,web,python,rust\n0,0.5,0.3,0.2\n",
    "map.json": '{"web": 0.5, "python": 0.3, "rust": 0.2}',
    "doremi.json": '{"train_domain_weights": {"web": 0.5, "python": 0.3, "rust": 0.2}, "eval_domain_weights": {}}',
    "mix.json": '{"mix": {"web": {"weight": 0.5, "factor": 1}, "python": {"weight": 0.3}, "rust": {"weight": 0.2}}}',
    "rows.json": '[{"domain": "web", "ratio": 0.5}, {"name": "python", "weight": 0.3}, {"name": "rust", "share": 0.2}]',
    "commas.csv": "source;weight\nweb;0,5\npython;0,3\nrust;0,2\n",
    "bare.csv": "web;0,5\npython;0,3\nrust;0,2\n",
    "swarm-commas.csv": "web;python;rust\n0,5;0,3;0,2\n",
    "bom.csv": "\ufeffsource,weight\nweb,5e-1\npython,0.3\nrust,0.2\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    found = read_weights(WeightsFromSection(file=name), tmp_path, GROUPS, "stage 's'")
    assert found.weights == WANTED and found.absent == ()
    assert found.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_rows_and_names(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("train_web,train_code\n0.9,0.1\n0.4,0.6\n")
    section = WeightsFromSection(file="s.csv", row=2, names={"train_web": "web", "train_code": "code"})
    found = read_weights(section, tmp_path, GROUPS, "s")
    assert found.weights == {"web": Decimal("0.4"), "code": Decimal("0.6")} and found.absent == ()
    for name in ("map.json", "w.csv", "bare.csv"):
        (tmp_path / name).write_text(FORMS[name])
        with pytest.raises(ConfigError, match="row = 2, and .* one mixture.* leave row out"):
            read_weights(WeightsFromSection(file=name, row=2), tmp_path, GROUPS, "s")
    partial = WeightsFromSection(file="p.csv")
    (tmp_path / "p.csv").write_text("source,weight\npython,1\n")
    assert read_weights(partial, tmp_path, GROUPS, "s").absent == ("rust", "web")


WRONG = {
    "source,weight\nweb,0.5\npythn,0.5\n": ("line 3", "'pythn'", "did you mean 'python'?"),
    "source,weight\nweb,-0.5\n": ("line 2", "'-0.5'", "not negative"),
    "source,weight\nweb,nan\n": ("line 2", "'nan'"),
    "source,weight\nweb,inf\n": ("line 2", "'inf'"),
    "source,weight\nweb,0\n": ("no source a weight above zero",),
    "source,weight\nweb,1\nweb,2\n": ("line 3", "'web' stands twice"),
    "source,weight\nweb,much\n": ("line 2", "'much'"),
    "source,weight\nweb\n": ("line 2", "1 values"),
    "": ("is empty",),
    "web,python\n0.5,0.5\n0.1,0.9\n": ("2 mixtures", "row = 1 to 2"),
    "web,python\n0.5,0.5,0.1\n": ("3 values for 2 columns",),
    "0.5,0.5\n": ("'0.5' is neither",),
    '{"web": }': ("line 1", "not valid JSON"),
    '{"web": true}': ("weight 'True'",),
    '{"web": 0.7, "python": 0.3, "web": 0.2}': ("'web' stands twice",),
    '{"weights": {"web": 1}, "mix": {"rust": 1}}': ("under 'weights' and under 'mix'", "leave one"),
    "[" * 100_000: ("cannot be read as weights",),
    f'{{"web": {"9" * 5000}}}': ("cannot be read as weights",),
    "web,O.5\npython,0.3\nrust,0.2\n": ("line 1", "'O.5'"),
    "web,50%\npython,0.5\n": ("line 1", "'50%'"),
    "[3]": ("entry 1",),
    "{}": ("holds no weights",),
}


@pytest.mark.parametrize("content", WRONG)
def test_files_that_do_not_match_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "w").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_weights(WeightsFromSection(file="w"), tmp_path, GROUPS, "stage 's'")
    for part in ("stage 's'", str(tmp_path / "w"), *WRONG[content]):
        assert part in str(caught.value), str(caught.value)


def test_provenance_is_part_of_the_node_and_of_the_plan(tmp_path: Path) -> None:
    learned = {"steps": 4, "lr": LR, "weights_from": {"file": "w.csv"}}
    said = stage(mixture=dict(WANTED))
    words = tables({"a": {"stages": ["learned"]}, "b": {"stages": ["said"]}}, {"learned": learned, "said": said})
    (tmp_path / "w.csv").write_text(FORMS["w.csv"])
    first = planned(tmp_path, words)
    plan = study_plan(first)
    (row,) = plan["arms"][0]["stages"]
    assert row["weights_from"]["sha256"] == hashlib.sha256(FORMS["w.csv"].encode()).hexdigest()
    assert "w.csv" in row["notes"][0] and row["words"] == plan["arms"][1]["stages"][0]["words"]
    (tmp_path / "w.csv").write_text(FORMS["w.csv"] + "\n")
    second = planned(tmp_path, words)
    ends = [{arm.name: arm.path[-1] for arm in one.graph.arms} for one in (first, second)]
    assert ends[0]["a"] != ends[1]["a"] and ends[0]["b"] == ends[1]["b"]


# -- caps --------------------------------------------------------------------------------------------------------------


def filled(weights: dict[str, int], limits: dict[str, Fraction]) -> dict[str, Fraction]:
    """The same by bisection: the multiple of the weights, each cut at its limit, that sums to 1."""
    low, high = Fraction(0), max(limits[name] / weight for name, weight in weights.items())
    for _ in range(80):
        middle = (low + high) / 2
        if sum(min(weight * middle, limits[name]) for name, weight in weights.items()) < 1:
            low = middle
        else:
            high = middle
    return {name: min(weight * high, limits[name]) for name, weight in weights.items()}


@pytest.mark.parametrize("seed", range(60))
def test_caps_hold_and_give_the_rest_in_proportion(seed: int) -> None:
    draw = random.Random(seed)
    names = "abcdefgh"[: draw.randint(1, 8)]
    weights = {name: draw.randint(1, 50) for name in names}
    sizes = {name: draw.randint(10, 2000) for name in names}
    epochs = Decimal(draw.choice(["0.5", "1", "4"]))
    tokens = draw.randint(100, 6000)
    limits = {name: Fraction(epochs) * sizes[name] / tokens for name in names}
    exact = {name: Fraction(weight) for name, weight in weights.items()}
    if sum(limits.values()) < 1:
        with pytest.raises(ConfigError, match="cap.epochs to at least"):
            capped(exact, sizes, epochs, tokens, "stage 's'")
        return
    found = capped(exact, sizes, epochs, tokens, "stage 's'")
    wanted = filled(weights, limits)
    assert sum(found.shares.values()) == 1
    for name in names:
        share = Fraction(found.shares.get(name, Decimal(0)))
        assert abs(share - wanted[name]) <= Fraction(len(names), 10**6)
        assert share <= limits[name] or sum(limits.values()) == 1


def test_a_cap_is_over_the_run_the_stage_or_a_count(tmp_path: Path) -> None:
    """rust: 20,000 tokens, one epoch, over 64,000 tokens of the run, 32,000 of the stage, or 110,000."""
    shares = {}
    for over in ("run", "stage", "110K"):
        first = stage(steps=500, mixture={"web": 1, "rust": 9}, cap={"epochs": 1, "over": over})
        words = tables({"a": {"stages": ["s", "t"]}}, {"s": first, "t": stage(steps=500)})
        result = planned(tmp_path, words)
        step = result.arms["a"].steps[0]
        assert isinstance(step, TrainStep)
        shares[over] = float(step.stage.weights.weight("rust", 0))
        assert "cap of 1 epochs" in step.notes[0] and "rust 90 %" in step.notes[0]
    short = stage(steps=500, mixture={"web": 1, "rust": 9}, cap={"epochs": 1, "over": "1K"})
    (step,) = planned(tmp_path, tables({"a": {"stages": ["s"]}}, {"s": short})).arms["a"].steps
    assert "over 1K tokens (of a stage of 32K, which may so take more epochs)" in step.notes[0]
    assert shares == pytest.approx({"run": 0.3125, "stage": 0.625, "110K": 20 / 110}, abs=2e-6)


def test_a_cap_on_learned_weights_of_groups(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(json.dumps({"code": 0.9, "web": 0.1}))
    learned: dict[str, Any] = {"steps": 1000, "lr": LR, "weights_from": {"file": "w.json"}}
    words = tables({"a": {"stages": ["s"]}}, {"s": learned | {"cap": {"epochs": Decimal("0.5")}}}, base=BASE)
    step = planned(tmp_path, words).arms["a"].steps[0]
    assert isinstance(step, TrainStep)
    # 64,000 tokens: half an epoch is 20,000 of python and 10,000 of rust; the web takes what is left
    assert step.stage.source_tokens == pytest.approx({"python": 20_000, "rust": 10_000, "web": 34_000}, abs=16)
    assert step.stage.source_tokens["rust"] <= 10_000 and step.stage.source_tokens["python"] <= 20_000
