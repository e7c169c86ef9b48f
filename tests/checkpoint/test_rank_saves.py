"""Checkpoints by several real ranks: any cut is read in any other; a failing or killed rank leaves the old ones."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint.cut_tensors import WAYS, cut, tensors_of
from checkpoint.rank_saves import (
    PHASES_OF_ALL,
    PHASES_OF_RANK_0,
    assert_holds,
    board_here,
    run_to_the_end,
    save_and_tell,
    save_cut,
)
from ranks import run_ranks

from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.checkpoint.manifest import Seal, read_manifest
from megatron.checkpoint.storage import Storage, Tensors, io_errors
from megatron.checkpoint.tensor_shards import whole_shards
from megatron.config.errors import CheckpointError, StagemixError, StorageError


def silent(_: str) -> None:
    raise AssertionError("nothing should have been reported")


def save_every_way(ranks: int, folder: Path) -> list[str]:
    board = board_here(ranks)
    manager = CheckpointManager(folder, len(WAYS), board=board, seconds=60)
    paths = [str(save_cut(manager, board, step, way)) for step, way in enumerate(WAYS, start=1)]
    found = manager.newest_whole(silent)
    assert found is not None and found.step == len(WAYS)
    assert_holds(manager.open(Path(paths[0])), 1)
    return paths


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_cut_is_read_in_any_other(tmp_path: Path, ranks: int) -> None:
    results = run_ranks(ranks, save_every_way, ranks, tmp_path)
    assert all(paths == results[0] for paths in results)
    for step, path in enumerate(results[0], start=1):
        found = open_checkpoint(Path(path))
        assert_holds(found, step)
        source = found.model()
        for others in (1, 2, 3, 4):
            for way in WAYS:
                for rank in range(others):
                    for name, shards in cut(tensors_of(step), way, rank, others).items():
                        for shard in shards:
                            assert source.shape(name) == shard.shape and source.dtype(name) == shard.tensor.dtype
                            read = source.read(name, shard.offset, shard.tensor.shape)
                            assert torch.equal(read, shard.tensor), (name, others, way, rank)


def load_resharded(ranks: int, path: Path, step: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    board_here(ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    expected = {name: tensor.contiguous() for name, tensor in tensors_of(step).items()}
    for dim in (0, 1):
        found = {
            name: distribute_tensor(
                torch.full_like(tensor, 9), mesh, [Shard(dim) if tensor.ndim > dim else Replicate()]
            )
            for name, tensor in expected.items()
        }
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path / "model")))
        for name, tensor in expected.items():
            assert torch.equal(found[name].full_tensor(), tensor), (name, dim)


@pytest.mark.parametrize("ranks", [1, 3])
def test_torch_distributed_checkpoint_reshards_the_same_files(tmp_path: Path, ranks: int) -> None:
    paths = run_ranks(4, save_every_way, 4, tmp_path)[0]
    for step, path in enumerate(paths, start=1):
        run_ranks(ranks, load_resharded, ranks, Path(path), step) if ranks > 1 else load_alone(Path(path), step)


def load_alone(path: Path, step: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    for part, factor, suffix in (("model", 1, ""), ("optimizer", 2, "/exp_avg")):
        expected = {name + suffix: tensor * factor for name, tensor in tensors_of(step).items()}
        found = {name: torch.full_like(tensor, 9) for name, tensor in expected.items()}
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path / part)), no_dist=True)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class FailingStorage(Storage):
    """No room for tensors."""

    def write_tensors(self, path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Seal:
        with io_errors(path, "write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_with_failing(ranks: int, folder: Path, failing: int, asynchronous: bool) -> str:
    board = board_here(ranks)
    storage = FailingStorage() if board.rank == failing else Storage()
    manager = CheckpointManager(folder, board=board, storage=storage, seconds=60)
    try:
        save_cut(manager, board, 2, "rows", asynchronous=asynchronous)
        manager.finish()
    except StorageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_cannot_write_is_named_by_all(tmp_path: Path, failing: int, asynchronous: bool) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, whole_shards(tensors_of(1)), {}, {"cpu": torch.zeros(1)}, {"step": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words in run_ranks(3, save_with_failing, 3, tmp_path, failing, asynchronous):
        assert f"rank {failing}: " in words and f"model-0000{failing}-of-00003" in words and "No space left" in words
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001"]


def save_wrong(ranks: int, folder: Path, wrong: str) -> str:
    board = board_here(ranks)
    manager = CheckpointManager(folder, board=board, seconds=60)
    shards = cut(tensors_of(1), "rows", board.rank, board.size)
    if board.rank == 1:
        if wrong == "gap":
            del shards["layers.0.weight"]
        elif wrong == "overlap":
            shards["layers.0.weight"] = cut(tensors_of(1), "rows", 0, board.size)["layers.0.weight"]
        else:
            held = shards["layers.0.weight"][0]
            shards["layers.0.weight"] = [type(held)(held.tensor.double(), held.shape, held.offset)]
    state = {"step": float("nan") if wrong == "state" and board.rank == 0 else 1}
    try:
        manager.save(1, shards, {}, {"cpu": torch.zeros(1)}, state)
    except (StagemixError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    "wrong, expected",
    [("gap", "none holds the one at [4, 0]"), ("overlap", "overlap"), ("dtype", "found one of F64")],
)
def test_shards_that_do_not_fit_are_never_published(tmp_path: Path, wrong: str, expected: str) -> None:
    for words in run_ranks(2, save_wrong, 2, tmp_path, wrong):
        assert words.startswith("CheckpointError") and "layers.0.weight" in words and expected in words
    assert not list(tmp_path.iterdir())


def test_a_bug_on_one_rank_ends_the_save_on_all(tmp_path: Path) -> None:
    mine, other = run_ranks(2, save_wrong, 2, tmp_path, "state")
    assert mine.startswith("ValueError: Out of range float")
    assert other.startswith("StorageError: ValueError: Out of range float")
    assert not list(tmp_path.iterdir())


def adopt(ranks: int, folder: Path, foreign: Path, broken: Path | None) -> str:
    """broken: a file that changes after the checkpoint was found whole."""
    board = board_here(ranks)
    manager = CheckpointManager(folder, board=board, seconds=60)
    found = manager.open(foreign)
    if broken and board.rank == 0:
        broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    torch.distributed.barrier()
    try:
        manager.adopt(found)
    except CheckpointError as error:
        return str(error)
    assert_holds(manager.newest_whole(silent), 3)
    return ""


def test_a_foreign_checkpoint_is_adopted_file_by_file(tmp_path: Path) -> None:
    foreign = Path(run_ranks(4, save_every_way, 4, tmp_path / "foreign")[0][2])
    assert run_ranks(2, adopt, 2, tmp_path / "own", foreign, None) == ["", ""]
    copy = tmp_path / "own" / "step-000000003"
    for path in foreign.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (copy / path.relative_to(foreign)).read_bytes() == path.read_bytes()
    for broken in sorted((foreign / "optimizer").iterdir())[:2]:
        content = broken.read_bytes()
        for words in run_ranks(2, adopt, 2, tmp_path / "other", foreign, broken):
            assert f"{broken}: expected" in words
        assert not list((tmp_path / "other").iterdir())
        broken.write_bytes(content)


def find_among_damaged(ranks: int, folder: Path) -> tuple[int, list[str], str]:
    board = board_here(ranks)
    manager = CheckpointManager(folder, board=board, seconds=60)
    reports: list[str] = []
    try:
        found = manager.newest_whole(reports.append)
    except CheckpointError as error:
        return 0, reports, str(error)
    return found.step if found else -1, reports, ""


def test_all_ranks_pass_over_what_any_finds_damaged(tmp_path: Path) -> None:
    """Each rank reads its share only; the verdict is that of all, and rank 0 reports it."""
    paths = [Path(path) for path in run_ranks(2, save_every_way, 2, tmp_path)[0]]
    for number, path in enumerate(paths[2:]):
        file = path / sorted(read_manifest(path)["files"])[number]  # of the share of rank 0, then of 1, and so on
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    (zero, reports, _), (one, nothing, _) = run_ranks(2, find_among_damaged, 2, tmp_path)
    assert zero == one == 2 and len(reports) == len(paths) - 2 and not nothing
    for path in paths[:2]:
        (path / "state.json").unlink()
    for step, _, words in run_ranks(2, find_among_damaged, 2, tmp_path):
        assert step == 0 and f"none of its {len(paths)} checkpoints is whole" in words


KILLS = [(1, phase) for phase in PHASES_OF_ALL] + [(0, phase) for phase in PHASES_OF_ALL + PHASES_OF_RANK_0]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("victim, phase", KILLS)
def test_C1_a_rank_killed_at_any_phase_leaves_a_whole_checkpoint(
    tmp_path: Path, victim: int, phase: str, asynchronous: bool
) -> None:
    alone = CheckpointManager(tmp_path, keep=2)
    for step in (1, 2):
        alone.save(step, whole_shards(tensors_of(step)), {}, {"cpu": torch.arange(step)}, {"step": step})
    bound = 1.0
    results = run_to_the_end(3, save_and_tell, 3, tmp_path, 3, "grid", victim, phase, asynchronous, bound)
    assert results[victim] is None, "the victim lives"
    newest = CheckpointManager(tmp_path).newest_whole(silent)
    assert newest is not None and newest.step in (2, 3)
    if newest.step == 3:
        assert_holds(newest, 3)
    else:
        assert torch.equal(newest.model().whole("counts"), tensors_of(2)["counts"])
        assert open_checkpoint(tmp_path / "step-000000001").step == 1
    assert (newest.step == 3) == (phase in ("after the rename", "retiring")) or (victim, phase) == (1, "after posting")
    for rank, result in enumerate(results):
        if rank != victim:
            words, seconds = result
            assert seconds < 3 * bound + 5
            if words == "saved":
                assert newest.step == 3
            else:
                assert words.startswith("StorageError") and str(tmp_path) in words and f"rank {victim} did not" in words
    # The next save, by a job that has begun again, sweeps what the killed one left.
    run_ranks(2, save_and_tell, 2, tmp_path, 4, "rows", -1, "", asynchronous, 60)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000004"]
    assert_holds(CheckpointManager(tmp_path).newest_whole(silent), 4)
