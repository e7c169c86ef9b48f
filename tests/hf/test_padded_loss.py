"""Padded batches have transformers' loss and gradients: labels of -100, a mask of ones and zeros, no positions.

transformers is given each document's ids behind one another and nothing else of ours; what stands where nothing is to
be seen is another id than the one that we fill rows with.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf.family_cases import CASES, WORDS, made, ours_by_hand
from hf.test_masked_loss import GRADIENT, weights, with_gradients
from made_runs import run_config
from masked_runs import Document, write_masked
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron.config.schema import ParallelSection, TrainSection
from megatron.data.loader import Batch, BatchLoader
from megatron.data.samples import Sample
from megatron.engines.build import build_engine
from megatron.hf.architecture import shape_from_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.parallel.mesh import one_process_mesh
from megatron.planner.resolve import resolve_run

LENGTH, ROWS = 24, 8
Documents = dict[str, list[Document]]


def documents_of(seed: int) -> list[Document]:
    """Some are longer than a sample."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 36, 40).tolist()
    return [(rng.integers(0, WORDS, n).tolist(), (rng.random(n) < 0.4).astype(int).tolist()) for n in lengths]


def batch_of(folder: Path, objective: str, too_long: str, micro: int) -> tuple[Batch, list[Sample], Documents]:
    """One global batch of two sources."""
    documents = {"chat": documents_of(1), "text": documents_of(2)}
    for name, made_documents in documents.items():
        write_masked(folder / name, made_documents)
    stage = {"name": "sft", "steps": 1, "mixture": {"chat": 0.5, "text": 0.5}, "seq_length": LENGTH}
    stage |= {"packing": "padded", "too_long": too_long, "objective": objective}
    stage |= {"whole_loss": ["text"]} if objective == "instruction" else {}
    sources = {name: {"data": [str(folder / name)]} for name in documents}
    config = run_config(folder, sources, [stage], train={"global_batch_size": ROWS, "micro_batch_size": micro})
    samples = resolve_run(config).stream().next_batch()
    run = resolve_run(config)
    with BatchLoader(run.stream(), run.sources, micro, 0) as loader:
        (batch,) = list(loader)
    return batch, samples, documents


def as_transformers_has_it(samples: list[Sample], documents: Documents, objective: str) -> dict[str, Tensor]:
    """Rows of one token more than a sample: of a document that is cut, the token that the last place predicts."""
    shape = len(samples), LENGTH + 1
    ids, labels, seen = torch.full(shape, 7), torch.full(shape, -100), torch.zeros(shape, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ((_, document, start, end),) = sample.pieces
        tokens, bits = (torch.tensor(values[: end + 1]) for values in documents[sample.source][document])
        assert start == 0 and len(tokens) in (end, end + 1)
        ids[row, : len(tokens)], seen[row, : len(tokens)] = tokens, 1
        learned = bits == 1 if objective == "instruction" and sample.source == "chat" else torch.ones_like(bits) == 1
        labels[row, : len(tokens)] = torch.where(learned, tokens, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": seen}


def loss_of(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """Its own loss, checked against the same in the precision of its logits, which it loses."""
    output = model(**rows, use_cache=False)
    logits, labels = output.logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()
    exact = cross_entropy(logits, labels, ignore_index=-100)
    assert exact.item() == pytest.approx(output.loss.item(), rel=1e-5)
    return exact


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize(
    ("objective", "too_long", "micro"),
    [("language-modelling", "drop", ROWS), ("instruction", "truncate", ROWS), ("instruction", "drop", 2)],
)
def test_loss_and_gradients_of_padded_batches(
    name: str, objective: str, too_long: str, micro: int, tmp_path: Path
) -> None:
    case = CASES[name]
    made(case, tmp_path / "model")
    precision, dtype = ("fp64", torch.float64) if case.exact else ("fp32", torch.float32)
    batch, samples, documents = batch_of(tmp_path, objective, too_long, micro)
    rows = as_transformers_has_it(samples, documents, objective)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, attn_implementation="eager").eval()
    wanted = loss_of(model, rows)
    wanted.backward()
    shape = replace(shape_from_folder(tmp_path / "model"), document_mask=True)
    train = TrainSection(global_batch_size=ROWS, micro_batch_size=micro)
    engine = build_engine(shape, GRADIENT, ParallelSection(), train, 5, precision, one_process_mesh())
    engine.load_model_state(HuggingFaceTensors(tmp_path / "model", shape))
    before = weights(engine)
    result = engine.train_step(batch.microbatches, 1.0)
    assert batch.padding == sum(LENGTH - sample.pieces[0].end for sample in samples) > ROWS
    assert result.valid_targets == int((rows["labels"][:, 1:] >= 0).sum())
    assert result.loss == pytest.approx(wanted.item(), rel=1e-10 if case.exact else 1e-5)
    gradients, after = ours_by_hand(with_gradients(model)), weights(engine)
    assert gradients.keys() == after.keys()
    for key, gradient in gradients.items():
        scale = float(gradient.abs().max())
        ours = (before[key] - after[key])[tuple(slice(size) for size in gradient.shape)]
        assert float((ours - gradient).abs().max()) <= (1e-9 if case.exact else 2e-4) * max(scale, 1e-3), key
