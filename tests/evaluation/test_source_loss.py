"""Losses of held-out documents against logits and a plain softmax, with and without a loss mask."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from masked_runs import chats, write_masked

from megatron.config.errors import CheckpointError
from megatron.config.load import config_from_tables
from megatron.config.model_shape import resolve_model
from megatron.config.schema import RunConfig
from megatron.data.indexed_dataset import IndexedDataset
from megatron.evaluation.held_out_text import HeldOutDocument, held_out_documents, held_out_tokens
from megatron.evaluation.source_loss import document_losses, loss_record
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.tokenizers.byte_level import ByteTokenizer

SEQUENCE = 16
TOKENIZER = ByteTokenizer()


def _config(data: Path) -> RunConfig:
    return config_from_tables(
        {
            "run": {"name": "x", "output": "x"},
            "tokenizer": {"path": "bytes"},
            "model": {
                "seq_length": SEQUENCE,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "initializer_range": Decimal("0.4"),  # so that losses of tokens differ
            },
            "sources": {"chat": {"data": [str(data)], "group": "code", "max_epochs": 4}},
            "validation": {"fraction": Decimal("0.5")},
            "train": {"global_batch_size": 2},
            "stages": [{"name": "a", "steps": 1, "mixture": {"chat": 1}, "lr": {"peak": Decimal("0.001")}}],
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    config = _config(tmp_path_factory.mktemp("x"))
    made = Decoder(resolve_model(config.model, TOKENIZER.vocab_size, SEQUENCE)).double()
    initialise(made, 5)
    return made.eval()


def _by_hand(model: Decoder, document: HeldOutDocument) -> list[float]:
    """Each token's loss but the first's, a window after the other, from logits."""
    losses: list[float] = []
    for begin in range(0, len(document.tokens) - 1, SEQUENCE):
        window = torch.from_numpy(document.tokens[begin : begin + SEQUENCE + 1])[None]
        logits = model.logits(window[:, :-1], torch.zeros_like(window[:, :-1], dtype=torch.int32))[0]
        for place, target in enumerate(window[0, 1:].tolist()):
            scores = logits[place].tolist()
            most = max(scores)
            losses.append(most + math.log(sum(math.exp(score - most) for score in scores)) - scores[target])
    return losses


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_token_but_the_first_is_predicted_and_masks_choose_among_them(model: Decoder, batch_size: int) -> None:
    generator = np.random.default_rng(1)
    lengths = (1, 2, 3, 16, 17, 18, 33, 40)  # of one window, exactly one, one more, several
    documents = [
        HeldOutDocument(n, generator.integers(0, 256, size), generator.random(size) < 0.4 if n % 2 else None)
        for n, size in enumerate(lengths)
    ]
    for document, found in zip(documents, document_losses(model, documents, SEQUENCE, batch_size), strict=True):
        losses = _by_hand(model, document)
        assert found.tokens == len(losses) == len(document.tokens) - 1
        assert found.nats == pytest.approx(math.fsum(losses), rel=1e-9)
        learned = [] if document.learned is None else document.learned[1:].tolist()
        assert found.learned == sum(learned)
        marked = math.fsum(loss for loss, mark in zip(losses, learned, strict=False) if mark)
        assert found.learned_nats == pytest.approx(marked, rel=1e-9, abs=1e-12)


def test_a_masked_source_has_losses_of_its_targets_beside_those_of_all_tokens(tmp_path: Path, model: Decoder) -> None:
    prefix = write_masked(tmp_path / "chat", chats(3))
    data = IndexedDataset(prefix)
    bits = np.unpackbits(np.fromfile(f"{prefix}.mask", np.uint8), bitorder="little")
    found = held_out_documents(_config(prefix), TOKENIZER)
    for row in found["chat"]:
        begin = data.document_start(row.number)
        assert row.tokens.tolist() == data.tokens(row.number).tolist() and row.learned is not None
        assert row.learned.tolist() == bits[begin : begin + len(row.tokens)].astype(bool).tolist()
    assert [row.tokens.tolist()[:-1] for row in found["chat"]] == held_out_tokens(_config(prefix), TOKENIZER)["chat"]
    losses = {"chat": document_losses(model, found["chat"], SEQUENCE, 8)}
    record = loss_record("m", found, losses, TOKENIZER, {"chat": "code"})
    result = record["models"][0]["results"]["chat"]
    by_hand = [(loss, row.learned[1:]) for row in found["chat"] for loss in [_by_hand(model, row)]]  # type: ignore[index]
    every = [loss for losses_of, _ in by_hand for loss in losses_of]
    marked = [loss for losses_of, marks in by_hand for loss, mark in zip(losses_of, marks, strict=True) if mark]
    assert result["metrics"]["loss"]["value"] == pytest.approx(np.mean(every), rel=1e-9)
    assert result["metrics"]["targets_loss"]["value"] == pytest.approx(np.mean(marked), rel=1e-9)
    assert 0 < len(marked) < len(every) and result["items"] == len(found["chat"])
    assert record["tasks"]["chat"]["group"] == "code"


def test_documents_are_taken_until_there_are_tokens_enough_and_no_text_twice(tmp_path: Path) -> None:
    documents = chats(4, 80)
    prefix = write_masked(tmp_path / "chat", documents + documents[:40])
    rows = held_out_documents(_config(prefix), TOKENIZER)["chat"]
    assert len({row.tokens.tobytes() for row in rows}) == len(rows)
    few = held_out_documents(_config(prefix), TOKENIZER, longest=30, tokens=200)["chat"]
    assert sum(len(row.tokens) for row in few) == 200 and max(len(row.tokens) for row in few) <= 30
    assert [row.number for row in few] == [row.number for row in rows][: len(few)]


def test_weights_that_are_not_finite_are_named(model: Decoder) -> None:
    document = HeldOutDocument(0, np.arange(8))
    with torch.no_grad():
        kept = model.head_weight[3].clone()
        model.head_weight[3] = math.nan
        with pytest.raises(CheckpointError, match="not finite"):
            document_losses(model, [document], SEQUENCE, 1)
        model.head_weight[3] = kept
