"""Padded stages are other nodes than packed ones, whole up to where they part; sources without data say documents."""

from __future__ import annotations

from copy import deepcopy
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from masked_runs import chats, write_masked
from study.made_studies import BASE, LR, planned, stage, tables

from megatron.config.errors import ConfigError
from megatron.study.steps import TrainStep

PADDED = {"packing": "padded", "too_long": "drop"}


def study(documents: int | None = 20_000, **arms: dict[str, Any]) -> dict[str, Any]:
    """A packed trunk, and its second stage packed and in two padded ways."""
    base = deepcopy(BASE)
    if documents is not None:
        for source in base["sources"].values():
            source["documents"] = documents
    on = {name: stage(mixture={"code": 1}) | over for name, over in arms.items()}
    words = {name: {"stages": ["init", name]} for name in arms}
    return tables(words, {"init": stage(), **on}) | {"base": base}


def test_packing_counts_where_it_is_not_packed(tmp_path: Path) -> None:
    arms = {"packed": {}, "said": {"packing": "packed"}, "dropped": PADDED, "cut": PADDED | {"too_long": "truncate"}}
    graph = planned(tmp_path, study(**arms)).graph
    ends = {arm.name: arm.path for arm in graph.arms}
    assert len({path[0] for path in ends.values()}) == 1, "the trunk is shared"
    assert ends["packed"] == ends["said"]
    assert len({ends[name][1] for name in ("packed", "dropped", "cut")}) == 3
    plain = planned(tmp_path, study(None, packed={})).graph
    assert set(plain.nodes) <= set(graph.nodes), "the number of documents is no part of a packed node"


def test_a_padded_stage_of_a_source_without_data_needs_its_documents(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"say how many documents it has \(documents = …\)"):
        planned(tmp_path, study(None, padded=PADDED))


def test_loss_tokens_of_sources_without_data_are_those_of_their_documents(tmp_path: Path) -> None:
    """rust and python: 20,000 tokens each, in documents of 5 and of 10: equal shares of tokens are 2:1 of samples."""
    base = deepcopy(BASE)
    base["sources"]["rust"] |= {"documents": 4000}
    base["sources"]["python"] |= {"tokens": 20_000, "documents": 2000}
    on = stage(mixture={"rust": 1, "python": 1}, objective="instruction", weigh_by="loss-tokens", steps=300) | PADDED
    result = planned(tmp_path, tables({"a": {"stages": ["on"]}}, {"on": on}, base=base))
    end = result.arms["a"].end
    assert isinstance(end, TrainStep) and end.stage.counts == {"rust": 800, "python": 400}


def trunk_and_branch(folder: Path, first: dict[str, Any], then: dict[str, Any], branches: bool) -> list[str]:
    """The nodes of an arm of two stages over one source: the second a branch of an arm that has the first, or not."""
    if not (folder / "t.bin").exists():
        write_masked(folder / "t", chats(3, 60, 0.5))
    base = {**BASE, "sources": {"t": {"data": [str(folder / "t")], "max_epochs": 9}}, "data": {"cache": str(folder)}}
    stages = {"first": stage(mixture={"t": 1}) | first, "then": stage(mixture={"t": 1}) | then}
    branch = {"from": "a", "stages": ["then"]} if branches else {"stages": ["first", "then"]}
    graph = planned(folder, tables({"a": {"stages": ["first"]}, "b": branch}, stages, base=base)).graph
    return list(next(arm.path for arm in graph.arms if arm.name == "b"))


@pytest.mark.parametrize(
    ("first", "then"), [({}, PADDED), (PADDED, {}), (PADDED, {"packing": "padded", "too_long": "truncate"})]
)
def test_a_branch_may_read_the_trunks_source_in_another_way(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any]
) -> None:
    """It is the same node as where the arm lists both; and it is refused past a cap as that is."""
    assert trunk_and_branch(tmp_path, first, then, True) == trunk_and_branch(tmp_path, first, then, False)
    for branches in (True, False):
        with pytest.raises(ConfigError, match="'t' runs dry"):
            trunk_and_branch(tmp_path, first, then | {"steps": 400}, branches)


@pytest.mark.parametrize("words", [{"like": "first"}, {"reverse": "first"}, {"aggregate_of": ["first"]}])
def test_a_branch_refers_to_a_stage_of_its_trunk(tmp_path: Path, words: dict[str, Any]) -> None:
    stages = {"first": stage(mixture={"web": 3, "rust": 1}), "then": {"steps": 4, **words}}
    arms = {"a": {"stages": ["first"]}, "b": {"from": "a", "stages": ["then"]}, "c": {"stages": ["first", "then"]}}
    graph = planned(tmp_path, tables(arms, stages)).graph
    paths = {arm.name: arm.path for arm in graph.arms}
    assert paths["b"] == paths["c"]


# -- caps: what is read, whatever the weights are shares of ------------------------------------------------------------


def capped_stage(folder: Path, words: dict[str, Any]) -> TrainStep:
    step = planned(folder, words).arms["a"].end
    assert isinstance(step, TrainStep)
    return step


@pytest.mark.parametrize("over", ["stage", "run", "64K"])
def test_a_cap_of_a_padded_stage_is_on_documents(tmp_path: Path, over: str) -> None:
    """rust: 20,000 tokens in 2,000 documents, a sample of 16 places each: an epoch is half of 4,000 samples."""
    base = deepcopy(BASE)
    for name, source in base["sources"].items():
        source["documents"] = 2_000 if name == "rust" else 20_000
    on = stage(steps=1000, mixture={"web": 1, "rust": 9}, cap={"epochs": 1, "over": over}, packing="padded")
    words = tables({"a": {"stages": ["on"]}}, {"on": on | {"too_long": "truncate"}}, base=base)
    step = capped_stage(tmp_path, words)
    assert step.stage.samples == 4000 and step.stage.counts == {"rust": 2000, "web": 2000}
    assert "cap of 1 epochs over 64K tokens: rust 90 % -> 50 % of samples" in step.notes[0]


@pytest.mark.parametrize("packing", [{}, {"packing": "padded", "too_long": "truncate"}])
def test_a_cap_of_shares_of_loss_tokens_is_on_what_is_read(tmp_path: Path, packing: dict[str, Any]) -> None:
    """chat has few loss tokens, so its share of samples is far above that of loss tokens: the cap is on samples."""
    for name, documents in (("chat", chats(3, 60, 0.1)), ("code", chats(4, 60, 0.9))):
        write_masked(tmp_path / name, documents)
    sources = {name: {"data": [str(tmp_path / name)], "max_epochs": 99} for name in ("chat", "code")}
    base = {**BASE, "sources": sources, "data": {"cache": str(tmp_path)}}
    mixture = {"chat": Decimal("0.4"), "code": Decimal("0.6")}
    on = {"objective": "instruction", "weigh_by": "loss-tokens", "mixture": mixture, "lr": LR, **packing}

    def epochs(**over: Any) -> dict[str, float]:
        stages = {"on": on | {"steps": 22 if packing else 100} | over}
        step = capped_stage(tmp_path, tables({"a": {"stages": ["on"]}}, stages, base=base))
        sizes = step.stage.padded or step.run.sources
        whole = {name: getattr(sizes[name], "samples", 0) or sizes[name].epoch_tokens / 16 for name in sizes}
        return {name: step.stage.counts[name] / whole[name] for name in whole}

    free, held = epochs(), epochs(cap={"epochs": 1, "over": "stage"})
    assert free["chat"] > 1.1 and held["chat"] == pytest.approx(1, abs=0.02) and 0.3 < held["code"] < 1.02
