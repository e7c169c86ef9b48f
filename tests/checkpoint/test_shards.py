"""Shards on the disk: covered exactly once, found out where not, written without a second copy, read by the box."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.cut_tensors import WAYS, cut, tensors_of
from safetensors import safe_open

from megatron.checkpoint import shard_files
from megatron.checkpoint.coverage import Box, fault_in_cover
from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.checkpoint.manifest import manifest_bytes, read_manifest
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.tensor_shards import TensorShard, whole_shards
from megatron.config.errors import CheckpointError


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(begin, begin + n) for begin, n in zip(*box, strict=True))))


def test_coverage_agrees_with_counting_every_element() -> None:
    """Random boxes in small tensors of 0 to 3 dimensions; the definition itself is the judge."""
    draw = random.Random(5)
    seen = {"covered": 0, "overlap": 0, "gap": 0}
    for _ in range(3000):
        shape = tuple(draw.randint(1, 3) for _ in range(draw.randint(0, 3)))
        if draw.random() < 0.5:
            rank_boxes = [
                shard
                for rank in range(3)
                for shard in cut({"t": torch.zeros(shape)}, draw.choice(WAYS), rank, 3).get("t", [])
            ]
            boxes: list[Box] = [(shard.offset, tuple(shard.tensor.shape)) for shard in rank_boxes]
        else:
            boxes = []
            for _ in range(draw.randint(0, 4)):
                begin = tuple(draw.randint(0, n - 1) for n in shape)
                boxes.append((begin, tuple(draw.randint(0, n - b) for n, b in zip(shape, begin, strict=True))))
        held = [cell for box in boxes for cell in cells(box)]
        fault = fault_in_cover(shape, boxes)
        if len(held) > len(set(held)):
            kind = "overlap"
            one, other = (int(number) for number in re.findall(r"shards (\d+) and (\d+) overlap", fault or "")[0])
            assert cells(boxes[one]) & cells(boxes[other])
        elif set(held) != cells(((0,) * len(shape), shape)):
            kind = "gap"
            first = min(cells(((0,) * len(shape), shape)) - set(held))
            assert fault is not None and fault.endswith(f"the one at {list(first)}"), (shape, boxes, fault)
        else:
            kind = "covered"
            assert fault is None
        seen[kind] += 1
    assert min(seen.values()) > 100, seen


def test_boxes_out_of_bounds_or_of_other_dimensions() -> None:
    assert "beyond" in (fault_in_cover((3,), [((1,), (3,))]) or "")
    assert "beyond" in (fault_in_cover((3,), [((-1,), (3,))]) or "")
    assert "dimensions" in (fault_in_cover((3,), [((0, 0), (3, 1))]) or "")
    assert fault_in_cover((0, 5), [((0, 0), (0, 5)), ((0, 0), (0, 5))]) is None


def saved_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One process with cut tensors: the two halves of each lie in different files."""
    monkeypatch.setattr(shard_files, "FILE_BYTES", 150)
    halves = [cut(tensors_of(1), "rows", rank, 2) for rank in range(2)]
    shards = {name: [*halves[0].get(name, []), *halves[1].get(name, [])] for name in tensors_of(1)}
    return CheckpointManager(folder).save(1, shards, {}, {"cpu": torch.zeros(1)}, {"step": 1})


def test_shards_of_one_rank_go_to_bounded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_in_parts(tmp_path, monkeypatch)
    files = sorted((path / "model").iterdir())
    assert [file.name for file in files] == [f"model-00000-of-00001-{n:05d}.safetensors" for n in range(len(files))]
    assert len(files) >= 4
    for file in files:
        with safe_open(file, framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118 (not a dict)
            assert sum(sizes) <= 150 or len(sizes) == 1
    found = open_checkpoint(path).model().all()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(1).items())


def test_whole_tensors_of_one_process_are_plain_files(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path).save(1, whole_shards(tensors_of(1)), {}, {"cpu": torch.zeros(1)}, {})
    with safe_open(path / "model" / "model-00000-of-00001-00000.safetensors", framework="pt") as opened:
        assert not opened.metadata() and set(opened.keys()) == set(tensors_of(1))


def plant(path: Path, change: Any) -> None:
    manifest = read_manifest(path)
    change(manifest["tensors"]["model"]["layers.0.weight"]["shards"], manifest)
    (path / "manifest.json").write_bytes(manifest_bytes(manifest))


