"""Law T1 for what other model families than Llama's and NeoX' are made of: biases, norms, learned positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from layouts.cases import BY_NAME, FAMILIES, LayoutCase
from layouts.conftest import Judge, Reference
from layouts.curves import whole_curves
from ranks import run_ranks

NAMES = tuple(family.name for family in FAMILIES)
QUICK = ("tp2+sp", "pp2", "cp2 gather", "full shard 2")


def of_families(case: LayoutCase) -> LayoutCase:
    precision = "fp32" if case.parallel.get("engine") == "deepspeed" else "fp64"
    return replace(case, only=tuple((precision, name) for name in NAMES))


def check(case: LayoutCase, corpora: Path, judge: Judge) -> None:
    by_rank = run_ranks(case.ranks, whole_curves, case, corpora, case.keys, case.layers, timeout=280)
    assert all(curves == by_rank[0] for curves in by_rank), "ranks report different steps"
    judge(case.name, by_rank[0], case.layers)


@pytest.mark.parametrize("name", QUICK)
def test_T1_curves_of_families_are_those_of_one_process(name: str, corpora: Path, judge: Judge) -> None:
    check(of_families(BY_NAME[name]), corpora, judge)


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", [name for name, case in BY_NAME.items() if name not in QUICK and not case.parallel.get("offload")]
)
def test_T1_curves_of_families_at_every_layout(name: str, corpora: Path, judge: Judge) -> None:
    check(of_families(BY_NAME[name]), corpora, judge)


@pytest.mark.parametrize("family", NAMES)
def test_the_reference_learns(family: str, one_process: Reference) -> None:
    curve = one_process(("fp64", family), 3)
    assert sum(fact.loss for fact in curve[-3:]) < 0.98 * sum(fact.loss for fact in curve[:3])
