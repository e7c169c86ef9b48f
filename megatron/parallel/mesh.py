"""Where this process stands among the ranks. Here, and in megatron/launch, the environment is read; nowhere else."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron.config.errors import ConfigError, UnavailableError
from megatron.config.layout import Layout, Place
from megatron.parallel.axis import ALONE, Axis


@dataclass(frozen=True)
class Launched:
    """What a launcher said of this process. local_*: among the processes of its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def host_name() -> str:
    """This machine's name, for messages and records: in a job step of SLURM its own name for the node, which is what a
    list of nodes to leave out takes."""
    return (os.environ.get("SLURMD_NODENAME") if "SLURM_STEP_ID" in os.environ else None) or socket.gethostname()


LAUNCHERS: tuple[tuple[str, tuple[str, str, str, str]], ...] = (
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    ("srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")),
)
"""Variables by launcher, the first whose rank is set; the deepspeed launcher sets torchrun's."""


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """This process's numbers from its launcher's variables; one process where there is no launcher.

    srun's count only inside a job step of several tasks: an allocation's shell has them too. Raises ConfigError.
    """
    found = os.environ if environment is None else environment
    for launcher, names in LAUNCHERS:
        if names[0] not in found or (launcher == "srun" and not _in_a_job_step(found)):
            continue
        rank, world, local_rank = _number(found, names[0], 0), _number(found, names[1], 1), _number(found, names[2], 0)
        local = found.get(names[3], "")
        local_world = int(local) if local.isdecimal() else _tasks_on_this_node(found, world)
        if rank >= world:
            raise ConfigError(f"{names[0]} is {rank} and {names[1]} is {world}: ranks count from 0 to {world - 1}")
        return Launched(rank, world, local_rank, local_world)
    return Launched()


