"""Law T1 of padded stages: rows of one document and padding, which lies on ranks and microbatches unevenly."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from layouts.cases import BY_NAME, LAYOUTS, ONE_PROCESS, LayoutCase, tolerance
from layouts.curves import MODEL, STAGES, STEPS, Curve, compare, open_rank, whole_curves
from made_runs import run_config
from masked_runs import chats, write_masked
from ranks import run_ranks
from tiny_run import write_corpus

from megatron.config.schema import RunConfig
from megatron.parallel.mesh import close_mesh

FEW = ("tp2+sp", "zero-bubble pp2", "full shard 2", "cp2 all-to-all", "cp2 gather", "deepspeed pp2 x ZeRO-1 dp2")
KEYS = {"torch": (("fp64", "sgd"),), "deepspeed": (("fp32", "adamw"),)}


def configure(corpora: Path) -> RunConfig:
    """Packed, padded, and padded again with masks and with documents that are cut."""
    sources: dict[str, dict[str, Any]] = {
        name: {"group": group, "data": [str(corpora / name)], "max_epochs": 9}
        for name, group in (("chat", "code"), ("prose", "text"))
    }
    balanced, text, cooldown = (dict(stage) for stage in STAGES)
    text |= {"packing": "padded", "too_long": "drop", "seq_length": 48}
    cooldown |= {"mixture": {"code": 3, "text": 1}, "objective": "instruction", "whole_loss": ["text"]}
    cooldown |= {"packing": "padded", "too_long": "truncate", "seq_length": 32}
    return run_config(
        corpora,
        sources,
        [balanced, text, cooldown],
        model=MODEL,
        data={"cache": str(corpora / "cache")},
        train={"global_batch_size": 8, "micro_batch_size": 1},
        validation={"fraction": "0.1", "every": 1000},
    )


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with masks, and one without."""
    folder = tmp_path_factory.mktemp("padded")
    write_corpus(folder / "prose", 2)
    write_masked(folder / "chat", chats(3, answered=0.4))
    open_rank(ONE_PROCESS, folder, configure=configure)
    return folder


_reference = cache(
    lambda corpora, key, layers: whole_curves(ONE_PROCESS, corpora, [key], layers, configure=configure)[key]
)


def check(case: LayoutCase, corpora: Path) -> None:
    keys = case.only or KEYS[case.section.engine]
    by_rank = run_ranks(case.ranks, whole_curves, case, corpora, keys, case.layers, None, configure, timeout=280)
    assert all(curves == by_rank[0] for curves in by_rank), "ranks report different steps"
    for key, curve in by_rank[0].items():
        reference: Curve = _reference(corpora, key, case.layers)
        assert len(curve) == STEPS and all(fact.updated and math.isfinite(fact.loss) for fact in curve)
        assert compare(curve, reference).worst <= tolerance(key)


@pytest.mark.parametrize("name", FEW)
def test_T1_padded_stages_have_the_curve_of_one_process(name: str, padded: Path) -> None:
    check(BY_NAME[name], padded)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted({case.name for case in LAYOUTS if not case.parallel.get("offload")} - {*FEW}))
def test_T1_padded_stages_at_every_other_layout(name: str, padded: Path) -> None:
    check(BY_NAME[name], padded)


def test_the_runs_are_worth_comparing(padded: Path) -> None:
    """Documents that fill rows and that hardly do are among them, in one batch."""
    batches = open_rank(ONE_PROCESS, padded, configure=configure).batches
    close_mesh()
    shares = [batch.padding / batch.tokens for batch in batches]
    assert shares[:7] == [0.0] * 7 and max(shares) > 0.25 and sum(share > 0 for share in shares) > 8, shares
    lengths = [int((m.document_ids[0] == 0).sum()) for batch in batches[7:] for m in batch.microbatches]
    assert min(lengths) < 12 and 32 in lengths and max(lengths) > 40
