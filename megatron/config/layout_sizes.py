"""Whether a model's sizes, its sequences and its batches can be shared out over the axes of a layout. Free of torch.

Each function yields what does not fit, with the arithmetic and what would: a value that is named passes every other
check, too, so that following it does not lead to the next refusal. A batch or a sequence is computed so; a key of
[parallel] also decides how many data ranks are left, so `choose` tries it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import lcm
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.config.model_shape import VOCABULARY_MULTIPLE, ModelShape
from megatron.config.partition import stage_count
from megatron.config.schema import ParallelSection

Refusals = Iterator[ConfigError]
Choose = Callable[[str, Sequence[Any]], list[Any]]
"""choose(key, values): those values of a key of [parallel] with which nothing would be refused."""


def any_of(key: str, values: Sequence[Any]) -> list[Any]:
    """All of them: a choice where the number of processes is not known."""
    return list(values)


def tensor_sizes(shape: ModelShape) -> list[int]:
    """Every parallel.tensor that a model can be cut over."""
    heads, groups, inner, words = (
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.intermediate_size,
        shape.padded_vocab_size,
    )
    whole = (size for size in range(1, heads + 1) if not (heads % size or inner % size or words % size))
    return [size for size in whole if groups % size == 0 or (groups < size and size % groups == 0)]


def tensor_refusals(tensor: int, shape: ModelShape, choose: Choose = any_of) -> Refusals:
    """Heads, key-value heads, the MLP and the vocabulary over the tensor ranks."""

    def remedy(other: str) -> str:
        sizes = choose("tensor", tensor_sizes(shape))
        return f"set parallel.tensor to {_one_of(sizes)}, or {other}" if sizes else f"set {other}"

    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if heads % tensor:
        more = _multiples(heads, tensor)[-1]
        yield _indivisible("model.num_attention_heads", heads, tensor, remedy(f"num_attention_heads to {more}"))
    elif groups >= tensor and groups % tensor:
        more = _multiples(groups, tensor)[-1]
        yield _indivisible("model.num_key_value_heads", groups, tensor, remedy(f"num_key_value_heads to {more}"))
    elif groups < tensor and tensor % groups:
        yield ConfigError(
            f"model.num_key_value_heads {groups} is fewer than parallel.tensor {tensor} and does not divide it "
            f"({tensor} = {groups} x {tensor // groups} + {tensor % groups}): "
            f"{remedy(f'num_key_value_heads to a divisor of {tensor}')}"
        )
    if shape.intermediate_size % tensor:
        near = " or ".join(map(str, _multiples(shape.intermediate_size, tensor)))
        words = remedy(f"intermediate_size to {near}")
        yield _indivisible("model.intermediate_size", shape.intermediate_size, tensor, words)
    if shape.padded_vocab_size % tensor:
        more = _multiples(shape.padded_vocab_size, lcm(tensor, VOCABULARY_MULTIPLE))[-1]
        name = f"the vocabulary of {shape.vocab_size}, padded to {shape.padded_vocab_size},"
        yield _indivisible(name, shape.padded_vocab_size, tensor, remedy(f"model.vocab_size to {more}"))


def _indivisible(name: str, size: int, tensor: int, remedy: str) -> ConfigError:
    shown = name if name.endswith(",") else f"{name} {size}"
    return ConfigError(
        f"{shown} is not a multiple of parallel.tensor {tensor} "
        f"({size} = {tensor} x {size // tensor} + {size % tensor}): {remedy}"
    )


def stage_refusals(section: ParallelSection, shape: ModelShape, choose: Choose = any_of) -> Refusals:
    """At least one layer for each stage."""
    layers, each = shape.num_hidden_layers, stage_count(section) // section.pipeline
    if (stages := section.pipeline * each) > layers:
        words = f"parallel.pipeline {section.pipeline}"
        if each > 1:
            words += f" x {each} stages on a rank (parallel.schedule = {section.schedule}) = {stages} stages"
        fewer = list(range(1, max(1, layers // each) + 1))
        sizes = choose("pipeline", fewer)
        remedy = "set "
        if sizes:
            whole = sizes == fewer and len(fewer) > 1
            remedy += f"parallel.pipeline to {f'at most {fewer[-1]}' if whole else _one_of(sizes)}, or "
        yield ConfigError(
            f"{words} needs at least one layer for each, and model.num_hidden_layers is {layers}: {remedy}"
            f"num_hidden_layers to {stages} or more"
        )


def sequence_refusals(section: ParallelSection, shape: ModelShape, length: int, choose: Choose = any_of) -> Refusals:
    """A sequence over context ranks (two chunks each where keys are gathered) and, under sequence, tensor ranks."""
    tensor = section.tensor if section.sequence else 1
    heads = max(1, shape.num_key_value_heads // section.tensor)
    exchanged = heads % section.context == 0
    if section.context_method == "all-to-all" and not exchanged:
        yield ConfigError(
            f"parallel.context_method = all-to-all: {heads} key-value heads on each tensor rank do not divide by "
            f"parallel.context {section.context} ({heads} = {section.context} x {heads // section.context} + "
            f"{heads % section.context}): set {_instead_of_all_to_all(section, heads, length, choose)}"
        )
    gathers = gathers_keys(section, shape)
    parts = _sequence_parts(section, gathers)
    if length % parts:
        words = [f"parallel.context {section.context}"] if section.context > 1 else []
        words += [f"parallel.tensor {tensor} (parallel.sequence = true)"] if tensor > 1 else []
        twice = ", two chunks a context rank since keys and values are gathered," if gathers else ""
        near = " or ".join(map(str, _multiples(length, parts)))
        yield ConfigError(
            f"seq_length {length} cannot be cut equally over {' x '.join(words)}{twice} in multiples of {parts} "
            f"({length} = {parts} x {length // parts} + {length % parts}): set model.seq_length (or the stage's own) "
            f"to {near}"
        )


def gathers_keys(section: ParallelSection, shape: ModelShape) -> bool:
    """Whether context ranks gather keys and values, so that queries are some positions and keys all."""
    heads = max(1, shape.num_key_value_heads // section.tensor)
    by_itself = section.context_method == "auto" and heads % section.context > 0
    return section.context > 1 and (section.context_method == "gather" or by_itself)


def _sequence_parts(section: ParallelSection, gathers: bool) -> int:
    """What a sequence must be a multiple of."""
    tensor = section.tensor if section.sequence else 1
    return lcm(2 * section.context if gathers else section.context, section.context * tensor)


def _instead_of_all_to_all(section: ParallelSection, heads: int, length: int, choose: Choose) -> str:
    divisors = [size for size in range(1, heads + 1) if heads % size == 0]
    found = [f"context_method = {method}" for method in choose("context_method", ["gather"])]
    if sizes := choose("context", divisors):
        found.append(f"parallel.context to {_one_of(sizes)}")
    if found:
        return ", or ".join(found)
    near = " or ".join(map(str, _multiples(length, _sequence_parts(section, gathers=True))))
    return f"context_method = gather, and model.seq_length (or the stage's own) to {near}"


def batch_refusals(section: ParallelSection, layout: Layout, micro: int, size: int) -> Refusals:
    """A global batch in whole microbatches on every data rank, in a number that the schedule can run."""
    each = micro * layout.data
    count, rest = divmod(size, each)
    if not rest and _runs(section, count):
        return
    remedy = batch_remedy(section, layout, micro, size)
    if rest:
        yield ConfigError(
            f"train.global_batch_size {size} is not a multiple of train.micro_batch_size {micro} x {layout.data} data "
            f"ranks = {each} ({size} = {each} x {count} + {rest}): set it to {remedy}"
        )
        return
    yield ConfigError(
        f"parallel.schedule = {section.schedule} cannot run {count} microbatches over parallel.pipeline "
        f"{section.pipeline} (train.global_batch_size {size} / train.micro_batch_size {micro} / {layout.data} data "
        f"ranks = {count}; {_MICROBATCH_WORDS[section.schedule]}): set train.global_batch_size to {remedy}, or another "
        "train.micro_batch_size"
    )


def batch_remedy(section: ParallelSection, layout: Layout, micro: int, size: int) -> str:
    """The nearest global batches below and above one that is refused, which no check of batches refuses, and the keys
    that they may be set by: "24 or 32 (or …)"."""
    each, pipeline = micro * layout.data, section.pipeline
    below = next((number for number in range((size - 1) // each, 0, -1) if _runs(section, number)), 0)
    above = next(
        number for number in range(size // each + 1, 2 * (size // each + pipeline + 1)) if _runs(section, number)
    )
    near = " or ".join(str(number * each) for number in (below, above) if number)
    # A multiple of the pipeline's ranks is in equal rounds and enough for every schedule.
    ramp = f"with batch_ramp its start and increment, too, to multiples of {each * pipeline}"
    return f"{near} (or the stage's own, or that of its shapes; {ramp})"


def _runs(section: ParallelSection, count: int) -> bool:
    """Whether so many microbatches can be run by the schedule."""
    return count > 0 and (section.pipeline == 1 or MICROBATCHES[section.schedule](count, section.pipeline))


def _rounds(count: int, pipeline: int) -> bool:
    return count >= pipeline and count % (count // pipeline) == 0


MICROBATCHES: dict[str, Callable[[int, int], bool]] = {
    "1f1b": lambda count, pipeline: count >= pipeline,
    "interleaved": _rounds,
    "zero-bubble": _rounds,
    "zbv": lambda count, pipeline: count >= pipeline,
}
"""Whether a schedule of torch.distributed.pipelining runs so many microbatches over so many ranks. Fewer microbatches
than ranks are refused for all: some schedules would run them, at a bubble of half the step or more."""

_MICROBATCH_WORDS = {
    "1f1b": "at least as many microbatches as ranks",
    "interleaved": "at least as many microbatches as ranks, in equal rounds: a multiple of microbatches // pipeline",
    "zero-bubble": "at least as many microbatches as ranks, in equal rounds: a multiple of microbatches // pipeline",
    "zbv": "at least as many microbatches as ranks",
}


def _multiples(size: int, of: int) -> list[int]:
    """The positive multiples of `of` below and above a size that is none."""
    below = size // of * of
    return [below, below + of] if below else [of]


def _one_of(values: Sequence[int]) -> str:
    """ "2", "2 or 4", "one of 1, 2, 4"."""
    if len(values) < 3:
        return " or ".join(map(str, values))
    return f"one of {', '.join(map(str, values))}"
