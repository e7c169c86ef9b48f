"""The mesh: every rank finds its place, whatever started it."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout, resolve_layout
from megatron.config.schema import ParallelSection
from megatron.parallel.mesh import close_mesh, launched, open_mesh, sum_over


def places(layout: Layout) -> tuple[object, ...]:
    mesh = open_mesh(layout, launched(), 60)
    sums = []
    for axis in (mesh.pipeline, mesh.data, mesh.context, mesh.tensor):
        ranks = torch.zeros(layout.world_size, dtype=torch.int64)
        ranks[mesh.rank] = 1
        sums.append([rank for rank, there in enumerate(sum_over(ranks, axis).tolist()) if there])
    on_host = mesh.sum_on_host([2**64 - 1, mesh.rank])
    close_mesh()
    return mesh.rank, sums, (mesh.pipeline.rank, mesh.data.rank, mesh.context.rank, mesh.tensor.rank), on_host


@pytest.mark.parametrize(
    "layout", [Layout(2, 1, 2, 1, 2), Layout(1, 2, 2, 1, 1), Layout(1, 2, 1, 2, 1), Layout(1, 1, 1, 1, 3)], ids=str
)
def test_groups_are_those_of_the_layout(layout: Layout) -> None:
    found = run_ranks(layout.world_size, places, layout)
    where = [layout.place_of(rank) for rank in range(layout.world_size)]
    coordinates = [(p.pipeline, p.replicate * layout.shard + p.shard, p.context, p.tensor) for p in where]
    for rank, sums, mine, on_host in found:
        assert mine == coordinates[rank]
        for axis, members in enumerate(sums):
            others = [
                other
                for other, theirs in enumerate(coordinates)
                if all(a == b for number, (a, b) in enumerate(zip(mine, theirs, strict=True)) if number != axis)
            ]
            assert members == others
        assert on_host == [-layout.world_size, sum(range(layout.world_size))]


def test_what_launchers_say() -> None:
    assert launched({}).world_size == 1
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert vars(launched(torchrun)) == {"rank": 3, "world_size": 8, "local_rank": 1, "local_world_size": 2}
    srun = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    srun |= {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    assert vars(launched(srun)) == {"rank": 5, "world_size": 8, "local_rank": 1, "local_world_size": 4}
    # the shell of an allocation has SLURM's variables too, and is one process
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1
    with pytest.raises(ConfigError, match="RANK is 'x'"):
        launched({"RANK": "x"})
    with pytest.raises(ConfigError, match="RANK is 8 and WORLD_SIZE is 8"):
        launched({"RANK": "8", "WORLD_SIZE": "8"})


def test_sizes_that_do_not_divide_show_the_arithmetic() -> None:
    section = ParallelSection(tensor=2, pipeline=3)
    with pytest.raises(ConfigError, match="8 processes are not a multiple of pipeline 3 x context 1 x tensor 2 = 6"):
        resolve_layout(section, 8)
    assert resolve_layout(section, 12) == Layout(3, 2, 1, 1, 2)
    shards = ParallelSection(data_shard="full", data_replicate=2)
    assert resolve_layout(shards, 8) == Layout(1, 2, 4, 1, 1)
    with pytest.raises(ConfigError, match="data_replicate 3 does not divide the data axis of 8"):
        resolve_layout(ParallelSection(data_shard="full", data_replicate=3), 8)
