"""Which layouts a search looks at: everything that `[parallel]` and the microbatch can say, within stated bounds.

The space over N processes, for the engine of the config:

    tensor      sizes that the model divides by, inside a node; with `sequence` wherever the sequence can be cut
    context     divisors of what is left
    pipeline    divisors of what is left, at most a layer each; 1f1b, zero-bubble, zbv, and interleaved with 2, 4, 8, …
                stages on a rank, or with a layer a stage
    data        what is left; data_shard none, optimizer, full, and gradients without a pipeline (with one it saves
                nothing); data_replicate 1, or groups that fill one node, or 2, 4, 8, … of them
    microbatch  1, 2, 4, … of the rows of a data rank
    recompute   none; selective by either policy or full, of all layers or of the fewest that make it fit

What the config itself says of an axis is always among them. Batches, precision, optimizer, kernels and offload stay as
they are: they are the run's, not the layout's. Arithmetic leaves out what `train` would refuse for its sizes;
`accepted` asks `train`'s own checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.kernel_checks import kernel_refusals, splits_backward
from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape, refusals
from megatron.config.layout_sizes import MICROBATCHES, tensor_sizes
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection, OptimizerSection, ParallelSection, TrainSection

MOST_ROWS = 64
"""Rows of a microbatch that are tried at most."""


@dataclass(frozen=True)
class Workload:
    """What every layout of a search has in common.

    batches: that training uses, that with the most tokens first. checked: all that `train` checks, held-out rows among
    them. section: `[parallel]` as it stands, of which engine, offload and context_method are kept.
    """

    shape: ModelShape
    section: ParallelSection
    train: TrainSection
    optimizer: OptimizerSection
    batches: tuple[BatchShape, ...]
    checked: tuple[BatchShape, ...]
    kernels: KernelsSection = field(default_factory=KernelsSection)

    @property
    def main(self) -> BatchShape:
        """The batch that trains most tokens."""
        return self.batches[0]


@dataclass(frozen=True)
class Choice:
    """A layout, and the rows of its microbatches."""

    section: ParallelSection
    layout: Layout
    rows: int

    def with_recompute(self, kind: Recompute) -> Choice:
        """The same with another recompute."""
        change = {"recompute": kind[0], "recompute_policy": kind[1], "recompute_layers": kind[2]}
        return Choice(self.section.model_copy(update=change), self.layout, self.rows)


Recompute = tuple[str, str, int | None]
"""parallel.recompute, recompute_policy and recompute_layers."""
NO_RECOMPUTE: Recompute = ("none", "attention", None)


def recompute_of(section: ParallelSection) -> Recompute:
    """What a section says of it."""
    return section.recompute, section.recompute_policy, section.recompute_layers


def recompute_kinds(section: ParallelSection) -> list[Recompute]:
    """Of all layers, the cheapest to make again first."""
    kinds: list[Recompute] = [("selective", "attention", None), ("selective", "operations", None)]
    kinds.append(("full", "attention", None))
    return [kind for kind in kinds if not (splits_backward(section) and kind[1] == "operations")]


def train_of(workload: Workload, rows: int) -> TrainSection:
    """`[train]` with so many rows a microbatch."""
    return _with_rows(workload.train, rows)


@lru_cache(maxsize=256)
def _with_rows(train: TrainSection, rows: int) -> TrainSection:
    return train.model_copy(update={"micro_batch_size": rows})


def accepted(workload: Workload, choice: Choice) -> bool:
    """Whether `train` would take it; see `reasons`."""
    return not reasons(workload, choice)


def reasons(workload: Workload, choice: Choice) -> list[ConfigError]:
    """What `train` would say against a layout."""
    train, precision = train_of(workload, choice.rows), workload.train.precision
    section, layout = choice.section, choice.layout
    found = refusals(
        section, layout, workload.shape, train, workload.optimizer, workload.checked, precision, processes_known=False
    )
    kernels = kernel_refusals(workload.kernels, section, layout.world_size, workload.shape, train, precision)
    return [*found, *kernels]


def choices(workload: Workload, processes: int, node: int) -> Iterator[Choice]:
    """The space without recompute, whose sizes divide; `accepted` has yet to be asked. node: processes of one.

    Those that differ in their rows alone follow each other and share a section.
    """
    for base, data in _axes(workload, processes, node):
        for section in _pipelines(workload, base, data):
            rows = _rows(workload, section, data)
            if not rows:
                continue
            for whole in _data(workload, section, data, node):
                layout = resolve_layout(whole, processes)
                for each in rows:
                    yield Choice(whole, layout, each)


def _axes(workload: Workload, processes: int, node: int) -> Iterator[tuple[ParallelSection, int]]:
    """Sections with tensor, context and pipeline, and the data ranks that are left."""
    now, shape = workload.section, workload.shape
    lengths = [batch.seq_length for batch in workload.checked]
    inside = min(node, processes)
    tensors = [size for size in tensor_sizes(shape) if inside % size == 0 and processes % size == 0]
    for tensor in _with(tensors, now.tensor):
        for context in _with(divisors(processes // tensor) if processes % tensor == 0 else [], now.context):
            if processes % (tensor * context) or any(length % context for length in lengths):
                continue
            for sequence in _sequences(now, tensor, context, lengths):
                axes: dict[str, Any] = {"tensor": tensor, "context": context, "sequence": sequence}
                axes["context_method"] = now.context_method if context > 1 and now.context > 1 else "auto"
                left = processes // (tensor * context)
                for pipeline in divisors(left):
                    if pipeline <= shape.num_hidden_layers:
                        yield _changed(now, {**axes, "pipeline": pipeline}), left // pipeline


def _sequences(now: ParallelSection, tensor: int, context: int, lengths: Sequence[int]) -> list[bool]:
    """Cutting the sequence over tensor ranks sends the same bytes and keeps fewer."""
    if tensor == 1:
        return [False]
    if any(length % (tensor * context) for length in lengths):
        return [False]
    return [True, False] if now.tensor > 1 and not now.sequence else [True]


def _pipelines(workload: Workload, base: ParallelSection, data: int) -> Iterator[ParallelSection]:
    """With a schedule that has a layer for every stage."""
    now, pipeline = workload.section, base.pipeline
    if pipeline == 1:
        yield _changed(base, {"schedule": "1f1b", "virtual": 2})
        return
    most = workload.shape.num_hidden_layers // pipeline
    yield _changed(base, {"schedule": "1f1b", "virtual": 2})
    virtuals = [size for size in _powers(most) if size > 1]
    if most > 1:
        virtuals = _with(virtuals, most)
    if now.schedule == "interleaved" and 1 < now.virtual <= most:
        virtuals = _with(virtuals, now.virtual)
    for virtual in virtuals:
        yield _changed(base, {"schedule": "interleaved", "virtual": virtual})
    yield _changed(base, {"schedule": "zero-bubble", "virtual": 2})
    if most > 1:
        yield _changed(base, {"schedule": "zbv", "virtual": 2})


def _rows(workload: Workload, section: ParallelSection, data: int) -> list[int]:
    """Of a microbatch, such that every batch is whole microbatches, as many as the schedule needs."""
    sizes = [batch.global_batch_size for batch in workload.checked]
    if any(size % data for size in sizes):
        return []
    each = [size // data for size in sizes]
    runs = MICROBATCHES[section.schedule] if section.pipeline > 1 else None
    whole = gcd(*each)
    asked = _with(_powers(min(whole, MOST_ROWS)), workload.train.micro_batch_size)
    return [
        rows
        for rows in asked
        if whole % rows == 0 and (runs is None or all(runs(number // rows, section.pipeline) for number in each))
    ]


def _data(workload: Workload, section: ParallelSection, data: int, node: int) -> Iterator[ParallelSection]:
    now = workload.section
    yield _changed(section, {"data_shard": "none", "data_replicate": 1})
    if data == 1 and section.offload == "none":
        if now.data_shard != "none":
            yield _changed(section, {"data_shard": now.data_shard, "data_replicate": 1})
        return
    near = max(1, node // (section.tensor * section.context))
    groups = [near << power for power in range(32) if near << power < data]
    replicas = [data // group for group in groups if group > 1 and data % group == 0]
    if data % now.data_replicate == 0:
        replicas = _with(replicas, now.data_replicate)
    for shard in ("optimizer", "gradients", "full"):
        if shard == "gradients" and section.pipeline > 1 and now.data_shard != "gradients":
            continue
        for replicate in _with(replicas, 1):
            yield _changed(section, {"data_shard": shard, "data_replicate": replicate})


def _changed(section: ParallelSection, change: dict[str, Any]) -> ParallelSection:
    none = {"recompute": "none", "recompute_policy": "attention", "recompute_layers": None}
    return section.model_copy(update={**none, **change})


def _with(values: Sequence[int], one: int) -> list[int]:
    return sorted({*values, one})


def _powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """In ascending order."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}))


def simplicity(choice: Choice) -> tuple[Any, ...]:
    """Of two layouts that are equally fast the one with the smaller value is to be preferred: fewer axes, less to be
    said, weights in fewer parts, more rows."""
    section, layout = choice.section, choice.layout
    axes = (layout.tensor, layout.pipeline, layout.context)
    orders = ("1f1b", "interleaved", "zero-bubble", "zbv")
    shards = ("none", "optimizer", "gradients", "full")
    return (
        sum(size > 1 for size in axes),
        section.recompute != "none",
        orders.index(section.schedule),
        section.data_replicate > 1,
        shards.index(section.data_shard),
        *axes,
        section.virtual,
        section.data_replicate,
        recompute_of(section)[:2],
        section.recompute_layers or 0,
        not section.sequence,
        -choice.rows,
    )
