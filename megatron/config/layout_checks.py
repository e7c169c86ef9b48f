"""Everything about a layout that can be refused before any process group is made. Free of torch.

A refusal names the key and its value, shows the arithmetic, and says what to set. All are ConfigError, also what an
engine does not support and what was never compared with one process (law T1): the config decides them alone, on every
machine and installation the same. What another machine or installation could honour is UnavailableError, and is found
by the part that would need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron.config.errors import ConfigError
from megatron.config.kernel_checks import splits_backward
from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_sizes import (
    Choose,
    any_of,
    batch_refusals,
    sequence_refusals,
    stage_refusals,
    tensor_refusals,
)
from megatron.config.model_shape import ModelShape
from megatron.config.partition import partition_layers, stage_count
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.config.tested_layouts import TESTED, combination_of

_ZERO_STAGES = {"none": 0, "optimizer": 1, "gradients": 2, "full": 3}
Refusals = Iterator[ConfigError]

_LACKS: dict[str, frozenset[str]] = {
    "torch": frozenset({"offload", "deepspeed_config"}),
    "deepspeed": frozenset(
        {"fp64", "data_replicate", "gradients in a pipeline", "split backward", "muon", "other AdamW"}
    ),
}
"""By engine, what it cannot do and another can."""


class BatchShape(NamedTuple):
    """One of the run's batches: input positions of a sample, and sequences in an optimizer step."""

    seq_length: int
    global_batch_size: int


def check_layout(
    section: ParallelSection,
    layout: Layout,
    shape: ModelShape,
    train: TrainSection,
    optimizer: OptimizerSection,
    batches: Sequence[BatchShape],
    precision: str,
) -> None:
    """Raises the first of `refusals`.

    layout: from `resolve_layout`. batches: every one that some training stage uses. precision: the resolved name, or
    train.precision.
    """
    for refusal in refusals(section, layout, shape, train, optimizer, batches, precision):
        raise refusal


def refusals(
    section: ParallelSection,
    layout: Layout,
    shape: ModelShape,
    train: TrainSection,
    optimizer: OptimizerSection,
    batches: Sequence[BatchShape],
    precision: str,
    processes_known: bool = True,
) -> list[ConfigError]:
    """All that is wrong with a layout, keys before sizes; arguments as of `check_layout`.

    processes_known: the number of processes stays what it is, so that other sizes of an axis are recommended only where
    nothing is refused of the layout that they give.
    """

    def found(there: ParallelSection, over: Layout, choose: Choose) -> list[ConfigError]:
        return list(_refusals(there, over, shape, train, optimizer, batches, precision, choose))

    def passes(key: str, value: Any) -> bool:
        changed = section.model_copy(update={key: value})
        try:
            return not found(changed, resolve_layout(changed, layout.world_size), any_of)
        except ConfigError:
            return False

    def choose(key: str, values: Sequence[Any]) -> list[Any]:
        passing = [value for value in values if passes(key, value)]
        # Of several faults, one remedy cannot mend all: then the sizes that mend this one.
        return passing if passing or len(now) == 1 else list(values)

    now = found(section, layout, any_of)
    return found(section, layout, choose) if now and processes_known else now


def _refusals(
    section: ParallelSection,
    layout: Layout,
    shape: ModelShape,
    train: TrainSection,
    optimizer: OptimizerSection,
    batches: Sequence[BatchShape],
    precision: str,
    choose: Choose,
) -> Refusals:
    keys = [*_keys_without_effect(section, layout), *_pairs(section, layout), *_optimizers(section, layout, optimizer)]
    if precision == "fp64" and "fp64" in _LACKS[section.engine]:
        words = "train.precision = fp64 with parallel.engine = deepspeed: DeepSpeed's optimizers compute in float32 "
        keys.append(ConfigError(words + "at most; set train.precision to fp32 or bf16, or parallel.engine = torch"))
    yield from keys
    yield from _gradient_refusals(section, layout, train, precision)
    yield from _split_master_refusals(section, layout, optimizer, precision)
    yield from tensor_refusals(section.tensor, shape, choose)
    yield from stage_refusals(section, shape, choose)
    for length in dict.fromkeys(batch.seq_length for batch in batches):
        yield from sequence_refusals(section, shape, length, choose)
    for size in dict.fromkeys(batch.global_batch_size for batch in batches):
        yield from batch_refusals(section, layout, train.micro_batch_size, size)
    found = combination_of(section, layout)
    if not keys and found not in TESTED:
        yield ConfigError(
            f"the layout {found.words()} was never compared with one process, and what was not is refused: leave one "
            "of its axes out (docs/parallel.md lists what was compared)"
        )


