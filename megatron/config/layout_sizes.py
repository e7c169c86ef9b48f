"""Whether a model's sizes, its sequences and its batches can be shared out over the axes of a layout. Free of torch.

Each function yields what does not fit, with the arithmetic and what would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import lcm

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.config.model_shape import VOCABULARY_MULTIPLE, ModelShape
from megatron.config.partition import stage_count
from megatron.config.schema import ParallelSection

Refusals = Iterator[ConfigError]


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


def tensor_refusals(tensor: int, shape: ModelShape) -> Refusals:
    """Heads, key-value heads, the MLP and the vocabulary over the tensor ranks."""

    def remedy(other: str) -> str:
        return f"set parallel.tensor to one of {', '.join(map(str, tensor_sizes(shape)))}, or {other}"

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


def stage_refusals(section: ParallelSection, shape: ModelShape) -> Refusals:
    layers, each = shape.num_hidden_layers, stage_count(section) // section.pipeline
    if (stages := section.pipeline * each) > layers:
        words = f"parallel.pipeline {section.pipeline}"
        if each > 1:
            words += f" x {each} stages on a rank (parallel.schedule = {section.schedule}) = {stages} stages"
        most = layers // each
        remedy = f"parallel.pipeline to at most {most}" if most > 1 else "parallel.pipeline = 1"
        yield ConfigError(
            f"{words} needs at least one layer for each, and model.num_hidden_layers is {layers}: set {remedy}, or "
            f"num_hidden_layers to {stages} or more"
        )


def sequence_refusals(section: ParallelSection, shape: ModelShape, length: int) -> Refusals:
    """A sequence over context ranks (two chunks each where keys are gathered) and, under sequence, tensor ranks."""
    tensor = section.tensor if section.sequence else 1
    heads = max(1, shape.num_key_value_heads // section.tensor)
    exchanged = heads % section.context == 0
    if section.context_method == "all-to-all" and not exchanged:
        yield ConfigError(
            f"parallel.context_method = all-to-all: {heads} key-value heads on each tensor rank do not divide by "
            f"parallel.context {section.context} ({heads} = {section.context} x {heads // section.context} + "
            f"{heads % section.context}): set context_method = gather, or parallel.context to a divisor of {heads}"
        )
    gathers = section.context > 1 and (section.context_method == "gather" or not exchanged)
    parts = lcm(2 * section.context if gathers else section.context, section.context * tensor)
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


def batch_refusals(section: ParallelSection, layout: Layout, micro: int, size: int) -> Refusals:
    """A global batch in whole microbatches on every data rank, in a number that the schedule can run."""
    each = micro * layout.data
    where = "(or the stage's own, or that of its shapes or batch_ramp)"
    if size % each:
        near = " or ".join(map(str, _multiples(size, each)))
        yield ConfigError(
            f"train.global_batch_size {size} is not a multiple of train.micro_batch_size {micro} x {layout.data} data "
            f"ranks = {each} ({size} = {each} x {size // each} + {size % each}): set it to {near} {where}"
        )
        return
    count, pipeline = size // each, section.pipeline
    allowed = MICROBATCHES[section.schedule]
    if pipeline == 1 or allowed(count, pipeline):
        return
    below = next((number for number in range(count - 1, 0, -1) if allowed(number, pipeline)), None)
    above = next(number for number in range(count + 1, 2 * (count + pipeline)) if allowed(number, pipeline))
    near = " or ".join(str(number * each) for number in (below, above) if number)
    yield ConfigError(
        f"parallel.schedule = {section.schedule} cannot run {count} microbatches over parallel.pipeline {pipeline} "
        f"(train.global_batch_size {size} / train.micro_batch_size {micro} / {layout.data} data ranks = {count}; "
        f"{_MICROBATCH_WORDS[section.schedule]}): set train.global_batch_size to {near} {where}, or another "
        "train.micro_batch_size"
    )


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
