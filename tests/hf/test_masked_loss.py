"""Masked loss is that of transformers with labels of -100: packed samples, documents masked, loss and gradients.

transformers is given each document's ids, its mask as labels, a block-diagonal attention mask and positions from 0 in
every document, all laid out here from the documents themselves, and computes the loss by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf.family_cases import CASES, WORDS, made, ours_by_hand
from hf.made_folder import made_by_transformers
from made_runs import run_config
from masked_runs import Document, chats, write_masked
from tiny_run import make_run, rows_of, train, validation_of
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron.config.load import load_config
from megatron.config.model_shape import resolve_model
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.data.loader import Batch, BatchLoader
from megatron.data.samples import Sample
from megatron.engines.base import Engine
from megatron.engines.build import build_engine
from megatron.hf.architecture import shape_from_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.parallel.mesh import one_process_mesh
from megatron.planner.resolve import resolve_run
from megatron.tokenizers.byte_level import ByteTokenizer

LENGTH, ROWS, STEPS = 24, 8, 3
GRADIENT = OptimizerSection(name="sgd", momentum=0.0, clip_grad_norm=0.0, weight_decay=0.0)
"""At a rate of 1 it takes the gradient off the weights."""


def documents_of(seed: int, count: int = 50) -> list[Document]:
    """Some longer than a sample; a bit anywhere, the first token among them."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, WORDS, n).tolist(), (rng.random(n) < rng.choice([0.05, 0.3, 0.9])).astype(int).tolist())
        for n in rng.integers(2, 60, count).tolist()
    ]


def run_of(folder: Path, micro: int) -> tuple[list[Batch], list[list[Sample]], dict[str, list[Document]]]:
    """Global batches of an instruction stage of two sources, the loss of one whole; their samples; the documents."""
    documents = {"chat": documents_of(1), "text": documents_of(2)}
    for name, made_documents in documents.items():
        write_masked(folder / name, made_documents)
    sources = {name: {"data": [str(folder / name)], "max_epochs": 3} for name in documents}
    stage = {"name": "sft", "steps": STEPS, "mixture": {"chat": 0.75, "text": 0.25}}
    stage |= {"objective": "instruction", "whole_loss": ["text"], "seq_length": LENGTH}
    config = run_config(folder, sources, [stage], train={"global_batch_size": ROWS, "micro_batch_size": micro})
    resolved = resolve_run(config)
    samples = []
    stream = resolved.stream()
    while not stream.finished:
        samples.append(stream.next_batch())
    again = resolve_run(config)
    with BatchLoader(again.stream(), again.sources, micro, 0) as loader:
        return list(loader), samples, documents


def labelled(sample: Sample, documents: dict[str, list[Document]]) -> dict[str, Tensor]:
    """A sample as transformers wants it, one token longer: it predicts each label from the place before it."""
    ids, labels, blocks, positions = [0] * (LENGTH + 1), [-100] * (LENGTH + 1), [-1] * (LENGTH + 1), [0] * (LENGTH + 1)
    at = 0
    for number, (_, document, start, end) in enumerate(sample.pieces):
        tokens, bits = documents[sample.source][document]
        for place in range(start, min(end + 1, len(tokens))):
            here = at + place - start
            if place < end or here == LENGTH:  # the token after the sample's last stands behind it
                ids[here], blocks[here], positions[here] = tokens[place], number, place - start
            if place > start and (bits[place] or sample.source == "text"):
                labels[here] = tokens[place]  # where a document is cut, at the first place of the next
        at += end - start
    block = torch.tensor(blocks)
    allowed = (block[:, None] == block[None, :]).tril()
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
        "allowed": allowed | torch.eye(LENGTH + 1, dtype=torch.bool),
    }


def losses_of_transformers(model: Any, batch: Sequence[dict[str, Tensor]], micro: int, dtype: torch.dtype) -> float:
    """The loss of a global batch in microbatches, as its Trainer adds it up; gradients are left in the model."""
    count, total = sum(int((row["labels"] >= 0).sum()) for row in batch), 0.0
    for first in range(0, len(batch), micro):
        rows = {key: torch.stack([row[key] for row in batch[first : first + micro]]) for key in batch[0]}
        mask = torch.zeros((), dtype=dtype).masked_fill(~rows.pop("allowed"), torch.finfo(dtype).min)[:, None]
        output = model(**rows, attention_mask=mask, num_items_in_batch=count, use_cache=False)
        loss = output.loss
        if dtype == torch.float64:  # it makes float32 of the logits; the same once more, as torch has it
            words, labels = output.logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()
            exact = cross_entropy(words, labels, ignore_index=-100, reduction="sum") / count
            assert exact.item() == pytest.approx(loss.item(), rel=1e-5)
            loss = exact
        loss.backward()
        total += loss.item()
    return total


