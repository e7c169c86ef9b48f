"""Law T1: layout changes nothing but speed. Twenty steps of every layout against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts.cases import CLIP, KERNELS, LAYOUTS, ONE_PROCESS, LayoutCase
from layouts.conftest import Judge, Reference
from layouts.curves import HALF, STEPS, whole_curves
from ranks import run_ranks

from megatron.config.layout import resolve_layout
from megatron.config.tested_layouts import TESTED, combination_of


def check(case: LayoutCase, corpora: Path, judge: Judge) -> None:
    by_rank = run_ranks(case.ranks, whole_curves, case, corpora, case.keys, case.layers, timeout=280)
    assert all(curves == by_rank[0] for curves in by_rank), "ranks report different steps"
    judge(case.name, by_rank[0], case.layers)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_T1_curve_is_that_of_one_process(case: LayoutCase, corpora: Path, judge: Judge) -> None:
    check(case, corpora, judge)


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_T1_curve_is_that_of_one_process_with_other_kernels(case: LayoutCase, corpora: Path, judge: Judge) -> None:
    check(case, corpora, judge)


def smallest_cases() -> list[LayoutCase]:
    """Every combination that users may ask for, on as few ranks as it has meaning on."""
    made = []
    for combination in TESTED:
        section, ranks = combination.smallest()
        if ranks > 1:
            made.append(LayoutCase(combination.words(), ranks, section.model_dump(exclude_defaults=True)))
    return made


@pytest.mark.soak
@pytest.mark.parametrize("case", smallest_cases(), ids=lambda case: case.name)
def test_T1_every_combination_that_is_not_refused(case: LayoutCase, corpora: Path, judge: Judge) -> None:
    check(case, corpora, judge)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_what_is_compared_is_not_refused(case: LayoutCase) -> None:
    assert combination_of(case.section, resolve_layout(case.section, case.ranks)) in TESTED


@pytest.mark.parametrize("key", ONE_PROCESS.keys, ids=" ".join)
@pytest.mark.parametrize("layers", [3, 5])
def test_the_reference_is_worth_comparing_with(key: tuple[str, str], layers: int, one_process: Reference) -> None:
    curve = one_process(key, layers)
    assert len(curve) == STEPS
    assert all(len(fact.by_source) == 2 for fact in curve[:7]), "both sources in the first stage"
    assert sum(fact.loss for fact in curve[-3:]) < 0.98 * sum(fact.loss for fact in curve[:3]), "it learns"
    if key[1] == "sgd, clipped":
        bites = [fact.grad_norm > CLIP for fact in curve]
        assert 4 <= sum(bites) <= STEPS - 4 and any(bites[HALF:]), [fact.grad_norm for fact in curve]
