"""Cached decoding against the whole forward pass, for every kind of decoder; rows of unequal length against each alone;
tensor and pipeline ranks against one process.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tensor_cases import LENGTH, SHAPES, make_decoder
from ranks import run_ranks
from torch import Tensor

from megatron.config.layout import Layout
from megatron.models.compiled_layers import compile_layers
from megatron.models.decoder import Decoder
from megatron.models.decoding import CachedDecoder
from megatron.parallel.axis import ALONE, Axis
from megatron.parallel.mesh import close_mesh, launched, open_mesh
from megatron.parallel.model_place import ModelPlace

PLAN = (([9, 3, 5], 9), ([4, 2, 0], 5), ([1, 1, 1], 1), ([1, 0, 1], 1), ([2, 2, 2], 2), ([1, 1, 1], 1))
"""Calls: how many tokens each of three rows goes on by, and the columns that the call has."""


def tokens_of(shape_name: str) -> Tensor:
    return torch.randint(0, SHAPES[shape_name].vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(3))


def expected(model: Decoder, tokens: Tensor) -> Tensor:
    """Logits of every position by the whole forward pass of a model without cache."""
    with torch.no_grad():
        return model.eval().logits(tokens, torch.zeros_like(tokens))


def columns(tokens: Tensor, starts: list[int], counts: list[int], width: int) -> Tensor:
    """The rows' next tokens, filled up with a token that is never right."""
    x = torch.full((len(counts), width), 1)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        x[row, :count] = tokens[row, start : start + count]
    return x


