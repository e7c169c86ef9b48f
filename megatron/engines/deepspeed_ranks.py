"""Which ranks DeepSpeed is told to be one of: its `mpu`, made from our mesh."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron.parallel.axis import Axis
from megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class DeepSpeedRanks:
    """data: the ranks that gradients are summed over and ZeRO cuts over, context ranks among them. model: the ranks
    that share one copy of the model, tensor and pipeline ranks alike, over which norms are summed. tensor: this rank's
    number on the tensor axis; of parameters that are not cut, number 0's count in the norm.

    Every group is a real one, of one rank where need be: DeepSpeed takes None for the world.
    """

    data: Axis
    model: Axis
    tensor: int

    @classmethod
    def of(cls, mesh: Mesh) -> DeepSpeedRanks:
        """Made by all ranks together."""
        return cls(_data_axis(mesh), _model_axis(mesh), mesh.tensor.rank)

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """DeepSpeed asks by these names."""
        return self.data.group

    def get_data_parallel_world_size(self) -> int:
        """Ranks of the data group."""
        return self.data.size

    def get_data_parallel_rank(self) -> int:
        """This rank's number there."""
        return self.data.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that norms are summed over."""
        return self.model.group

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self.model.size

    def get_model_parallel_rank(self) -> int:
        """Not the number in that group: whether it is 0 decides who counts parameters that are not cut."""
        return self.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        """The same question by its newer name."""
        return self.tensor


def _alone() -> Axis:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return Axis(0, 1, group)


def _data_axis(mesh: Mesh) -> Axis:
    if mesh.shards is None:
        return _alone()
    name = "shards" if mesh.shards["shards"].size() > 1 or mesh.shards.ndim == 1 else "replicas"
    part = mesh.shards[name]
    return Axis(part.get_local_rank(), part.size(), part.get_group())


def _model_axis(mesh: Mesh) -> Axis:
    """Of every data and context rank, the tensor and pipeline ranks that hold its copy of the model between them."""
    if mesh.pipeline.alone:
        return _alone() if mesh.tensor.alone else mesh.tensor
    if mesh.tensor.alone:
        return mesh.pipeline
    mine = replace(mesh.place, pipeline=0, tensor=0)
    ranks = range(mesh.world_size)
    model = [rank for rank in ranks if replace(mesh.layout.place_of(rank), pipeline=0, tensor=0) == mine]
    group = dist.new_group(model, timeout=mesh.limit, use_local_synchronization=True)
    return Axis(model.index(mesh.rank), len(model), group)
