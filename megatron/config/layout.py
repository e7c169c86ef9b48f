"""The layout of a run over its ranks: sizes of the axes and each rank's place on them. Free of torch.

Axes, outermost first: pipeline x data (replicate x shard) x context x tensor. The innermost axis talks most, so that
neighbouring ranks, which share a node, form a tensor group.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.errors import ConfigError
from megatron.config.schema import ParallelSection


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; `world_size` is their product.

    replicate x shard is the data axis: parameters (or only their optimizer state, by `parallel.data_shard`) are cut
    over `shard` ranks, and `replicate` such groups hold the same.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pipeline * self.data * self.context * self.tensor

    def place_of(self, rank: int) -> Place:
        """A rank's coordinates."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        rest, shard = divmod(rest, self.shard)
        pipeline, replicate = divmod(rest, self.replicate)
        return Place(pipeline, replicate, shard, context, tensor)

    def words(self) -> str:
        """For people: "pipeline 2 x data 4 x tensor 2", axes of one rank left out."""
        axes = {"pipeline": self.pipeline, "data": self.data, "context": self.context, "tensor": self.tensor}
        return " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one process"


@dataclass(frozen=True)
class Place:
    """Coordinates of one rank, each from 0 to below its axis's size."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int


def resolve_layout(section: ParallelSection, world_size: int) -> Layout:
    """The layout of `[parallel]` over `world_size` ranks; what the named axes leave is the data axis.

    Raises ConfigError with the arithmetic where sizes do not divide.
    """
    model_ranks = section.pipeline * section.context * section.tensor
    product = f"pipeline {section.pipeline} x context {section.context} x tensor {section.tensor} = {model_ranks}"
    if world_size % model_ranks:
        raise ConfigError(
            f"{world_size} processes are not a multiple of {product}: start {model_ranks} or a multiple of it "
            "(torchrun --nproc-per-node, or srun --ntasks), or change [parallel]"
        )
    data = world_size // model_ranks
    if section.data_shard == "none":
        return Layout(section.pipeline, data, 1, section.context, section.tensor)
    if data % section.data_replicate:
        raise ConfigError(
            f"parallel.data_replicate {section.data_replicate} does not divide the data axis of {data} ranks "
            f"({world_size} processes / ({product})): set it to a divisor of {data}"
        )
    shard = data // section.data_replicate
    return Layout(section.pipeline, section.data_replicate, shard, section.context, section.tensor)
