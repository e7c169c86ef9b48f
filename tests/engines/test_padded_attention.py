"""Padding changes nothing, whatever computes attention: loss and gradients of padded rows are those of the documents.

What stands in the padding is drawn at random and must not be seen; a document of two tokens leaves a row nearly empty,
one of all places leaves none.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.data.loader import Microbatch
from megatron.engines.base import Engine
from megatron.engines.build import build_engine
from megatron.kernels.choice import Kernels
from megatron.parallel.mesh import one_process_mesh

WORDS, LENGTH, LENGTHS = 200, 128, (2, 128, 50, 127, 3, 64)
SHAPE = resolve_model(ModelSection(preset="llama-tiny", head_dim=64, seq_length=LENGTH), WORDS)
TRAIN = TrainSection(global_batch_size=len(LENGTHS), micro_batch_size=len(LENGTHS))
GRADIENT = OptimizerSection(name="sgd", momentum=0.0, clip_grad_norm=0.0, weight_decay=0.0)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none"),
]


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, WORDS, (length,), generator=generator) for length in LENGTHS]


def padded_rows(lengths: list[Tensor], filler: int) -> Microbatch:
    """As the loader makes them: what a document leaves of its row is one more piece, without targets."""
    shape = len(lengths), LENGTH
    tokens = torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(filler))
    targets, numbers, positions = (
        torch.full(shape, -100),
        torch.ones(shape, dtype=torch.int32),
        torch.zeros(shape).long(),
    )
    bounds = [0]
    for row, ids in enumerate(lengths):
        end = len(ids)
        tokens[row, :end], targets[row, : end - 1], numbers[row, :end] = ids, ids[1:], 0
        positions[row, :end], positions[row, end:] = torch.arange(end), torch.arange(LENGTH - end)
        bounds += [row * LENGTH + end] + ([(row + 1) * LENGTH] if end < LENGTH else [])
    rows = torch.arange(len(lengths))
    starts = torch.tensor(bounds, dtype=torch.int32)
    return Microbatch(tokens, targets, numbers, positions, starts, int(starts.diff().max()), rows * 0, rows)


def alone(ids: Tensor) -> Microbatch:
    """A document without a row around it."""
    places, one = torch.arange(len(ids))[None], torch.zeros(1, dtype=torch.int64)
    targets = torch.cat([ids[1:], torch.tensor([-100])])[None]
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    return Microbatch(ids[None], targets, places.int() * 0, places, bounds, len(ids), one, one)


def engine(attention: str, precision: str = "fp64", device: str = "cpu", shape: ModelShape = SHAPE) -> Engine:
    kernels = Kernels(attention=attention)  # type: ignore[arg-type]
    mesh = one_process_mesh(torch.device(device))
    return build_engine(shape, GRADIENT, ParallelSection(), TRAIN, 3, precision, mesh, kernels=kernels)


def weights(of: Engine) -> dict[str, Tensor]:
    state = {name: list(shards) for name, shards in of.model_state().items()}
    return {name: shards[0].tensor.detach().double().cpu().clone() for name, shards in state.items()}


@pytest.mark.parametrize("attention", ["blockwise", "sdpa", "unfused"])
def test_padded_rows_have_the_loss_and_gradients_of_their_documents(attention: str) -> None:
    reference, ours = engine("blockwise"), engine(attention)
    wanted = reference.train_step([alone(ids) for ids in documents()], 1.0)
    found = ours.train_step([padded_rows(documents(), 5)], 1.0)
    assert found.valid_targets == wanted.valid_targets == sum(LENGTHS) - len(LENGTHS)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-12)
    after, theirs = weights(ours), weights(reference)
    for name in theirs:
        torch.testing.assert_close(after[name], theirs[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("attention", ["blockwise", "sdpa", "unfused"])
def test_the_filler_is_not_seen(attention: str) -> None:
    losses = {engine(attention).train_step([padded_rows(documents(), filler)], 1.0).loss for filler in range(3)}
    assert len(losses) == 1


def test_padding_comes_last_so_that_models_without_a_document_mask_do_not_see_it() -> None:
    shape = replace(SHAPE, document_mask=False)
    wanted = engine("blockwise").train_step([padded_rows(documents(), 1)], 1.0)
    found = engine("blockwise", shape=shape).train_step([padded_rows(documents(), 2)], 1.0)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-12)
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-12)


@pytest.mark.parametrize("attention", [pytest.param(name, marks=needs_gpu) for name in ("sdpa", "varlen", "flex")])
def test_padded_rows_on_a_gpu(attention: str) -> None:
    ours, theirs = engine(attention, "bf16", "cuda"), engine("blockwise", "fp32")
    for step in range(3):
        batch = [padded_rows(documents(), step)]
        found, wanted = ours.train_step(batch, 1e-2), theirs.train_step(batch, 1e-2)
        assert found.updated and math.isfinite(found.grad_norm)
        assert found.loss == pytest.approx(wanted.loss, rel=1e-2)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=5e-2)