def _gradient_refusals(section: ParallelSection, layout: Layout, train: TrainSection, precision: str) -> Refusals:
    """Narrow gradients are what one process of the torch engine adds up beside its narrow copy."""
    possible = section.engine == "torch" and layout.world_size == 1 and precision in ("bf16", "auto")
    if train.gradients == "bf16" and not possible:
        yield ConfigError(
            "train.gradients = bf16 is for one process of the torch engine in bf16, and this is "
            f"{layout.world_size} of the {section.engine} engine in {precision}: set train.gradients to fp32 (several "
            "processes save memory by parallel.data_shard)"
        )


def _split_master_refusals(
    section: ParallelSection, layout: Layout, optimizer: OptimizerSection, precision: str
) -> Refusals:
    """Masters in halves are what Triton's AdamW steps where the high halves compute: FSDP2 has shards of one dtype,
    and would round what it reduces to theirs; DeepSpeed keeps its own masters."""
    if optimizer.master_weights == "whole":
        return
    asked = {
        f"{layout.world_size} processes": layout.world_size > 1,
        f"parallel.engine = {section.engine}": section.engine != "torch",
        f"precision {precision}": precision not in ("bf16", "auto"),
        f"optimizer.name = {optimizer.name}": optimizer.name != "adamw",
        f"optimizer.implementation = {optimizer.implementation}": optimizer.implementation != "triton",
    }
    if against := [words for words, found in asked.items() if found]:
        yield ConfigError(
            f"optimizer.master_weights = split does not go with {' and '.join(against)}: it is for one process of the "
            "torch engine in bf16 with optimizer.name = adamw and optimizer.implementation = triton; set these, or "
            "optimizer.master_weights to whole (several processes save memory by parallel.data_shard)"
        )


def notes_of_layout(
    section: ParallelSection, layout: Layout, shape: ModelShape, local_world_size: int = 8
) -> list[str]:
    """What is allowed and worth a word. local_world_size: processes of a node."""
    notes = []
    if section.data_shard == "gradients" and section.engine == "torch" and layout.pipeline > 1:
        notes.append(
            "parallel.data_shard = gradients saves no more than optimizer under a pipeline: gradients are reduced "
            "once, at the step's end"
        )
    if section.data_shard == "full" and section.engine == "torch" and layout.pipeline > 1:
        notes.append(
            "parallel.data_shard = full under a pipeline: torch keeps a stage's gathered weights and whole gradients "
            "until its last microbatch; only masters and optimizer state stay in shards through the step"
        )
    if section.data_shard == "full" and "offload" not in _LACKS[section.engine]:
        notes.append(
            "ZeRO-3 is given the whole model of a tensor rank in float32 at the start, and cuts it then: each "
            f"device needs {4 * shape.parameter_count() // layout.tensor / 1e9:.1f} GB for that moment"
        )
    if section.data_shard != "none" and layout.shard == 1:
        notes.append(f"parallel.data_shard = {section.data_shard} cuts nothing: there is one data rank")
    if layout.tensor > local_world_size:
        notes.append(
            f"parallel.tensor {layout.tensor} is more than the {local_world_size} processes of a node: every layer "
            "then waits for the network between nodes"
        )
    if layout.tensor > shape.num_key_value_heads:
        notes.append(
            f"{shape.num_key_value_heads} key-value heads over parallel.tensor {layout.tensor}: every rank holds and "
            "updates all key and value weights"
        )
    if section.recompute_layers and section.recompute != "none":
        stages = partition_layers(shape, stage_count(section), shape.max_position_embeddings)
        if section.recompute_layers >= (most := max(len(layers) for layers in stages)):
            notes.append(
                f"parallel.recompute_layers {section.recompute_layers}: no stage has more than {most}; all are"
            )
    return notes


