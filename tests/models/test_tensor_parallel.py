"""Decoders cut over tensor ranks against the whole one in one process: losses and every gradient, in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from models.tensor_cases import SHAPES, Case, Outcome, assembled, make_decoder, rounding, run_case, run_cases
from ranks import run_ranks

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.models.decoder import Decoder
from megatron.models.initialise import initialise
from megatron.models.parameter_cuts import parameter_cuts
from megatron.parallel.axis import Axis
from megatron.parallel.model_place import ModelPlace, ParameterCut

CASES = [
    Case(shape, rows, sequence, split, backend)
    for shape in SHAPES
    for rows, sequence, split, backend in (
        (3, False, False, "blockwise"),
        (3, True, False, "sdpa"),
        (1, True, False, "blockwise"),
        (1, False, True, "sdpa"),
        (3, True, True, "blockwise"),
    )
]


@functools.cache
def on_ranks(tensor: int) -> list[list[Outcome]]:
    return run_ranks(tensor, run_cases, CASES, Layout(tensor=tensor))


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_loss_rows_and_gradients_equal_one_process(number: int, tensor: int) -> None:
    whole = run_case(CASES[number])
    outcomes = [rank[number] for rank in on_ranks(tensor)]
    for outcome in outcomes:
        assert abs(outcome.total - whole.total) <= 1e-12 * abs(whole.total)
        np.testing.assert_allclose(outcome.rows, whole.rows, rtol=1e-12)
        assert outcome.total == outcomes[0].total and (outcome.rows == outcomes[0].rows).all()
        for found, expected in zip(outcome.without_gradients, whole.without_gradients, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert outcome.gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        atol = rounding(gradient, whole)
        np.testing.assert_allclose(assembled(outcomes, name), gradient, atol=atol, rtol=1e-10, err_msg=name)


def test_dropout_is_for_training_alone_and_is_told_its_samples() -> None:
    outcome = run_case(Case("dropout"))
    assert abs(outcome.total / outcome.without_gradients[0] - 1) > 1e-3
    plain = run_case(Case("two key heads, tied"))
    assert outcome.without_gradients[0] == plain.without_gradients[0]
    np.testing.assert_allclose(plain.total, plain.without_gradients[0], rtol=1e-12)
    model, tokens = Decoder(SHAPES["dropout"]), torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="sample_numbers"):
        model(tokens, tokens, tokens)


def test_a_row_without_targets_has_no_loss() -> None:
    assert run_case(CASES[0]).rows[-1] == 0 and on_ranks(2)[0][0].rows[-1] == 0


def cut(shape: str, tensor: int, sequence: bool) -> dict[str, ParameterCut]:
    with torch.device("meta"):
        return parameter_cuts(Decoder(SHAPES[shape], place=ModelPlace(Axis(0, tensor), sequence)))


def test_cuts_and_which_gradients_are_parts_of_a_sum() -> None:
    plain, sequence = (cut("one key head, biases", 4, flag) for flag in (False, True))
    layer = "layers.1."
    for found in (plain, sequence):
        assert found[f"{layer}attention.query.weight"] == found[f"{layer}mlp.up.bias"] == ParameterCut(0)
        assert found["embedding.weight"] == ParameterCut(0)
        assert found[f"{layer}attention.output.weight"] == found[f"{layer}mlp.down.weight"] == ParameterCut(1)
        # fewer heads than ranks: held whole, each rank's gradient from its own queries
        assert (
            found[f"{layer}attention.key.weight"] == found[f"{layer}attention.value.bias"] == ParameterCut(None, True)
        )
    for name in (f"{layer}mlp_norm.weight", "final_norm.weight", f"{layer}mlp.down.bias"):
        assert plain[name] == ParameterCut(None, False) and sequence[name] == ParameterCut(None, True)
    assert cut("two key heads, tied", 2, False)[f"{layer}attention.key.weight"] == ParameterCut(0)
    assert not any(found.partial for found in cut("neox", 1, True).values()), "nobody to sum with"


@pytest.mark.parametrize("shape", SHAPES)
def test_initial_weights_are_parts_of_the_same_whole(shape: str) -> None:
    whole = Decoder(SHAPES[shape])
    initialise(whole, 3)
    for tensor in (2, 4):
        parts = [Decoder(SHAPES[shape], place=ModelPlace(Axis(rank, tensor))) for rank in range(tensor)]
        for part in parts:
            initialise(part, 3)
        cuts = parameter_cuts(parts[0])
        for name, parameter in whole.named_parameters():
            found = [part.get_parameter(name) for part in parts]
            joined = found[0] if cuts[name].dim is None else torch.cat(found, cuts[name].dim)
            assert torch.equal(joined, parameter), name


@pytest.mark.parametrize("tied", [True, False])
def test_pipeline_parts_make_the_whole(tied: bool) -> None:
    shape = SHAPES["two key heads, tied" if tied else "one key head, untied"]
    whole = make_decoder(shape, "blockwise", ModelPlace())
    first = make_decoder(shape, "blockwise", ModelPlace(layers=range(1), last=False))
    last = make_decoder(shape, "blockwise", ModelPlace(layers=range(1, 2), first=False))
    names = dict(whole.named_parameters())
    held = [name for part in (first, last) for name, _ in part.named_parameters()]
    assert set(held) == set(names) and len(held) == len(names) + (1 if tied else 0)
    tokens, targets, documents = (torch.randint(0, 70, (2, 24)) for _ in range(3))
    expected, rows = whole(tokens, documents, targets)
    found, found_rows = last(first(tokens, documents), documents, targets)
    assert torch.equal(found, expected) and torch.equal(found_rows, rows)
    expected.backward()
    found.backward()
    for name, parameter in names.items():
        parts = [dict(part.named_parameters()).get(name) for part in (first, last)]
        assert torch.allclose(sum(p.grad for p in parts if p is not None), parameter.grad, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize(
    ("shape", "tensor", "words"),
    [
        ("two key heads, tied", 3, "num_attention_heads 4 .*parallel.tensor 3"),
        ("two key heads, tied", 8, "num_attention_heads 4 .*parallel.tensor 8"),
    ],
)
def test_sizes_that_do_not_divide_are_named(shape: str, tensor: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(SHAPES[shape], place=ModelPlace(Axis(0, tensor)))
