"""Our weights as a classic checkpoint of Megatron-LM: cut over its tensor and pipeline ranks, one rank at a time.

The layout is megatron_weights' at checkpoint_version 3. The files hold no optimizer and no random states.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.aside import made_aside, publish, remove, would_replace
from megatron.checkpoint.room import check_room
from megatron.checkpoint.storage import io_errors
from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.foreign.megatron_args_written import args_for, refusals
from megatron.foreign.megatron_folder import FILES, TRACKER
from megatron.foreign.megatron_names import Spelling, extra_states, nested, written_name

_DIVISIBLE_BY = 128
"""Megatron-LM's own default."""


@dataclass(frozen=True)
class MegatronLayout:
    """How a checkpoint is cut and named. divisible_by: Megatron-LM's --make-vocab-size-divisible-by."""

    tensor: int = 1
    pipeline: int = 1
    spelling: Spelling = "mcore"
    divisible_by: int = _DIVISIBLE_BY

    def words(self, shape: ModelShape) -> int:
        """Rows of the embedding with Megatron-LM's padding."""
        multiple = self.divisible_by * self.tensor
        return -(-shape.vocab_size // multiple) * multiple


def check_free(output: Path, overwrite: bool) -> None:
    """Raises ConfigError where `output` holds something that must not be replaced."""
    if not would_replace(output, overwrite):
        return
    if not (output / TRACKER).is_file():
        raise ConfigError(f"{output}: is not a checkpoint of Megatron-LM (no {TRACKER}), so it is not overwritten")


def check_layout(shape: ModelShape, layout: MegatronLayout) -> None:
    """Raises ConfigError naming all that Megatron-LM cannot express, and sizes that do not divide."""
    faults = list(refusals(shape, layout.spelling))
    for name, value, ranks in (
        ("num_attention_heads", shape.num_attention_heads, layout.tensor),
        ("num_key_value_heads", shape.num_key_value_heads, layout.tensor),
        ("intermediate_size", shape.intermediate_size, layout.tensor),
        ("num_hidden_layers", shape.num_hidden_layers, layout.pipeline),
    ):
        option = "--pipeline" if name == "num_hidden_layers" else "--tensor"
        if ranks >= 1 and value % ranks:
            faults.append(f"model.{name} {value} is not a multiple of {option} {ranks}")
    counts = {
        "--tensor": layout.tensor,
        "--pipeline": layout.pipeline,
        "--make-vocab-size-divisible-by": layout.divisible_by,
    }
    faults += [f"{option} {value} is not at least 1" for option, value in counts.items() if value < 1]
    if min(counts.values()) >= 1:
        faults += _absurd_padding(shape, layout)
    if faults:
        raise ConfigError("\n  ".join(["this model cannot be laid out for Megatron-LM:", *faults]))


def _absurd_padding(shape: ModelShape, layout: MegatronLayout) -> Iterator[str]:
    """More padding than words, unless Megatron-LM's own default pads so: a tiny vocabulary on many ranks."""
    padded = layout.words(shape)
    if layout.divisible_by > _DIVISIBLE_BY and padded - shape.vocab_size > shape.vocab_size:
        yield (
            f"--make-vocab-size-divisible-by {layout.divisible_by} x --tensor {layout.tensor} pads "
            f"{shape.vocab_size:,} words to {padded:,}, more padding than words: say a smaller one "
            f"(Megatron-LM's default is {_DIVISIBLE_BY})"
        )


def needed_bytes(
    source: TensorSource, shape: ModelShape, layout: MegatronLayout, dtype: torch.dtype | None = None
) -> int:
    """Bytes of all ranks' tensors: cut ones once, those that each tensor rank holds whole, words with their padding."""
    total = 0
    for name in source.names():
        size, count = tuple(source.shape(name)), 1
        if name in ("embedding.weight", "head.weight"):
            size = (layout.words(shape), shape.hidden_size)
            count += name == "embedding.weight" and shape.tie_word_embeddings and layout.pipeline > 1
        elif name == "positions.weight" or "norm" in name or name.endswith(("output.bias", "down.bias")):
            count = layout.tensor
        total += count * prod(size) * (dtype or source.dtype(name)).itemsize
    return total


def export_megatron(
    source: TensorSource,
    shape: ModelShape,
    output: Path,
    layout: MegatronLayout,
    *,
    iteration: int,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes `output`/iter_NNNNNNN aside, fsynced, and publishes `output` by one rename; gives the bytes of tensors.

    dtype: of the weights; None: as stored. progress: told ranks done, and of how many. In memory is one rank's part.
    Raises ConfigError (what cannot be expressed, output exists), CheckpointError, StorageError.
    """
    output = Path(output)
    check_layout(shape, layout)
    total = 0
    ranks = [(t, p) for p in range(layout.pipeline) for t in range(layout.tensor)]
    with made_aside(output) as aside:
        check_free(output, overwrite)
        remove(aside)
        check_room(aside, needed_bytes(source, shape, layout, dtype))
        try:
            for number, (t, p) in enumerate(ranks):
                name = f"mp_rank_{t:02d}_{p:03d}" if layout.pipeline > 1 else f"mp_rank_{t:02d}"
                folder = aside / f"iter_{iteration:07d}" / name
                content = rank_content(source, shape, layout, t, p, iteration, dtype)
                total += sum(tensor.nbytes for tensor in _tensors(content["model"]))
                with io_errors(folder, "write"):
                    folder.mkdir(parents=True)
                    torch.save(content, folder / FILES[0])
                del content
                if progress is not None:
                    progress(number + 1, len(ranks))
            with io_errors(aside, "write"):
                (aside / TRACKER).write_text(f"{iteration}", encoding="utf-8")
            publish(aside, output)
        except BaseException:
            remove(aside)
            raise
    return total


def rank_content(
    source: TensorSource,
    shape: ModelShape,
    layout: MegatronLayout,
    tensor_rank: int,
    pipeline_rank: int,
    iteration: int,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What a rank's file holds."""
    flat: OrderedDict[str, Tensor | None] = OrderedDict()
    for name, tensor in _rank_tensors(source, shape, layout, tensor_rank, pipeline_rank):
        flat[written_name(name, layout.spelling)] = tensor.to(dtype or tensor.dtype).contiguous()
    kind = next(tensor.dtype for tensor in flat.values() if tensor is not None)
    flat.update(dict.fromkeys(extra_states(shape.num_hidden_layers // layout.pipeline, layout.spelling)))
    args = args_for(shape, layout.spelling, layout.tensor, layout.pipeline, kind)
    args |= {"padded_vocab_size": layout.words(shape), "make_vocab_size_divisible_by": layout.divisible_by}
    return {
        "args": argparse.Namespace(**args, iteration=iteration),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "model": nested(flat) if layout.spelling == "legacy" else flat,
    }


def _tensors(tree: Any) -> Iterator[Tensor]:
    for value in tree.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)


def _rank_tensors(
    source: TensorSource, shape: ModelShape, layout: MegatronLayout, rank: int, stage: int
) -> Iterator[tuple[str, Tensor]]:
    """A rank's tensors by the one set of names."""
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        yield "embedding.weight", _words(source, "embedding.weight", shape, layout, rank)
        if shape.position_embedding == "learned":
            yield "positions.weight", _whole(source, "positions.weight")
    here = shape.num_hidden_layers // layout.pipeline
    for number in range(here):
        for name, tensor in _layer(source, f"layers.{stage * here + number}.", shape, layout.tensor, rank):
            yield f"layers.{number}.{name}", tensor
    if not last:
        return
    for kind in ("weight", "bias") if shape.norm == "layernorm" else ("weight",):
        yield f"final_norm.{kind}", _whole(source, f"final_norm.{kind}")
    if not shape.tie_word_embeddings:
        yield "head.weight", _words(source, "head.weight", shape, layout, rank)
    elif not first:
        yield "tied_head.weight", _words(source, "embedding.weight", shape, layout, rank)


def _layer(source: TensorSource, prefix: str, shape: ModelShape, ranks: int, rank: int) -> Iterator[tuple[str, Tensor]]:
    norms = ("weight", "bias") if shape.norm == "layernorm" else ("weight",)
    for norm in ("attention_norm", "mlp_norm"):
        yield from ((f"{norm}.{kind}", _whole(source, f"{prefix}{norm}.{kind}")) for kind in norms)
    for kind in ("weight", "bias") if shape.projection_bias else ("weight",):
        yield f"qkv.{kind}", _joint(source, f"{prefix}attention.", kind, shape, ranks, rank)
    if shape.qk_norm == "head":
        for name in ("query_norm.weight", "key_norm.weight"):
            yield name, _whole(source, f"{prefix}attention.{name}")
    gated = ("gate", "up") if shape.gated_mlp else ("up",)
    for kind in ("weight", "bias") if shape.mlp_bias else ("weight",):
        halves = [_part(source, f"{prefix}mlp.{name}.{kind}", 0, ranks, rank) for name in gated]
        yield f"fc1.{kind}", torch.cat(halves)
    for name, ours, bias in (
        ("output", "attention.output", shape.attention_bias),
        ("fc2", "mlp.down", shape.mlp_bias),
    ):
        yield f"{name}.weight", _part(source, f"{prefix}{ours}.weight", 1, ranks, rank)
        if bias:
            yield f"{name}.bias", _whole(source, f"{prefix}{ours}.bias")


def _whole(source: TensorSource, name: str) -> Tensor:
    shape = source.shape(name)
    return source.read(name, (0,) * len(shape), shape)


def _part(source: TensorSource, name: str, dimension: int, ranks: int, rank: int) -> Tensor:
    """A rank's equal part of a tensor along a dimension."""
    size = list(source.shape(name))
    size[dimension] //= ranks
    offset = [0] * len(size)
    offset[dimension] = rank * size[dimension]
    return source.read(name, offset, size)


def _joint(source: TensorSource, prefix: str, kind: str, shape: ModelShape, ranks: int, rank: int) -> Tensor:
    """A rank's rows of the joint projection: group by group its queries, its key, its value."""
    groups = shape.num_key_value_heads // ranks
    parts = [_part(source, f"{prefix}{name}.{kind}", 0, ranks, rank) for name in ("query", "key", "value")]
    return torch.cat([part.view(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


def _words(source: TensorSource, name: str, shape: ModelShape, layout: MegatronLayout, rank: int) -> Tensor:
    """A rank's words. Padding repeats the last word, as Megatron-LM's own converter has it."""
    here = layout.words(shape) // layout.tensor
    begin = rank * here
    end = min(begin + here, shape.vocab_size)
    first = min(begin, shape.vocab_size - 1)
    known = source.read(name, (first, 0), (max(end, first + 1) - first, shape.hidden_size))
    if begin > first:
        known = known[-1:]
    return torch.cat([known, known[-1:].expand(here - len(known), -1)])