# -- keys -------------------------------------------------------------------------------------------------------------


def _keys_without_effect(section: ParallelSection, layout: Layout) -> Refusals:
    """A key that would be ignored is refused: whoever set it expects something of it."""
    schedule, pipeline = section.schedule, section.pipeline
    if schedule != "1f1b" and pipeline == 1:
        yield ConfigError(
            f"parallel.schedule = {schedule} needs a pipeline, and parallel.pipeline is 1: set parallel.pipeline to 2 "
            "or more, or leave parallel.schedule out"
        )
    own = {"interleaved": section.virtual, "zbv": 2}.get(schedule, 1)
    if section.virtual not in (2, own):
        yield ConfigError(
            f"parallel.virtual {section.virtual} has no effect on parallel.schedule = {schedule}, which has {own} "
            f"stage{'s' if own > 1 else ''} on a rank: set parallel.schedule = interleaved, or leave virtual out"
        )
    if schedule == "interleaved" and section.virtual == 1:
        yield ConfigError(
            "parallel.virtual 1 with parallel.schedule = interleaved interleaves nothing: set parallel.virtual to 2 or "
            "more, or parallel.schedule = 1f1b"
        )
    if section.sequence and section.tensor == 1:
        yield ConfigError(
            "parallel.sequence = true needs tensor ranks to cut the sequence over, and parallel.tensor is 1: set "
            "parallel.tensor to 2 or more, or leave parallel.sequence out"
        )
    if section.context_method != "auto" and section.context == 1:
        yield ConfigError(
            f"parallel.context_method = {section.context_method} needs context ranks, and parallel.context is 1: set "
            "parallel.context to 2 or more, or leave parallel.context_method out"
        )
    if section.data_replicate > 1 and section.data_shard == "none":
        yield ConfigError(
            f"parallel.data_replicate {section.data_replicate} makes groups that hold the same shards, and "
            "parallel.data_shard is none, which makes no shards: set parallel.data_shard, or leave data_replicate out"
        )
    yield from _recompute_and_deepspeed(section)


def _recompute_and_deepspeed(section: ParallelSection) -> Refusals:
    if section.recompute_layers is not None and section.recompute == "none":
        yield ConfigError(
            f"parallel.recompute_layers {section.recompute_layers} has no effect while parallel.recompute is none: set "
            "parallel.recompute to selective or full, or leave recompute_layers out"
        )
    if section.recompute_policy != "attention" and section.recompute != "selective":
        yield ConfigError(
            f"parallel.recompute_policy = {section.recompute_policy} is for parallel.recompute = selective, and it is "
            f"{section.recompute}: set parallel.recompute = selective, or leave recompute_policy out"
        )
    lacks = _LACKS[section.engine]
    if section.offload != "none" and "offload" in lacks:
        yield ConfigError(
            f"parallel.offload = {section.offload} is DeepSpeed's, and parallel.engine is {section.engine}: set "
            "parallel.engine = deepspeed, or leave parallel.offload out"
        )
    if section.deepspeed_config is not None and "deepspeed_config" in lacks:
        yield ConfigError(
            f"parallel.deepspeed_config = {section.deepspeed_config!r} is DeepSpeed's, and parallel.engine is "
            f"{section.engine}: set parallel.engine = deepspeed, or leave parallel.deepspeed_config out"
        )


