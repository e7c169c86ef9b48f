"""Which layers a pipeline stage holds, and which stages a pipeline rank holds. Free of torch.

Stages are numbered along the model: stage 0 has the embedding, the last one the final norm and the head.
"""

from __future__ import annotations

from functools import lru_cache

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.config.schema import ParallelSection

_FORWARD_AND_BACKWARD = 3  # a matrix product's backward is two of its kind


def stages_on_a_rank(schedule: str, virtual: int) -> int:
    """How many stages each pipeline rank holds: `virtual` where interleaved, two for zbv, else one."""
    return {"interleaved": virtual, "zbv": 2}.get(schedule, 1)


def stage_count(section: ParallelSection) -> int:
    """Pipeline stages of a layout; 1 without a pipeline."""
    if section.pipeline == 1:
        return 1
    return section.pipeline * stages_on_a_rank(section.schedule, section.virtual)


def stage_numbers(section: ParallelSection, rank: int) -> tuple[int, ...]:
    """The stages that a pipeline rank holds, in the model's order: r for 1f1b and zero-bubble; r, r + pipeline, …
    where interleaved; r and its mirror for zbv, so that the first rank has both ends of the model."""
    if section.pipeline > 1 and section.schedule == "zbv":
        return (rank, 2 * section.pipeline - 1 - rank)
    return tuple(range(rank, stage_count(section), section.pipeline))


def layer_cost(shape: ModelShape, seq_length: int) -> int:
    """Operations of one layer on one token, forward and backward; of the attention matrix the visible half. Where some
    layers have a sliding window, the mean of all."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    projections = 2 * hidden * shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    multiplied = projections + (3 if shape.gated_mlp else 2) * hidden * inner
    attended = shape.attended_lengths(seq_length) // shape.num_hidden_layers
    return _FORWARD_AND_BACKWARD * 2 * (multiplied + shape.num_attention_heads * shape.head_dim * attended)


def head_cost(shape: ModelShape) -> int:
    """Operations of the output projection on one token, forward and backward."""
    return _FORWARD_AND_BACKWARD * 2 * shape.hidden_size * shape.padded_vocab_size


def stage_costs(shape: ModelShape, partition: tuple[range, ...], seq_length: int) -> tuple[int, ...]:
    """Operations of each stage on one token, forward and backward. The embedding's look-up counts for nothing."""
    costs = [len(layers) * layer_cost(shape, seq_length) for layers in partition]
    costs[-1] += head_cost(shape)
    return tuple(costs)


def stage_parameters(shape: ModelShape, partition: tuple[range, ...]) -> tuple[int, ...]:
    """Parameters of each stage; a tied head is a copy of the embedding where both ends are apart."""
    counts = [len(layers) * shape.layer_parameter_count() for layers in partition]
    counts[0] += shape.embedding_count() + shape.position_count()
    counts[-1] += shape.hidden_size * (2 if shape.norm == "layernorm" else 1)
    if not shape.tie_word_embeddings or len(partition) > 1:
        counts[-1] += shape.embedding_count()
    return tuple(counts)


@lru_cache(maxsize=64)
def partition_layers(shape: ModelShape, stages: int, seq_length: int) -> tuple[range, ...]:
    """Layers 0 … L-1 in `stages` runs, at least one each, such that the dearest stage is as cheap as can be.

    seq_length: the longest of the run, for the cost of attention. Among partitions with the same dearest stage, the
    one most even in parameters (the least sum of squares, which has the smallest largest stage too); of several, that
    whose early stages are the smaller, since they hold the activations of more microbatches. Exact, by dynamic
    programming. Raises ConfigError.
    """
    layers = shape.num_hidden_layers
    if stages > layers:
        raise ConfigError(
            f"{stages} pipeline stages need at least one layer each, and model.num_hidden_layers is {layers}: set "
            f"parallel.pipeline (x parallel.virtual) to at most {layers}"
        )
    if stages == 1:
        return (range(layers),)
    empty = (range(0),) * stages
    fixed_cost, fixed_size = stage_costs(shape, empty, seq_length), stage_parameters(shape, empty)
    cost, size = layer_cost(shape, seq_length), shape.layer_parameter_count()
    bound = _smallest_bound(layers, fixed_cost, cost)
    limits = [(bound - start) // cost for start in fixed_cost]
    counts = _most_even(layers, limits, fixed_size, size)
    starts = [sum(counts[:number]) for number in range(stages)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def _smallest_bound(layers: int, fixed: tuple[int, ...], each: int) -> int:
    """The least b with counts of at least 1 that sum to `layers` and fixed[s] + count[s] * each <= b for all s."""
    best: list[int | None] = [0] + [None] * layers
    for start in fixed:
        following: list[int | None] = [None] * (layers + 1)
        for before, bound in enumerate(best):
            if bound is None:
                continue
            for count in range(1, layers - before + 1):
                new, place = max(bound, start + count * each), before + count
                known = following[place]
                if known is None or new < known:
                    following[place] = new
        best = following
    found = best[layers]
    assert found is not None, "there are as many layers as stages"
    return found


def _most_even(layers: int, limits: list[int], fixed: tuple[int, ...], each: int) -> list[int]:
    """Counts within the limits with the least sum of squares of sizes; of several the first in dictionary order."""
    best: list[tuple[int, list[int]] | None] = [(0, [])] + [None] * layers
    # From the last stage forwards, so that equal sums can be told apart by the counts of the early stages.
    for limit, start in zip(reversed(limits), reversed(fixed), strict=True):
        following: list[tuple[int, list[int]] | None] = [None] * (layers + 1)
        for after, known in enumerate(best):
            if known is None:
                continue
            for count in range(1, min(limit, layers - after) + 1):
                new = (known[0] + (start + count * each) ** 2, [count, *known[1]])
                place = after + count
                held = following[place]
                if held is None or new < held:
                    following[place] = new
        best = following
    found = best[layers]
    assert found is not None, "limits leave room for every layer"
    return found[1]