def test_gaps_and_overlaps_in_a_manifest_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_in_parts(tmp_path, monkeypatch)
    original = (path / "manifest.json").read_bytes()
    for change, expected in (
        (lambda shards, _: shards.pop(), "none holds the one at [4, 0]"),
        (lambda shards, _: shards.clear(), "has no shard"),
        (lambda shards, _: shards.append(dict(shards[0])), "shards 0 and 2 overlap"),
        (lambda shards, _: shards[1].update(offset=[3, 0]), "shards 0 and 1 overlap"),
        (lambda shards, _: shards[1].update(offset=[5, 0]), "reaches beyond"),
        (lambda shards, _: shards[1].update(file="model/other.safetensors"), "model/other.safetensors"),
        (lambda shards, _: shards[1].pop("offset"), "offset"),
        (lambda shards, _: shards[1].update(offset=["a", 0]), "expected shards"),
    ):
        plant(path, change)
        with pytest.raises(CheckpointError, match="layers.0.weight") as error:
            open_checkpoint(path)
        assert expected in str(error.value)
        (path / "manifest.json").write_bytes(original)
    open_checkpoint(path)


def test_a_manifest_that_agrees_with_itself_and_not_with_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped shards cover the tensor as well: only the files tell."""
    path = saved_in_parts(tmp_path, monkeypatch)

    def swap(shards: list[dict[str, Any]], _: Any) -> None:
        shards[0]["file"], shards[1]["file"] = shards[1]["file"], shards[0]["file"]

    plant(path, swap)
    with pytest.raises(CheckpointError, match="tensor layers.0.weight: expected"):
        open_checkpoint(path)


def test_a_missing_last_shard_is_found_even_where_files_and_manifest_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's reader would take the tensor for a smaller one. The shape of the whole is in every shard's file."""
    path = saved_in_parts(tmp_path, monkeypatch)

    def forget(shards: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
        shards.pop()
        manifest["tensors"]["model"]["layers.0.weight"]["shape"] = [4, 5]

    plant(path, forget)
    with pytest.raises(CheckpointError, match="layers.0.weight"):
        open_checkpoint(path)


def test_missing_and_stray_shard_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved_in_parts(tmp_path, monkeypatch)
    file = sorted((path / "model").iterdir())[1]
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        open_checkpoint(path)
    file.write_bytes(content)
    stray = file.with_name("model-00001-of-00002-00000.safetensors")
    stray.write_bytes(content)
    with pytest.raises(CheckpointError, match=stray.name):
        open_checkpoint(path)
    stray.unlink()
    open_checkpoint(path)


def test_a_format_of_another_version_is_named(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path).save(1, whole_shards(tensors_of(1)), {}, {"cpu": torch.zeros(1)}, {})
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(manifest_bytes({**manifest, "format": 1}))
    with pytest.raises(CheckpointError, match="expected format 2, found 1"):
        open_checkpoint(path)


def test_reading_beyond_a_tensor_is_refused(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path).save(1, whole_shards(tensors_of(1)), {}, {"cpu": torch.zeros(1)}, {})
    source = open_checkpoint(path).model()
    for offset, shape in (((6, 0), (2, 5)), ((-1, 0), (1, 5)), ((0,), (7,))):
        with pytest.raises(ValueError, match="layers.0.weight"):
            source.read("layers.0.weight", offset, shape)
    with pytest.raises(KeyError):
        source.whole("nothing")


def peak_of(action: Any) -> int:
    """Bytes by which the process's memory grew at most while `action` ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    action()
    return (int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) - before) * 1024


def _peaks_of_saves(folder: Path) -> tuple[int, int]:
    """Peaks of a synchronous and an asynchronous save of views that must be copied to be written, 4 of 64 MB."""
    tensors = {f"t{number}": torch.randn(4096, 4096).t() for number in range(4)}
    manager = CheckpointManager(folder)

    def save(asynchronous: bool) -> None:
        manager.save(1, whole_shards(tensors), {}, {"cpu": torch.zeros(1)}, {}, asynchronous=asynchronous)
        manager.finish()

    save(False)
    return peak_of(lambda: save(False)), peak_of(lambda: save(True))


def test_writing_holds_no_second_copy_of_the_tensors(tmp_path: Path) -> None:
    """In a process of its own: one that has trained keeps the memory it has freed, which hides what is taken anew."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        before, beside = fresh.submit(_peaks_of_saves, tmp_path).result()
    one = 64 * 2**20
    assert before < 1.5 * one
    assert beside > 3.5 * one, "the measure sees no copies"


def test_a_mapping_is_read_once_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards made as they are asked for need memory for the file that is being filled only."""
    monkeypatch.setattr(shard_files, "FILE_BYTES", 250)
    made: list[str] = []
    written: list[set[str]] = []

    class Lazy(dict[str, list[TensorShard]]):
        def __getitem__(self, name: str) -> list[TensorShard]:
            made.append(name)
            return [TensorShard.whole(torch.ones(30))]

    class Watching(Storage):
        def write_tensors(self, path: Path, tensors: Any, metadata: Any = None) -> Any:
            written.append(set(made))
            return super().write_tensors(path, tensors, metadata)

    names = [f"n{number}" for number in range(6)]
    manager = CheckpointManager(tmp_path, storage=Watching())
    manager.save(1, Lazy.fromkeys(names, []), {}, {"cpu": torch.zeros(1)}, {})
    assert made == names and [len(some) for some in written[:3]] == [3, 5, 6]
