"""Decoders small enough to be run cut and whole side by side, and the bookkeeping to compare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.config.layout import Layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.kernels import cross_entropy
from megatron.kernels.choice import Kernels
from megatron.kernels.cross_entropy import IGNORED
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.models.parameter_cuts import parameter_cuts
from megatron.parallel.axis import ALONE, Axis
from megatron.parallel.mesh import close_mesh, launched, open_mesh
from megatron.parallel.model_place import ModelPlace, ParameterCut

LENGTH = 24
CHUNK_ROWS = 16
"""Fewer rows than a microbatch has, so that the loss takes several chunks and an odd last one."""


def tiny_shape(preset: str = "llama-tiny", vocabulary: int = 100, **fields: Any) -> ModelShape:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    section = ModelSection(preset=preset, seq_length=LENGTH, intermediate_size=48, **(sizes | fields))
    return resolve_model(section, vocabulary)


SHAPES = {
    "two key heads, tied": tiny_shape(),
    "one key head, untied": tiny_shape(num_key_value_heads=1, tie_word_embeddings=False),
    "one key head, biases": tiny_shape(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "four key heads, biases, untied": tiny_shape(
        num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "neox": tiny_shape("neox-160m", num_key_value_heads=4),
    "neox in order": tiny_shape("neox-160m", num_key_value_heads=4, parallel_block=False),
    "dropout": tiny_shape(hidden_dropout=0.3),
    "a rank of padding": tiny_shape(vocabulary=70),
    "qwen2": tiny_shape(query_key_value_bias=True),
    "qwen3": tiny_shape(qk_norm="head", head_dim=16),
    "qwen3, one key head": tiny_shape(qk_norm="head", num_key_value_heads=1),
    "olmo2": tiny_shape(qk_norm="width", norm_place="after", tie_word_embeddings=False),
    "olmo2, one key head": tiny_shape(qk_norm="width", norm_place="after", num_key_value_heads=1),
    "gpt2": tiny_shape("gpt2", num_key_value_heads=4, max_position_embeddings=40, hidden_dropout=0.2),
    "both norms, offset, multipliers": tiny_shape(
        norm_place="both",
        norm_unit_offset=True,
        qk_norm="head",
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
    ),
    "cohere": tiny_shape(
        norm="layernorm_no_bias", parallel_block=True, shared_norm=True, logit_multiplier=0.3, hidden_dropout=0.2
    ),
    "every other layer with a window": tiny_shape(
        sliding_window=5, sliding_pattern=2, rope_local_theta=100.0, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "all layers with a window": tiny_shape(sliding_window=3),
    "scaled rope": tiny_shape(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, rope_theta=100.0
    ),
}
"""70 words are padded to 128: of four ranks the last has none of them."""


@dataclass(frozen=True)
class Case:
    """One way to run a shape on the tensor ranks."""

    shape: str
    rows: int = 3
    sequence: bool = False
    split_backward: bool = False
    backend: str = "blockwise"
    training: bool = True
    evaluation: bool = True

    def __str__(self) -> str:
        words = [self.shape, f"{self.rows} rows", self.backend]
        words += ["sequence"] if self.sequence else []
        return ", ".join(words + (["split backward"] if self.split_backward else []))


@dataclass(frozen=True)
class Outcome:
    """total, rows of losses and local gradients of one rank, as arrays; without gradients: what no_grad gave."""

    total: float
    rows: np.ndarray
    gradients: dict[str, np.ndarray]
    cuts: dict[str, ParameterCut]
    without_gradients: tuple[float, np.ndarray]


def microbatch(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and documents: several documents a row, masked targets, and a last row without any target."""
    generator = torch.Generator().manual_seed(rows)
    tokens, targets = torch.randint(0, vocabulary, (2, rows, LENGTH), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    if rows > 1:
        targets[-1] = IGNORED
    documents = (torch.rand(rows, LENGTH, generator=generator) < 0.1).int().cumsum(1)
    return tokens, targets, documents


def make_decoder(shape: ModelShape, backend: str, place: ModelPlace) -> Decoder:
    """A float64 decoder whose norms and biases differ from 1 and 0; each rank has its part of the same whole."""
    model = Decoder(shape, Kernels(attention=backend), place).double()  # type: ignore[arg-type]
    initialise(model, 7)
    cuts = parameter_cuts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(5)  # far from the flat start, so that every term of the loss matters
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(len(name))
                whole = torch.randn(cuts[name].shape_of_whole(parameter.shape, place.tensor), generator=generator)
                start = cuts[name].offset_of(parameter.shape, place.tensor)[0]
                parameter.add_(whole[start : start + len(parameter)] / 10)
    return model


def run_case(case: Case, axis: Axis = ALONE, context: Axis = ALONE) -> Outcome:
    """Forward and backward of one microbatch."""
    place = ModelPlace(tensor=axis, context=context, sequence=case.sequence, split_backward=case.split_backward)
    shape = SHAPES[case.shape]
    model = make_decoder(shape, case.backend, place)
    tokens, targets, documents = microbatch(case.rows, shape.vocab_size)
    samples = torch.arange(case.rows) * 5 + 2
    total, rows = torch.zeros(1), torch.zeros(case.rows, dtype=torch.float64)
    quiet_total, quiet_rows = total, rows
    if case.evaluation:
        with torch.no_grad():
            quiet_total, quiet_rows = model.eval()(tokens, documents, targets, 0.25)
    if case.training:
        total, rows = model.train()(tokens, documents, targets, 0.25, samples)
        (3 * total).backward()
    assert not quiet_total.requires_grad and not rows.requires_grad and rows.dtype == torch.float64
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    quiet = float(quiet_total), quiet_rows.numpy()
    return Outcome(float(total.detach()), rows.numpy(), gradients, parameter_cuts(model), quiet)


def run_cases(cases: list[Case], layout: Layout) -> list[Outcome]:
    """Body of a rank: each case in turn."""
    cross_entropy.CHUNK_ROWS = CHUNK_ROWS
    mesh = open_mesh(layout, launched(), 60)
    outcomes = [run_case(case, mesh.tensor, mesh.context) for case in cases]
    close_mesh()
    return outcomes


def assembled(outcomes: list[Outcome], name: str) -> np.ndarray:
    """A gradient, whole, from the ranks' parts; what must be equal on all ranks is checked."""
    parts, cut = [outcome.gradients[name] for outcome in outcomes], outcomes[0].cuts[name]
    assert all(outcome.cuts[name] == cut for outcome in outcomes)
    if cut.dim is not None:
        return np.concatenate(parts, cut.dim)
    if cut.partial:
        return np.sum(parts, 0)
    for part in parts:
        np.testing.assert_array_equal(part, parts[0], err_msg=name)
    return parts[0]


def rounding(gradient: np.ndarray, whole: Outcome) -> float:
    """What a gradient may differ by; one that is zero by nature, as of key biases without rotary positions, is the
    rounding of larger ones."""
    largest = max(float(np.abs(other).max()) for other in whole.gradients.values())
    return float(1e-12 * np.abs(gradient).max() + 1e-14 * largest)
