"""Layers over pipeline stages, against every partition there is; stages over ranks, against torch's own mapping."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.partition import (
    head_cost,
    layer_cost,
    partition_layers,
    stage_costs,
    stage_count,
    stage_numbers,
    stage_parameters,
)
from megatron.config.schema import ModelSection, ParallelSection


def shape_of(layers: int, vocabulary: int = 1024, **over: object) -> ModelShape:
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192} | over
    return resolve_model(ModelSection(seq_length=128, num_hidden_layers=layers, **fields), vocabulary)


def every_partition(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Counts of layers, at least one a stage."""
    found = []
    for cuts in combinations(range(1, layers), stages - 1):
        places = (0, *cuts, layers)
        found.append(tuple(b - a for a, b in zip(places, places[1:], strict=False)))
    return found


def as_ranges(counts: tuple[int, ...]) -> tuple[range, ...]:
    starts = [sum(counts[:n]) for n in range(len(counts))]
    return tuple(range(a, a + n) for a, n in zip(starts, counts, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(1, 11),
    stages=st.integers(1, 6),
    vocabulary=st.sampled_from([64, 1024, 4096, 16384, 100_000]),
    seq_length=st.sampled_from([16, 512, 8192]),
    tied=st.booleans(),
)
def test_the_dearest_stage_is_as_cheap_as_can_be(
    layers: int, stages: int, vocabulary: int, seq_length: int, tied: bool
) -> None:
    shape = shape_of(layers, vocabulary, tie_word_embeddings=tied)
    if stages > layers:
        with pytest.raises(ConfigError, match=f"{stages} pipeline stages.*num_hidden_layers is {layers}.*at most"):
            partition_layers(shape, stages, seq_length)
        return
    # costs and sizes written out once more, by hand
    layer = 6 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 192) + 6 * 64 * seq_length
    head = 6 * 64 * shape.padded_vocab_size
    size = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192 + 2 * 64
    words = 64 * shape.padded_vocab_size

    def goodness(counts: tuple[int, ...]) -> tuple[object, ...]:
        costs = [n * layer for n in counts]
        costs[-1] += head
        sizes = [n * size for n in counts]
        sizes[0] += words
        sizes[-1] += 64 + (words if stages > 1 or not tied else 0)
        return max(costs), max(sizes), sum(value**2 for value in sizes), counts

    best = min(every_partition(layers, stages), key=goodness)
    found = partition_layers(shape, stages, seq_length)
    assert found == as_ranges(best)
    assert layer_cost(shape, seq_length) == layer and head_cost(shape) == head
    assert max(stage_costs(shape, found, seq_length)) == goodness(best)[0]
    assert max(stage_parameters(shape, found)) == goodness(best)[1]


def test_one_stage_costs_what_the_model_does() -> None:
    shape = shape_of(5)
    whole = partition_layers(shape, 1, 128)
    assert stage_parameters(shape, whole) == (shape.parameter_count(),)
    norms = (2 * 5 + 1) * 64
    assert sum(stage_costs(shape, whole, 128)) == shape.flops_per_token(128) - 6 * norms


def test_a_heavy_head_gets_fewer_layers() -> None:
    counts = [len(layers) for layers in partition_layers(shape_of(16, vocabulary=4096), 4, 128)]
    assert counts[-1] < min(counts[:-1]) and sum(counts) == 16


def test_many_layers_over_many_stages_take_no_time() -> None:
    counts = [len(layers) for layers in partition_layers(shape_of(128, 32768), 64, 4096)]
    assert sum(counts) == 128 and min(counts) >= 1


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("schedule", "virtual", "style"), [("1f1b", 2, "loop"), ("interleaved", 3, "loop"), ("zbv", 2, "v")]
)
def test_stages_lie_where_torch_puts_them(pipeline: int, schedule: str, virtual: int, style: str) -> None:
    from torch.distributed.pipelining.schedules import generate_stage_to_rank_mapping

    section = ParallelSection.model_validate({"pipeline": pipeline, "schedule": schedule, "virtual": virtual})
    owners = generate_stage_to_rank_mapping(pipeline, stage_count(section), style=style)
    held = [stage_numbers(section, rank) for rank in range(pipeline)]
    assert held == [tuple(s for s in sorted(owners) if owners[s] == rank) for rank in range(pipeline)]
    assert all(list(numbers) == sorted(numbers) for numbers in held)


def test_without_a_pipeline_there_is_one_stage() -> None:
    section = ParallelSection()
    assert stage_count(section) == 1 and stage_numbers(section, 0) == (0,)
    assert stage_count(ParallelSection(pipeline=4, schedule="interleaved", virtual=2)) == 8
    assert stage_numbers(ParallelSection(pipeline=4, schedule="zero-bubble"), 3) == (3,)