def _in_a_job_step(found: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in found and found.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _tasks_on_this_node(found: Mapping[str, str], world: int) -> int:
    nodes = found.get("SLURM_STEP_NUM_NODES", "1")
    return max(1, world // int(nodes)) if nodes.isdecimal() and int(nodes) else world


def _number(found: Mapping[str, str], name: str, default: int) -> int:
    words = found.get(name, str(default))
    if not words.isdecimal():
        raise ConfigError(f"environment variable {name} is {words!r}, a whole number is needed: unset it or start anew")
    return int(words)


@dataclass(frozen=True)
class Mesh:
    """One rank's place on every axis, made once. device is where its model lives.

    everyone: all ranks. shards: the mesh that parameters are cut over, [replicas, shards], context ranks among them;
    None for one process. host: all ranks on gloo, for small sums of host numbers. store: for words between ranks.
    limit: the bound of any collective; None where torch's default holds.
    """

    layout: Layout
    rank: int
    device: torch.device
    place: Place
    everyone: Axis = ALONE
    pipeline: Axis = ALONE
    data: Axis = ALONE
    context: Axis = ALONE
    tensor: Axis = ALONE
    shards: DeviceMesh | None = None
    host: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    limit: timedelta | None = None

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.layout.world_size

    def sum_on_host(self, numbers: Sequence[int]) -> list[int]:
        """The numbers summed over all ranks, modulo 2^64 as signed; on the host, so that no device waits."""
        if self.host is None:
            return list(numbers)
        total = torch.tensor([_signed(number) for number in numbers], dtype=torch.int64)
        dist.all_reduce(total, group=self.host)
        return [int(number) for number in total.tolist()]


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def one_process_mesh(device: torch.device | None = None) -> Mesh:
    """The mesh of a process without others."""
    return Mesh(Layout(), 0, device or local_device(0), Layout().place_of(0))


def local_device(local_rank: int) -> torch.device:
    """The device of a process by its number on the node: a GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and "SLURM_STEP_ID" in os.environ:
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each process its own only
    if local_rank >= torch.cuda.device_count():
        raise UnavailableError(
            f"process {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; start at most so "
            "many processes a node"
        )
    return torch.device("cuda", local_rank)


def open_mesh(layout: Layout, who: Launched, limit_seconds: int = 600) -> Mesh:
    """Joins the other processes and finds this one's place. One process needs no others and opens no port.

    limit_seconds: the bound of joining, and of any collective afterwards.
    """
    device = local_device(who.local_rank)
    if layout.world_size == 1:
        return one_process_mesh(device)
    limit = timedelta(seconds=limit_seconds)
    if device.type == "cuda":
        # Without device_id: it would make NCCL take pipeline sends one after the other with everything else.
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    address = _rendezvous()
    dist.init_process_group(backend, init_method=address, rank=who.rank, world_size=who.world_size, timeout=limit)
    return mesh_of_group(layout, device, limit)


def _rendezvous() -> str:
    """torchrun's variables hold the address; srun gives none, so the batch script does."""
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ConfigError(
            "several processes were started, and MASTER_ADDR and MASTER_PORT do not say where they meet: "
            "export them in the batch script (the first node's name and a free port), or start with torchrun"
        )
    return "env://"


def state_local_rank() -> None:
    """DeepSpeed takes its process's number on the node from LOCAL_RANK, which neither srun nor a plain start sets."""
    os.environ.setdefault("LOCAL_RANK", str(launched().local_rank))


def mesh_of_group(layout: Layout, device: torch.device, limit: timedelta | None = None) -> Mesh:
    """The mesh over the process group that is already there. limit: the bound of any collective of any axis."""
    rank, kind = dist.get_rank(), device.type
    sizes = (layout.pipeline, layout.replicate, layout.shard, layout.context, layout.tensor)
    full = init_device_mesh(kind, sizes, mesh_dim_names=("pipeline", "replicate", "shard", "context", "tensor"))
    data = full["replicate", "shard"]._flatten("data") if layout.data > 1 else None
    # Each context rank has a part of every sample: it is a data rank to the sum of gradients.
    replicas, shards = layout.replicate, layout.shard * layout.context
    if layout.shard == 1:
        replicas, shards = layout.replicate * layout.context, 1
    cut = init_device_mesh(
        kind, (layout.pipeline, replicas, shards, layout.tensor), mesh_dim_names=("stages", "replicas", "shards", "cut")
    )
    if limit is not None:
        for mesh in (full, cut, *([data] if data is not None else [])):
            _bound(mesh, limit)
    return Mesh(
        layout=layout,
        rank=rank,
        device=device,
        place=layout.place_of(rank),
        everyone=Axis(rank, layout.world_size, dist.group.WORLD),
        pipeline=_axis(full, "pipeline", layout.pipeline),
        data=Axis(data.get_local_rank(), layout.data, data.get_group()) if data is not None else ALONE,
        context=_axis(full, "context", layout.context),
        tensor=_axis(full, "tensor", layout.tensor),
        shards=cut["shards"] if replicas == 1 else cut["replicas", "shards"],
        host=dist.group.WORLD,
        store=dist.distributed_c10d._get_default_store(),
        limit=limit,
    )


def _bound(mesh: DeviceMesh, limit: timedelta) -> None:
    """Gives the groups of a mesh the time limit of the whole job; torch makes them with half an hour."""
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(limit, group)


def _axis(mesh: DeviceMesh, name: str, size: int) -> Axis:
    return Axis(mesh.get_local_rank(name), size, mesh.get_group(name)) if size > 1 else ALONE


def sum_over(tensor: Tensor, axis: Axis) -> Tensor:
    """The tensor summed over an axis, in place."""
    if not axis.alone:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def sum_over_ends(tensor: Tensor, pipeline: Axis) -> None:
    """On the first and the last rank of a pipeline: the sum of both ranks' tensors, in place; the rest do nothing.

    The two swap tensors and add, which gives both the same bits. They need no group of their own: at a thousand ranks
    that would be hundreds of them.
    """
    if pipeline.alone or pipeline.rank not in (0, pipeline.size - 1):
        return
    other, arriving = pipeline.size - 1 - pipeline.rank, torch.empty_like(tensor)
    kept = tensor.contiguous()
    swap = [
        dist.P2POp(dist.isend, kept, group=pipeline.group, group_peer=other),
        dist.P2POp(dist.irecv, arriving, group=pipeline.group, group_peer=other),
    ]
    for work in dist.batch_isend_irecv(swap):
        work.wait()
    tensor.add_(arriving)


def close_mesh() -> None:
    """Leaves the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