def _pairs(section: ParallelSection, layout: Layout) -> Refusals:
    """Keys that make sense each alone and not together."""
    lacks, shard, schedule = _LACKS[section.engine], section.data_shard, section.schedule
    split = splits_backward(section)
    if section.pipeline > 1 and shard in ("gradients", "full") and "gradients in a pipeline" in lacks:
        yield ConfigError(
            f"parallel.data_shard = {shard} (ZeRO-{_ZERO_STAGES[shard]}) with parallel.pipeline {section.pipeline} on "
            "DeepSpeed: it reduces gradients in every backward pass, and a pipeline adds them up over microbatches "
            "first; set parallel.data_shard to none or optimizer, or parallel.engine = torch"
        )
    if split and "split backward" in lacks:
        yield ConfigError(
            f"parallel.schedule = {schedule} computes gradients of inputs and of weights apart, which DeepSpeed's "
            "hooks do not see: set parallel.schedule to 1f1b or interleaved, or parallel.engine = torch"
        )
    if split and section.recompute == "selective" and section.recompute_policy == "operations":
        yield ConfigError(
            f"parallel.recompute_policy = operations with parallel.schedule = {schedule}, which computes gradients of "
            "inputs and of weights apart: torch lets such a layer be recomputed only once; set recompute_policy to "
            "attention, parallel.recompute to full, or parallel.schedule to 1f1b or interleaved"
        )
    if split and shard == "full" and "split backward" not in lacks:
        yield ConfigError(
            f"parallel.schedule = {schedule} with parallel.data_shard = full loses gradients: weights are dropped "
            "before the pass that computes their gradients; set parallel.data_shard to none, optimizer or gradients, "
            "or parallel.schedule to 1f1b or interleaved"
        )
    if section.data_replicate > 1 and "data_replicate" in lacks:
        yield ConfigError(
            f"parallel.data_replicate {section.data_replicate} with parallel.engine = deepspeed is not supported: "
            "leave it out, or set parallel.engine = torch"
        )
    if section.offload == "optimizer" and shard == "none" and "offload" not in lacks:
        yield ConfigError(
            "parallel.offload = optimizer needs optimizer state in shards, and parallel.data_shard is none (ZeRO-0): "
            "set parallel.data_shard = optimizer, or leave parallel.offload out"
        )


def _optimizers(section: ParallelSection, layout: Layout, optimizer: OptimizerSection) -> Refusals:
    if optimizer.name == "muon":
        cut = [f"parallel.tensor {layout.tensor}"] if layout.tensor > 1 else []
        if section.data_shard != "none" and layout.shard > 1:
            cut.append(f"parallel.data_shard = {section.data_shard}")
        if cut:
            yield ConfigError(
                f"optimizer.name = muon needs whole matrices, and {' and '.join(cut)} cuts them: set parallel.tensor = "
                "1 and parallel.data_shard = none, or optimizer.name = adamw"
            )
        if "muon" in _LACKS[section.engine]:
            yield ConfigError(
                "optimizer.name = muon with parallel.engine = deepspeed is not supported: set parallel.engine = torch, "
                "or optimizer.name = adamw"
            )
    if section.offload != "none" and optimizer.name != "adamw":
        yield ConfigError(
            f"parallel.offload = {section.offload} runs AdamW on the host, and optimizer.name is {optimizer.name}: set "
            "optimizer.name = adamw, or leave parallel.offload out"
        )
    other = optimizer.implementation
    if other != "torch" and optimizer.name != "adamw":
        yield ConfigError(
            f"optimizer.implementation = {other} is for AdamW, and optimizer.name is {optimizer.name}: set "
            "optimizer.name = adamw, or leave optimizer.implementation out"
        )
    if other != "torch" and "other AdamW" in _LACKS[section.engine]:
        yield ConfigError(
            f"optimizer.implementation = {other} with parallel.engine = deepspeed is not supported: DeepSpeed brings "
            "its own; set parallel.engine = torch, or leave optimizer.implementation out"
        )
