"""Studies that cannot be carried out: each is refused with its file, key, value, reason and remedy."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from study.made_studies import BASE, LR, planned, stage, tables, write

from megatron.config.errors import ConfigError
from megatron.study.plan import plan_study, study_plan

STAGES = {"init": stage(), "cool": stage(mixture={"code": 1})}
PLAIN = {"a": {"stages": ["init"]}}
HEAD = {"name": "made", "output": "runs/made"}


def branch(**over: Any) -> dict[str, Any]:
    return tables({**PLAIN, "b": {"from": "a/init", "stages": ["cool"], "set": over}}, STAGES)


def axis(key: str, **over: Any) -> dict[str, Any]:
    arms = {"a": {"stages": ["init"], "axes": ["x"]}}
    return tables(arms, STAGES, study=HEAD, axes={"x": {"set": [key], "values": [1, 2]} | over})


def seeds(*values: Any) -> dict[str, Any]:
    return tables(PLAIN, STAGES, study=HEAD | {"seeds": list(values)})


def arms(**over: Any) -> dict[str, Any]:
    return tables(PLAIN | over, STAGES)


def averaging(**over: Any) -> dict[str, Any]:
    return arms(b={"stages": [{"name": "mean"} | over]})


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "parent arm": (arms(b={"from": "aa/init", "stages": ["cool"]}), ("from = 'aa/init'", "did you mean 'a'?")),
    "parent stage": (arms(b={"from": "a/inti", "stages": ["cool"]}), ("'a/inti'", "did you mean 'init'?")),
    "cycle": (
        tables({"a": {"from": "b", "stages": ["init"]}, "b": {"from": "a", "stages": ["cool"]}}, STAGES),
        ("circle, by from or average: a -> b -> a", "do without"),
    ),
    "own parent": (
        tables({"a": {"from": "a/init", "stages": ["init"]}}, STAGES),
        ("circle, by from or average: a -> a", "do without"),
    ),
    "seed words": (seeds("one"), ("study.seeds.0", "'one' is no seed", "[1, 2, 3]")),
    "seed below 0": (seeds(-1), ("-1", "no seed")),
    "seed fraction": (seeds(Decimal("1.5")), ("1.5", "no seed")),
    "seed true": (seeds(True), ("True", "no seed")),
    "seed twice": (seeds(3, 3), ("3 is given twice",)),
    "axis key": (axis("optimizer.weight_decy"), ("axis x: optimizer.weight_decy", "did you mean 'weight_decay'?")),
    "axis table": (axis("optimiser.weight_decay"), ("did you mean 'optimizer'?",)),
    "axis whole table": (axis("optimizer"), ("optimizer is a table",)),
    "set without quotes": (
        tables({"a": {"stages": ["init"], "set": {"optimizer": {"eps": 1}}}}, STAGES),
        ("optimizer is a table", 'in quotes: "optimizer.eps" = …'),
    ),
    "axis and set": (
        tables(
            {"a": {"stages": ["init"], "axes": ["x"], "set": {"train.z_loss": 0}}},
            STAGES,
            study=HEAD,
            axes={"x": {"set": ["train.z_loss"], "values": [0, 1]}},
        ),
        ("axis x: train.z_loss: is set by arms.a.set, too",),
    ),
    "axis twice": (
        tables(
            {"a": {"stages": ["init"], "axes": ["x", "x"]}},
            STAGES,
            study=HEAD,
            axes={"x": {"set": ["train.z_loss"], "values": [0, 1]}},
        ),
        ("axis x: train.z_loss: is set twice",),
    ),
    "label": (axis("train.z_loss", labels=["a b", "c"]), ("axes.x.labels.0", "'a b' is no name")),
    "label up": (axis("train.z_loss", labels=["..", "c"]), ("'..' is no name",)),
    "name unseen": (tables({"a\u200b": {"stages": ["init"]}}, STAGES), ("is no name", "cannot be seen")),
    "cap of no tokens": (tables(PLAIN, {"init": stage(cap={"epochs": 1, "over": 0})}), ("cap.over", "R is 0 tokens")),
    "endless": (tables(PLAIN, {"init": stage(steps=10**29)}), ("the most that is counted here",)),
    "documents without tokens": (
        tables(PLAIN, STAGES, base={**BASE, "sources": {"web": {"tokens": 10, "documents": 11}}}),
        ("sources.web", "11 documents have more than 10 tokens"),
    ),
    "axis stage": (axis("stages.inti.steps"), ("no stage 'inti'", "did you mean 'init'?")),
    "axis stage key": (axis("stages.init.stepz"), ("did you mean 'steps'?",)),
    "axis lr key": (axis("stages.init.lr.peek"), ("did you mean 'peak'?",)),
    "axis source": (axis("sources.wb.max_epochs"), ("no 'wb' in sources", "did you mean 'web'?")),
    "axis mixture": (axis("stages.init.mixture.pythn"), ("names 'pythn'", "did you mean 'python'?")),
    "axis seed": (axis("run.seed"), ("run.seed", "study.seeds")),
    "axis value": (axis("optimizer.weight_decay", values=["lots"]), ("arm 'a-lots'", "optimizer.weight_decay", "lots")),
    "axis same values": (axis("optimizer.weight_decay", values=[1, 1]), ("two values are called '1'", "labels")),
    "axis labels": (axis("optimizer.weight_decay", labels=["one"]), ("1 labels for 2 values",)),
    "axis of the trunk": (
        tables({**PLAIN, "b": {"from": "a/init", "stages": ["cool"], "set": {"stages.init.steps": 3}}}, STAGES),
        ("no stage 'init' of its own", "trunk a/init"),
    ),
    "unknown axis": (arms(b={"stages": ["init"], "axes": ["y"]}), ("axes names 'y'",)),
    "model": (branch(**{"model.hidden_size": 64}), ("a/init", "hidden_size was 32 and is now 64", "without from")),
    "vocabulary": (branch(**{"model.vocab_size": 512}), ("model.vocab_size was 257 and is now 512",)),
    "held out": (branch(**{"validation.fraction": Decimal("0.1")}), ("validation",)),
    "content": (branch(**{"sources.web.tokens": 5000}), ("source 'web'", "100000", "5000")),
    "optimizer": (branch(**{"optimizer.name": "sgd"}), ("'adamw'", 'take = { optimizer = "fresh" }')),
    "unknown stage": (tables({"a": {"stages": ["inti"]}}, STAGES), ("arms.a.stages names 'inti'", "'init'?")),
    "no stages": (tables({"a": {"stages": []}}, STAGES), ("arms.a", "has no stages")),
    "stage twice": (tables({"a": {"stages": ["init", "init"]}}, STAGES), ("'init' is used twice",)),
    "unknown key of a stage": (tables(PLAIN, {"init": stage(mixtur={"web": 1})}), ("[stages.init]", "'mixture'?")),
    "unknown key of an arm": (arms(b={"stages": ["init"], "form": "a"}), ("arms.b.form", "did you mean 'from'?")),
    "unknown key of the study": (tables(PLAIN, STAGES, study=HEAD | {"sedes": [1]}), ("study.sedes", "'seeds'?")),
    "unknown table": (tables(PLAIN, STAGES, armz={}), ("armz", "'arms'?")),
    "unknown table of the base": (tables(PLAIN, STAGES, base={**BASE, "optimiser": {}}), ("'optimizer'?",)),
    "unknown key of the base": (tables(PLAIN, STAGES, base={**BASE, "optimizer": {"esp": 1}}), ("'eps'",)),
    "run in the base": (tables(PLAIN, STAGES, base={**BASE, "run": {"name": "x"}}), ("[base.run]", "study.name")),
    "baseline": (tables(PLAIN, STAGES, study=HEAD | {"baseline": "aa"}), ("study.baseline = 'aa'", "'a'?")),
    "name": (tables({"a/b": {"stages": ["init"]}}, STAGES), ("'a/b' is no name",)),
    "no lr": (tables(PLAIN, {"init": {"steps": 3, "mixture": {"web": 1}}}), ("arm 'a'", "has no lr")),
    "runs dry": (tables(PLAIN, {"init": stage(mixture={"rust": 1}, steps=90_000)}), ("arm 'a'", "'rust' runs dry")),
    "average of one": (averaging(average=["a/init"]), ("names 'a/init' alone", "last = 2")),
    "average of two models": (
        tables(
            {**PLAIN, "b": {"stages": ["init"], "set": {"model.hidden_size": 64}}}
            | {"m": {"stages": [{"name": "soup", "average": ["a", "b"]}]}},
            STAGES,
        ),
        ("arm 'm'", "'soup' averages a/init and b/init", "model.hidden_size is 64, not 32"),
    ),
    "average of two held-out sets": (
        tables(
            {**PLAIN, "b": {"stages": ["init"], "set": {"validation.fraction": Decimal("0.1")}}}
            | {"m": {"stages": [{"name": "soup", "average": ["a", "b"]}]}},
            STAGES,
        ),
        ("arm 'm'", "validation.fraction is 0.1, not 0"),
    ),
    "average of one node": (
        tables({**PLAIN, "b": {"stages": ["init"]}, "m": {"stages": [{"name": "x", "average": ["a", "b"]}]}}, STAGES),
        ("study.toml:", "arm 'm'", "one and the same node"),
    ),
    "units": (tables(PLAIN, {"init": stage(steps="30 tokens")}), ("say tokens = 30 instead",)),
    "unit of a cap": (
        tables(PLAIN, {"init": stage(cap={"epochs": 1, "over": "7 steps"})}),
        ("cap.over", "a count of tokens, and '7 steps' counts steps"),
    ),
    "unit of losses": (tables(PLAIN, STAGES, results={"loss": {"tokens": "5 steps"}}), ("'5 steps' counts steps",)),
    "arm that axes renamed": (
        tables(
            {"a": {"stages": ["init"], "axes": ["x"]}, "b": {"from": "a/init", "stages": ["cool"]}},
            STAGES,
            study=HEAD,
            axes={"x": {"set": ["train.z_loss"], "values": [0, 1]}},
        ),
        ("there is no arm 'a'", "the axes of [arms.a] make a-0, a-1 of it"),
    ),
    "within of no group": (
        tables(PLAIN, {"init": stage(within={"coed": {"python": 1}})}),
        ("within names 'coed', which is no group of sources", "did you mean 'code'?"),
    ),
    "no phases": (tables(PLAIN, {"init": {"steps": 4, "phases": [], "lr": LR}}), ("phases is empty: give",)),
    "far name": (arms(b={"from": "nope/init", "stages": ["cool"]}), ("there is no arm 'nope'", "arms are: a, b")),
    "average of nothing": (averaging(average=["a/init", "c/init"]), ("average = 'c/init'", "no arm 'c'")),
    "average weights": (averaging(average=["a/init", "a"], weights=[1]), ("1 weights for 2 checkpoints",)),
    "average that trains": (averaging(last=2, steps=3), ("trains nothing", "leave steps out")),
    "average first": (averaging(last=2), ("no training stage is there",)),
    "average of too many": (
        tables({"a": {"stages": ["init", {"name": "mean", "last": 9}]}}, STAGES),
        ("averages 9 checkpoints", "saves 2", "checkpoint.every"),
    ),
    "training from an average": (
        tables({"a": {"stages": ["init", {"name": "mean", "last": 2}, "cool"]}}, STAGES),
        ("no optimizer state", 'optimizer = "fresh"'),
    ),
    "stages in a circle": (
        tables({"a": {"stages": ["x"]}}, {"x": {"steps": 2, "like": "y"}, "y": {"like": "z"}, "z": {"like": "y"}}),
        ("circle: x -> y -> z -> y",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    words, said = CASES[name]
    path = write(tmp_path, words)
    with pytest.raises(ConfigError) as caught:
        plan_study(path)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    for part in said:
        assert part in message, message


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    words = tables(PLAIN, STAGES, study=HEAD | {"base": "none.toml"})
    del words["base"]
    with pytest.raises(ConfigError, match=r"none\.toml.*relative to the study file"):
        planned(tmp_path, words)


def test_a_base_file_gives_all_but_stages_and_run(tmp_path: Path) -> None:
    run = {**BASE, "run": {"name": "r", "output": "o", "seed": 5}}
    write(tmp_path, run, "base.toml")
    words = tables(PLAIN, STAGES, study=HEAD | {"base": "base.toml", "baseline": "a"})
    inline = planned(tmp_path, tables(PLAIN, STAGES)).graph
    del words["base"]
    other = planned(tmp_path, words)
    assert set(other.graph.nodes) == set(inline.nodes)
    assert [note for note in other.notes if "[run]" in note and "does not count" in note]


def test_two_bases_and_none(tmp_path: Path) -> None:
    for words in (tables(PLAIN, STAGES, study=HEAD | {"base": "b.toml"}), tables(PLAIN, STAGES)):
        if "base" not in words["study"]:
            del words["base"]
        with pytest.raises(ConfigError, match=r"study\.base.*\[base"):
            planned(tmp_path, words)


@pytest.mark.parametrize("content", ["[study", "\udcff", "study = 3\n"])
def test_files_that_are_no_study(tmp_path: Path, content: str) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"study\.toml"):
        plan_study(path)
    with pytest.raises(ConfigError, match="no such study file"):
        plan_study(tmp_path / "absent.toml")


def test_positions_that_a_later_branch_needs(tmp_path: Path) -> None:
    base = {**BASE, "model": BASE["model"] | {"position_embedding": "learned"}}
    words = tables({**PLAIN, "b": {"from": "a/init", "stages": [{"use": "cool", "seq_length": 64}]}}, STAGES, base=base)
    with pytest.raises(ConfigError, match=r"max_position_embeddings = 64 in the base"):
        planned(tmp_path, words)
    base["model"]["max_position_embeddings"] = 64
    assert len(planned(tmp_path, words).graph.nodes) == 2


@pytest.mark.parametrize("apart", [False, True])
def test_a_mistake_in_the_base_is_found_where_it_is_written(tmp_path: Path, apart: bool) -> None:
    wrong = {**BASE, "optimizer": {"weight_decay": "lots"}}
    words = tables(PLAIN, STAGES, base=wrong)
    place = tmp_path / "study.toml"
    if apart:
        place = write(tmp_path, wrong, "base.toml")
        words = tables(PLAIN, STAGES, study=HEAD | {"base": "base.toml"})
        del words["base"]
    path = write(tmp_path, words)
    with pytest.raises(ConfigError) as caught:
        plan_study(path)
    line = 1 + next(n for n, text in enumerate(place.read_text().splitlines()) if "lots" in text)
    assert str(caught.value).startswith(f"{place}:{line}: the base, first read for arm 'a': optimizer.weight_decay")


def test_a_length_that_is_far_from_whole_batches_is_warned_of(tmp_path: Path) -> None:
    one = {"lr": LR, "mixture": {"web": 1}}
    for tokens, warned in ((1, True), (63, False), (64, False), (100, True)):
        study = planned(tmp_path, tables(PLAIN, {"init": {"tokens": tokens, **one}}))
        found = [row["text"] for row in study_plan(study)["warnings"] if row["kind"] == "rounded"]
        assert bool(found) == warned and all(f"{tokens} tokens asked" in text for text in found), found


def test_shares_within_a_group_without_weight_are_noted(tmp_path: Path) -> None:
    inside = {"code": {"python": 1}}
    for mixture, noted in (({"web": 1}, True), ({"web": 1, "code": 1}, False)):
        study = planned(tmp_path, tables(PLAIN, {"init": stage(mixture=mixture, within=inside)}))
        texts = [row["text"] for row in study_plan(study)["warnings"]]
        assert any("within.code changes nothing" in text for text in texts) == noted, texts