def decode(cached: CachedDecoder, tokens: Tensor) -> list[tuple[int, int, Tensor]]:
    """The plan's calls: (row, position, logits) of each row's last token in each."""
    found = []
    for counts, width in PLAN:
        x = columns(tokens, cached.lengths, counts, width)
        logits = cached.extend(x, counts)
        found += [(row, cached.lengths[row] - 1, logits[row]) for row, count in enumerate(counts) if count]
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_cached_logits_are_those_of_the_whole_pass(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, tokens = make_decoder(SHAPES[name], "blockwise", ModelPlace()).to(dtype), tokens_of(name)
    whole = expected(model, tokens)
    size = float(whole.abs().max())
    cached = CachedDecoder(model, 3, LENGTH)
    for row, position, logits in decode(cached, tokens):
        torch.testing.assert_close(logits, whole[row, position], atol=tolerance * size, rtol=0)
    assert cached.lengths == [18, 9, 10] and logits.dtype == dtype


def test_every_position_of_a_prompt_is_given_where_asked() -> None:
    model, tokens = make_decoder(SHAPES["neox"], "blockwise", ModelPlace()), tokens_of("neox")
    cached, whole = CachedDecoder(model, 3, LENGTH), expected(model, tokens)
    for begin, end in ((0, 11), (11, 12), (12, LENGTH)):
        found = cached.extend(tokens[:, begin:end], every=True)
        torch.testing.assert_close(found, whole[:, begin:end], atol=1e-11, rtol=0)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_rows_of_a_batch_do_not_know_of_each_other(data: st.DataObject) -> None:
    """Any cutting into calls, any padding: each row as if it were alone."""
    model, tokens = _model("one key head, biases"), tokens_of("one key head, biases")
    cached, whole = CachedDecoder(model, 3, LENGTH), expected(model, tokens)
    for _ in range(data.draw(st.integers(1, 5))):
        width = data.draw(st.integers(1, 6))
        counts = [data.draw(st.integers(0, min(width, LENGTH - length))) for length in cached.lengths]
        logits = cached.extend(columns(tokens, cached.lengths, counts, width), counts)
        for row, count in enumerate(counts):
            if count:
                wanted = whole[row, cached.lengths[row] - 1]
                torch.testing.assert_close(logits[row], wanted, atol=1e-11, rtol=0)


@functools.cache
def _model(name: str) -> Decoder:
    return make_decoder(SHAPES[name], "blockwise", ModelPlace())


def test_kept_rows_go_on_in_their_new_order() -> None:
    name = "two key heads, tied"
    model, tokens = _model(name), tokens_of(name)
    cached, whole = CachedDecoder(model, 3, LENGTH), expected(model, tokens)
    cached.extend(tokens[:, :8], [8, 4, 6])
    cached.keep([2, 0, 2])
    assert cached.lengths == [6, 8, 6]
    logits = cached.extend(torch.stack([tokens[2, 6], tokens[0, 8], tokens[2, 6]])[:, None])
    torch.testing.assert_close(logits, torch.stack([whole[2, 6], whole[0, 8], whole[2, 6]]), atol=1e-11, rtol=0)


def test_the_model_itself_is_left_as_it_was() -> None:
    """Training goes on around it: its layers stay compiled, its attention is its own, its weights are shared."""
    model = make_decoder(SHAPES["neox"], "sdpa", ModelPlace()).train()
    compile_layers(model)
    before = {name: (id(layer.forward), layer.attention.core) for name, layer in model.layers.items()}
    cached = CachedDecoder(model, 1, 8)
    cached.extend(torch.tensor([[1, 2, 3]]))
    assert before == {name: (id(layer.forward), layer.attention.core) for name, layer in model.layers.items()}
    assert model.training and not cached.part.training
    theirs = dict(cached.part.named_parameters())
    assert all(parameter.data_ptr() == theirs[name].data_ptr() for name, parameter in model.named_parameters())


def test_bfloat16_keeps_its_dtype_and_half_the_bytes() -> None:
    shape = SHAPES["two key heads, tied"]
    wide = CachedDecoder(make_decoder(shape, "sdpa", ModelPlace()).float(), 2, LENGTH)
    narrow = CachedDecoder(make_decoder(shape, "sdpa", ModelPlace()).bfloat16(), 2, LENGTH)
    layers, heads, size = shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim
    assert wide.nbytes == 2 * narrow.nbytes == 4 * 2 * 2 * layers * heads * size * (LENGTH + 1)
    assert narrow.extend(torch.tensor([[1], [2]])).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    cached = CachedDecoder(_model("neox"), 2, 5)
    with pytest.raises(ValueError, match="2 rows with 1 counts"):
        cached.extend(torch.zeros(2, 1, dtype=torch.int64), [1])
    with pytest.raises(ValueError, match="counts of 0 to 2"):
        cached.extend(torch.zeros(2, 2, dtype=torch.int64), [3, 1])
    cached.extend(torch.zeros(2, 4, dtype=torch.int64), [4, 2])
    with pytest.raises(ValueError, match="a row of 6 tokens in a cache for 5"):
        cached.extend(torch.zeros(2, 2, dtype=torch.int64))
    cached.extend(torch.zeros(2, 2, dtype=torch.int64), [1, 2])
    assert cached.lengths == [5, 4]


def on_rank(layout: Layout, names: list[str]) -> list[list[np.ndarray]]:
    """Body of a rank: the plan's logits of each shape, behind both pipeline stages."""
    mesh = open_mesh(layout, launched(), 60)
    found = [[logits.numpy() for _, _, logits in decode_in_parts(name, mesh.tensor)] for name in names]
    close_mesh()
    return found


def decode_in_parts(name: str, tensor: Axis) -> list[tuple[int, int, Tensor]]:
    """Two pipeline stages of this tensor rank in one process, each with its own cache."""
    shape, tokens = SHAPES[name], tokens_of(name)
    places = [
        ModelPlace(tensor, sequence=True, layers=range(1), last=False),
        ModelPlace(tensor, sequence=True, layers=range(1, 2), first=False),
    ]
    stages = [CachedDecoder(make_decoder(shape, "blockwise", place), 3, LENGTH) for place in places]
    found = []
    for counts, width in PLAN:
        x = columns(tokens, stages[0].lengths, counts, width)
        hidden = stages[0].extend(x, counts)
        assert hidden.shape == (3, width, shape.hidden_size)
        logits = stages[1].extend(hidden, counts)
        found += [(row, stages[1].lengths[row] - 1, logits[row]) for row, count in enumerate(counts) if count]
    return found


@functools.cache
def ranks_results(tensor: int) -> list[list[list[np.ndarray]]]:
    return run_ranks(tensor, on_rank, Layout(tensor=tensor), list(SHAPES))


@pytest.mark.parametrize("name", SHAPES)
def test_pipeline_stages_are_the_whole(name: str) -> None:
    whole = expected(_model(name), tokens_of(name))
    for row, position, logits in decode_in_parts(name, ALONE):
        torch.testing.assert_close(logits, whole[row, position], atol=1e-11, rtol=0)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_tensor_ranks_are_the_whole_on_every_rank(name: str, tensor: int) -> None:
    """Four ranks and fewer key heads, words that only padding has, models built for sequence parallel."""
    places = [(row, position) for row, position, _ in decode(CachedDecoder(_model(name), 3, LENGTH), tokens_of(name))]
    whole = expected(_model(name), tokens_of(name)).numpy()
    for rank in ranks_results(tensor):
        for (row, position), logits in zip(places, rank[list(SHAPES).index(name)], strict=True):
            np.testing.assert_allclose(logits, whole[row, position], atol=1e-11, rtol=0)


def test_positions_go_on_beyond_the_training_length_with_rope() -> None:
    name = "neox"
    model = _model(name)
    shape = dataclasses.replace(SHAPES[name], max_position_embeddings=6)
    short = make_decoder(shape, "blockwise", ModelPlace())
    tokens = tokens_of(name)
    torch.testing.assert_close(
        CachedDecoder(short, 3, LENGTH).extend(tokens), expected(model, tokens)[:, -1], atol=1e-11, rtol=0
    )
