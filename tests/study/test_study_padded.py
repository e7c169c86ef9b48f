"""Padded stages are other nodes than packed ones, whole up to where they part; sources without data say documents."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from study.made_studies import BASE, planned, stage, tables

from megatron.config.errors import ConfigError

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
