"""Law T1 of padded stages: rows of one document and padding, which lies on ranks and microbatches unevenly."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts.cases import BY_NAME, ONE_PROCESS
from layouts.curves import open_rank
from layouts.instruction_curves import check, others, staged
from masked_runs import chats, write_masked
from tiny_run import write_corpus

from megatron.config.schema import RunConfig
from megatron.parallel.mesh import close_mesh

FEW = ("tp2+sp", "zero-bubble pp2", "full shard 2", "cp2 all-to-all", "cp2 gather", "deepspeed pp2 x ZeRO-1 dp2")
KEYS = {"torch": (("fp64", "sgd"),), "deepspeed": (("fp32", "adamw"),)}


def configure(corpora: Path) -> RunConfig:
    """Packed, padded, and padded again with masks and with documents that are cut."""
    text = {"packing": "padded", "too_long": "drop", "seq_length": 48}
    cooldown = {"mixture": {"code": 3, "text": 1}, "objective": "instruction", "whole_loss": ["text"]}
    cooldown |= {"packing": "padded", "too_long": "truncate", "seq_length": 32}
    return staged(corpora, {"chat": "code", "prose": "text"}, text, cooldown)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with masks, and one without."""
    folder = tmp_path_factory.mktemp("padded")
    write_corpus(folder / "prose", 2)
    write_masked(folder / "chat", chats(3, answered=0.4))
    open_rank(ONE_PROCESS, folder, configure=configure)
    return folder


@pytest.mark.parametrize("name", FEW)
def test_T1_padded_stages_have_the_curve_of_one_process(name: str, padded: Path) -> None:
    check(BY_NAME[name], padded, configure, KEYS)


@pytest.mark.soak
@pytest.mark.parametrize("name", others(FEW))
def test_T1_padded_stages_at_every_other_layout(name: str, padded: Path) -> None:
    check(BY_NAME[name], padded, configure, KEYS)


def test_the_runs_are_worth_comparing(padded: Path) -> None:
    """Documents that fill rows and that hardly do are among them, in one batch."""
    batches = open_rank(ONE_PROCESS, padded, configure=configure).batches
    close_mesh()
    shares = [batch.padding / batch.tokens for batch in batches]
    assert shares[:7] == [0.0] * 7 and max(shares) > 0.25 and sum(share > 0 for share in shares) > 8, shares
    lengths = [int((m.document_ids[0] == 0).sum()) for batch in batches[7:] for m in batch.microbatches]
    assert min(lengths) < 12 and 32 in lengths and max(lengths) > 40
