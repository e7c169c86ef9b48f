"""What a run needs on disks: checkpoints, an export, indexed data, epoch indexes, metrics.

Tensors of checkpoints and exports are exact; `tests/planner/test_disk.py` compares them with files. A source that is
planned by its size alone is taken to have documents of DOCUMENT_TOKENS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.model_shape import ModelShape
from megatron.config.schema import CheckpointSection, OptimizerSection
from megatron.data.indexed_format import dtype_for_vocab, path_of
from megatron.data.sources import OpenSource
from megatron.planner.layout_bytes import stage_tensors, state_bytes_of

DOCUMENT_TOKENS = 1000
"""Of a document of a source that is not there yet: an assumption, which decides the size of .idx files and indexes."""
ROW_BYTES = 600
"""Of metrics.jsonl for each step: about what a run with few sources writes."""
_STRIDE, _ENTRY, _HEADER = 32, 4, 128
"""Of epoch indexes (`data/index_cache.py`): pieces for each entry, bytes of one, and of what stands before them."""
_IDX_HEADER, _IDX_DOCUMENT = 34, 4 + 8 + 8
"""Of .idx files (`data/indexed_format.py`): the header; size, pointer and document index of a document."""


@dataclass(frozen=True)
class SourceDisk:
    """Bytes of one source. indexes: of all epochs that the run uses. exact: of files that are there."""

    source: str
    data: int
    indexes: int
    exact: bool


@dataclass(frozen=True)
class DiskPlan:
    """Bytes. model, optimizer: of one checkpoint's tensors. kept: checkpoints on the disk at most, when a new one has
    been written and none is retired yet; at_the_end: when the run is done. export: an exported model in bf16."""

    model: int
    optimizer: int
    kept: int
    at_the_end: int
    export: int
    metrics: int
    sources: tuple[SourceDisk, ...]

    @property
    def checkpoint(self) -> int:
        """One checkpoint's tensors; headers, state and tokenizer are some megabytes besides."""
        return self.model + self.optimizer

    @property
    def output(self) -> int:
        """The run's own folder at its fullest: checkpoints and metrics."""
        return self.kept * self.checkpoint + self.metrics


def checkpoint_bytes(shape: ModelShape, optimizer: OptimizerSection, precision: str) -> tuple[int, int]:
    """(master weights, optimizer state) of a checkpoint's tensors, the same for every layout and engine.

    precision: a name of train.precision; masters are float32 but for fp64.
    """
    wide = 8 if precision == "fp64" else 4
    model = state = 0
    for item in stage_tensors(shape, 1, range(shape.num_hidden_layers), first=True, last=True):
        elements = item.rows * item.width
        model += wide * elements
        state += state_bytes_of(item, elements, optimizer, wide)
    return model, state


def export_bytes(shape: ModelShape, element: int = 2) -> int:
    """Tensors of an exported model, whose vocabulary is without padding; element: bytes of a number (2: bf16)."""
    padding = shape.padded_vocab_size - shape.vocab_size
    return element * (shape.parameter_count() - (1 if shape.tie_word_embeddings else 2) * padding * shape.hidden_size)


def checkpoints_kept(section: CheckpointSection, stage_ends: Sequence[int]) -> tuple[int, int]:
    """(at most at one time, at the end). stage_ends: the steps at which training stages end, ascending; a checkpoint
    there stays, and besides them the newest `keep` of the others."""
    last = stage_ends[-1]
    ends = {*stage_ends, *(step for step in section.keep_steps if step <= last)}
    regular = sum(1 for step in range(section.every, last + 1, section.every) if step not in ends)
    # The fullest moment: the newest is there and the oldest of the others has not gone yet.
    most, passing = 0, 0
    moments = sorted({*ends, *(step for step in range(section.every, last + 1, section.every))})
    forever = 0
    for step in moments:
        forever += step in ends
        passing += step not in ends
        most = max(most, forever + passing)
        passing = min(passing, section.keep)
    return most, len(ends) + min(regular, section.keep)


def disk_plan(
    shape: ModelShape,
    optimizer: OptimizerSection,
    precision: str,
    checkpoint: CheckpointSection,
    stage_ends: Sequence[int],
    sources: Mapping[str, OpenSource],
    rows: Iterable[Mapping[str, Any]],
) -> DiskPlan:
    """rows: "sources" of `plan_of`, for how many epochs of each are used."""
    model, state = checkpoint_bytes(shape, optimizer, precision)
    most, last = checkpoints_kept(checkpoint, stage_ends)
    epochs = {row["source"]: row["epochs"] for row in rows}
    found = tuple(_source(one, epochs.get(name, 0.0), shape.vocab_size) for name, one in sources.items())
    return DiskPlan(model, state, most, last, export_bytes(shape), ROW_BYTES * stage_ends[-1], found)


def _source(source: OpenSource, epochs: float, vocabulary: int) -> SourceDisk:
    used = int(-(-epochs // 1))
    if source.order is not None:
        paths = [path_of(prefix, suffix) for prefix in source.section.data for suffix in (".bin", ".idx")]
        there = sum(path.stat().st_size for path in paths if path.exists())
        return SourceDisk(source.name, there, used * index_bytes(source.order.piece_count), True)
    tokens = int(source.section.tokens or 0)
    documents = -(-tokens // DOCUMENT_TOKENS)
    size = dtype_for_vocab(vocabulary).itemsize * tokens + _IDX_DOCUMENT * documents + _IDX_HEADER + 8
    within = -(-source.epoch_tokens // DOCUMENT_TOKENS)
    return SourceDisk(source.name, size, used * index_bytes(within), False)


def index_bytes(pieces: int) -> int:
    """Of one epoch's index; none is written where it would have one entry."""
    return 0 if pieces <= _STRIDE else _HEADER + _ENTRY * -(-pieces // _STRIDE)
