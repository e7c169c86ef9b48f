"""What a run needs on disks, against files of real runs and against saving played by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.load import load_config
from megatron.config.model_shape import resolve_model
from megatron.config.schema import CheckpointSection, ModelSection, OptimizerSection
from megatron.data.index_cache import IndexKey
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.planner.disk import (
    checkpoint_bytes,
    checkpoints_kept,
    disk_plan,
    export_bytes,
    index_bytes,
)
from megatron.planner.plan import plan_of
from megatron.planner.resolve import resolve_run


def tensor_bytes(folder: Path) -> int:
    """Of all safetensors files in a folder, without their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header
    return total


def test_a_real_run_writes_what_the_plan_says(tmp_path: Path) -> None:
    config = tiny_run.make_run(tmp_path)
    done = tiny_run.train(config)
    assert done.returncode == 0, done.stderr
    section = load_config(config)
    run = resolve_run(section)
    shape = resolve_model(section.model, 257, 16)
    ends = [stage.end_step for stage in run.schedule.stages]
    rows = plan_of(run)["sources"]
    plan = disk_plan(shape, section.optimizer, "fp32", section.checkpoint, ends, run.sources, rows)
    output = tmp_path / "run"
    folders = sorted((output / "checkpoints").glob("step-*"))
    assert len(folders) == plan.at_the_end
    for folder in folders:
        assert tensor_bytes(folder / "model") == plan.model
        assert tensor_bytes(folder / "optimizer") == plan.optimizer
    for source in plan.sources:
        paths = [tmp_path / "data" / f"{source.source}{suffix}" for suffix in (".bin", ".idx")]
        assert source.exact and source.data == sum(path.stat().st_size for path in paths)
    indexes = sum(path.stat().st_size for path in (tmp_path / "data" / "cache").glob("*.order"))
    # An epoch that begins after a run's last sample has an index already, where the next one is prepared ahead.
    assert sum(source.indexes for source in plan.sources) > 0 and indexes % 136 == 0
    size = (output / "metrics.jsonl").stat().st_size
    assert size / 2 < plan.metrics < 2 * size
    assert json.loads((folders[-1] / "manifest.json").read_text())["step"] == ends[-1]


@given(
    every=st.integers(1, 9),
    keep=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_checkpoints_on_the_disk_as_saving_keeps_them(every: int, keep: int, lengths: list[int]) -> None:
    """Played step by step: a save is there before the oldest that may go does."""
    ends = np.cumsum(lengths).tolist()
    there: list[tuple[int, bool]] = []
    most = 0
    for step in range(1, ends[-1] + 1):
        if step % every and step not in ends:
            continue
        there.append((step, step in ends))
        most = max(most, len(there))
        passing = [one for one in there if not one[1]]
        there = [one for one in there if one[1] or one in passing[-keep:]]
    assert checkpoints_kept(CheckpointSection(every=every, keep=keep), ends) == (most, len(there))


def test_sizes_by_hand() -> None:
    """Of a Llama of 8B: 12 bytes a parameter in a checkpoint, 2 in an export, but for the vocabulary's padding."""
    shape = resolve_model(ModelSection(seq_length=8192, preset="llama-8b"), 128256)
    parameters = 8_030_261_248  # huggingface.co/meta-llama/Meta-Llama-3-8B
    model, state = checkpoint_bytes(shape, OptimizerSection(), "bf16")
    padding = 2 * (shape.padded_vocab_size - 128256) * 4096
    tensors = 32 * 9 + 3
    assert model == 4 * (parameters + padding)
    assert state == 8 * (parameters + padding) + 4 * tensors
    assert export_bytes(shape) == 2 * parameters
    assert checkpoint_bytes(shape, OptimizerSection(name="sgd"), "fp64") == (2 * model, 0)
    assert checkpoint_bytes(shape, OptimizerSection(name="sgd", momentum=0.9), "fp32")[1] == model


@pytest.mark.parametrize("pieces", [1, 32, 33, 64, 65, 10_000_000])
def test_epoch_indexes_are_as_their_file_is_laid_out(pieces: int) -> None:
    key = IndexKey("0" * 64, 0, pieces, 1 << 15, 10**12)
    written = 128 + key.entries * key.entry_bytes if pieces > 32 else 0
    assert index_bytes(pieces) == written


def test_planned_sources_are_sized_as_the_writer_writes(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.zeros(1000, dtype=np.uint16))
    written = sum((tmp_path / f"x{suffix}").stat().st_size for suffix in (".bin", ".idx"))
    config = tiny_run.make_run(tmp_path)
    text = config.read_text()
    for name in ("python", "prose"):
        text = text.replace(f'data = ["{tmp_path}/data/{name}"]', 'tokens = "50K"')
    config.write_text(text)
    section = load_config(config)
    run = resolve_run(section)
    shape = resolve_model(section.model, 257, 16)
    plan = disk_plan(shape, section.optimizer, "fp32", section.checkpoint, [24], run.sources, plan_of(run)["sources"])
    assert [(source.data, source.exact) for source in plan.sources] == [(written, False)] * 2