def weights(engine: Engine) -> dict[str, Tensor]:
    """Copies of one process' weights."""
    state = engine.model_state().items()
    return {name: shard.tensor.detach().clone() for name, (shard,) in ((n, list(s)) for n, s in state)}


def with_gradients(model: Any) -> Any:
    """A copy that has gradients where the model has weights."""
    copy = deepcopy(model)
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.grad)
    return copy


@pytest.mark.parametrize("micro", [ROWS, 1])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_loss_and_gradients_are_those_of_transformers(name: str, micro: int, tmp_path: Path) -> None:
    case = CASES[name]
    made(case, tmp_path / "model")
    precision, dtype = ("fp64", torch.float64) if case.exact else ("fp32", torch.float32)
    batches, samples, documents = run_of(tmp_path, micro)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, attn_implementation="eager").eval()
    shape = replace(shape_from_folder(tmp_path / "model"), document_mask=True)
    train_section = TrainSection(global_batch_size=ROWS, micro_batch_size=micro)
    engine = build_engine(shape, GRADIENT, ParallelSection(), train_section, 5, precision, one_process_mesh())
    for batch, rows in zip(batches, samples, strict=True):
        engine.load_model_state(HuggingFaceTensors(tmp_path / "model", shape))
        before = weights(engine)
        result = engine.train_step(batch.microbatches, 1.0)
        model.zero_grad()
        theirs = [labelled(sample, documents) for sample in rows]
        wanted = losses_of_transformers(model, theirs, micro, dtype)
        assert result.valid_targets == sum(int((row["labels"] >= 0).sum()) for row in theirs) < 0.9 * ROWS * LENGTH
        assert result.loss == pytest.approx(wanted, rel=1e-10 if case.exact else 1e-5)
        gradients = ours_by_hand(with_gradients(model))
        after = weights(engine)
        assert gradients.keys() == after.keys()
        for key, gradient in gradients.items():
            scale = float(gradient.abs().max())
            ours = (before[key] - after[key])[tuple(slice(size) for size in gradient.shape)]
            assert float((ours - gradient).abs().max()) <= (1e-9 if case.exact else 2e-4) * max(scale, 1e-3), key


SFT = """
[[stages]]
name = "sft"
steps = 6
objective = "instruction"
mixture = {{ chat = 1 }}
lr = {{ peak = 1e-3 }}
take = {{ weights = "{model}" }}
"""


def test_a_stage_begins_from_a_hugging_face_folder(tmp_path: Path) -> None:
    """The loss of its first step, and of its held-out documents before any, are transformers' own."""
    config = make_run(tmp_path)
    text = config.read_text()
    text = text[: text.index("[[stages]]")] + text[text.index("[checkpoint]") :]
    documents = chats(3)
    write_masked(tmp_path / "data" / "chat", documents)
    text += f'[sources.chat]\ndata = ["{tmp_path / "data" / "chat"}"]\n'
    config.write_text(text + SFT.format(model=tmp_path / "model"))
    made_by_transformers(resolve_model(load_config(config).model, ByteTokenizer().vocab_size), tmp_path / "model")
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert "note: stage 'sft': the loss is on: chat" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    stream = resolve_run(load_config(config)).stream()
    total, count = 0.0, 0
    for sample in stream.next_batch():
        for _, document, start, end in sample.pieces:
            ids, bits = documents[document]
            cut = torch.tensor([ids[start : end + 1]])
            labels = torch.where(torch.tensor([bits[start : end + 1]]) == 1, cut, -100)
            labels[0, 0] = -100
            with torch.no_grad():
                logits = model(cut).logits.double()
            found = cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100)
            total, count = total + found.item(), count + int((labels >= 0).sum())
    rows = rows_of(tmp_path / "run")
    assert rows[0]["valid_targets"] == count and rows[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert rows[0]["loss_by_source"] == {"chat": pytest.approx(rows[0]["loss"])}
    assert validation_of(tmp_path / "run")[0][1]["chat"] > 0
