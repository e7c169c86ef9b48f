"""Law T1 where the loss is on few targets, other numbers of them in each microbatch and rank, and none in some."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from layouts.cases import BY_NAME, ONE_PROCESS, LayoutCase
from layouts.curves import open_rank
from layouts.instruction_curves import check, one_process, others, staged
from masked_runs import chats, write_masked
from ranks import run_ranks
from tiny_run import write_corpus

from megatron.config.schema import RunConfig
from megatron.data.loader import Batch
from megatron.parallel.mesh import close_mesh

FEW = (
    "tp2+sp", "zero-bubble pp2", "full shard 2", "cp2 all-to-all", "cp2 gather", "pp2 x dp2",
    "deepspeed ZeRO-0 dp2", "deepspeed ZeRO-2 dp2", "deepspeed pp2 x ZeRO-1 dp2",
)  # fmt: skip
KEYS = {"torch": (("fp64", "sgd"),), "deepspeed": (("fp32", "sgd"), ("fp32", "adamw"))}
EARLY = 11
"""Steps, four of masked stages among them, over which plain SGD at this rate has not yet grown one process' own
rounding in float32 (its distance from float64) beyond the tolerance."""


def configure(corpora: Path) -> RunConfig:
    """One stage of all tokens, one of masks alone, one of masks and a whole source."""
    text = {"mixture": {"chat": 0.7, "codechat": 0.3}, "objective": "instruction"}
    cooldown = {"mixture": {"code": 3, "text": 1}, "objective": "instruction", "whole_loss": ["text"]}
    groups = {"chat": "code", "codechat": "code", "prose": "text"}
    return staged(corpora, groups, text, cooldown | {"weigh_by": "loss-tokens"})


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources with masks, one without."""
    folder = tmp_path_factory.mktemp("masked")
    write_corpus(folder / "prose", 2)
    write_masked(folder / "chat", chats(3, answered=0.2))
    write_masked(folder / "codechat", chats(4, answered=0.9))
    open_rank(ONE_PROCESS, folder, configure=configure)
    return folder


@pytest.mark.parametrize("name", FEW)
def test_T1_masked_stages_have_the_curve_of_one_process(name: str, masked: Path) -> None:
    check(BY_NAME[name], masked, configure, KEYS, {("fp32", "sgd"): EARLY})


@pytest.mark.soak
@pytest.mark.parametrize("name", others(FEW))
def test_T1_masked_stages_at_every_other_layout(name: str, masked: Path) -> None:
    check(BY_NAME[name], masked, configure, KEYS, {("fp32", "sgd"): EARLY})


def targets_by_microbatch(case: LayoutCase, corpora: Path) -> list[tuple[str, list[int]]]:
    """The body of a rank: by batch its stage, and targets in each microbatch."""
    batches: list[Batch] = open_rank(case, corpora, configure=configure).batches
    close_mesh()
    return [(batch.training_stage, [int((m.targets >= 0).sum()) for m in batch.microbatches]) for batch in batches]


def test_the_runs_are_worth_comparing(masked: Path) -> None:
    """Microbatches and ranks without a target, and ranks of very different numbers, are among them."""
    first, second = run_ranks(2, targets_by_microbatch, BY_NAME["dp2"], masked)
    masked_steps = [number for number, (stage, _) in enumerate(first) if stage != "balanced"]
    assert all(count > 0 for stage, counts in (*first, *second) if stage == "balanced" for count in counts)
    assert any(0 in first[step][1] for step in masked_steps) and any(0 in second[step][1] for step in masked_steps)
    sums = [(sum(first[step][1]), sum(second[step][1])) for step in masked_steps]
    assert any(max(pair) > 3 * min(pair) for pair in sums), sums
    whole = one_process(configure, masked, ("fp64", "sgd"), 3)
    assert all(math.isfinite(fact.loss) for fact in whole)
