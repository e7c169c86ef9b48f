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
