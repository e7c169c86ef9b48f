"""Law T2: saved at one layout and resumed at another, the curve goes on; on the same layout, bit for bit."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from layouts.cases import BY_NAME, ONE_PROCESS, Key, LayoutCase
from layouts.conftest import Judge, Reference
from layouts.curves import HALF, LAYERS, STEPS, Curves, compare
from layouts.resuming import first_half, second_half
from ranks import run_ranks

LAYOUT = BY_NAME | {ONE_PROCESS.name: ONE_PROCESS}

PAIRS = (
    ("one process", "tp2+sp x pp2 x dp2"),
    ("tp2+sp x pp2 x dp2", "hybrid shard 2x2"),
    ("hybrid shard 2x2", "tp4"),
    ("tp4", "pp4"),
    ("pp4", "full shard 2"),
    ("full shard 2", "cp2 gather"),
    ("cp2 all-to-all", "zbv pp2"),
    ("interleaved pp2x2", "deepspeed ZeRO-3 dp2"),
    ("deepspeed ZeRO-3 dp2", "deepspeed tp2 x ZeRO-1 dp2"),
    ("deepspeed tp2 x ZeRO-1 dp2", "one process"),
    ("zero-bubble pp2", "deepspeed pp2 x ZeRO-1 dp2"),
    ("deepspeed ZeRO-0 dp2", "tp2 x pp2"),
)
"""Every axis, every way to shard, every schedule and both engines are saved at and resumed at once or more."""

TEN = (
    "one process",
    "tp4",
    "tp2+sp",
    "pp4",
    "zbv pp2",
    "full shard 2",
    "cp2 all-to-all",
    "tp2+sp x pp2 x dp2",
    "deepspeed ZeRO-3 dp2",
    "deepspeed tp2 x ZeRO-1 dp2",
)

SAME = ("one process", "tp2+sp x pp2 x dp2", "full shard 2", "zbv pp2", "deepspeed ZeRO-1 dp2")


def keys_of(*cases: LayoutCase) -> list[Key]:
    """Moments and momentum, in float64 where both engines have it."""
    precision = "fp64" if all(("fp64", "adamw") in case.keys for case in cases) else "fp32"
    return [(precision, "adamw"), (precision, "sgd, clipped")]


def save_and_resume(saved: str, resumed: str, corpora: Path, folder: Path, judge: Judge) -> None:
    first, second = LAYOUT[saved], LAYOUT[resumed]
    keys = keys_of(first, second)
    run_ranks(first.ranks, first_half, first, corpora, folder, keys, timeout=240)
    by_rank = run_ranks(second.ranks, second_half, second, corpora, folder, keys, timeout=240)
    curves: Curves = {key: stretch.curve for key, stretch in by_rank[0].items()}
    assert all(len(curve) == STEPS - HALF for curve in curves.values())
    judge(f"{saved} -> {resumed}", curves, LAYERS)


@pytest.mark.parametrize(("saved", "resumed"), PAIRS, ids=lambda name: name)
def test_T2_saved_here_resumed_there(saved: str, resumed: str, corpora: Path, tmp_path: Path, judge: Judge) -> None:
    save_and_resume(saved, resumed, corpora, tmp_path, judge)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("saved", "resumed"), [pair for pair in permutations(TEN, 2) if pair not in PAIRS], ids=lambda name: name
)
def test_T2_every_pair_of_ten(saved: str, resumed: str, corpora: Path, tmp_path: Path, judge: Judge) -> None:
    save_and_resume(saved, resumed, corpora, tmp_path, judge)


@pytest.mark.parametrize("name", SAME)
def test_T2_the_same_layout_goes_on_bit_for_bit(name: str, corpora: Path, tmp_path: Path) -> None:
    case, keys = LAYOUT[name], [("fp32", "adamw"), ("fp32", "sgd, clipped")]
    whole = run_ranks(case.ranks, first_half, case, corpora, tmp_path, keys, True, timeout=240)
    rest = run_ranks(case.ranks, second_half, case, corpora, tmp_path, keys, timeout=240)
    for uninterrupted, resumed in zip(whole, rest, strict=True):
        for key in keys:
            assert resumed[key].curve == uninterrupted[key].curve[HALF:]
            assert resumed[key].state == uninterrupted[key].state
    # of ranks that hold the same, one writes it
    assert all(any(rank[key].state for rank in rest) for key in keys)


def test_a_resume_that_forgets_moments_is_seen(corpora: Path, tmp_path: Path, one_process: Reference) -> None:
    keys = keys_of(ONE_PROCESS)
    run_ranks(1, first_half, ONE_PROCESS, corpora, tmp_path, keys)
    (done,) = run_ranks(1, second_half, ONE_PROCESS, corpora, tmp_path, keys, True)
    for key in keys:
        assert compare(done[key].curve, one_process(key, LAYERS)[HALF:]).worst > 1e-3
