"""A message of a training step: between whom, of how many bytes, how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AxisName = Literal["tensor", "context", "pipeline", "data", "everyone"]
Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]
Beside = Literal["", "input gradients", "weight gradients", "forward", "backward"]


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other. size: how many. per_node: how many of them share a node (all, where the group lies
    inside one)."""

    size: int
    per_node: int

    @property
    def inside_node(self) -> bool:
        """Whether nothing leaves the node."""
        return self.per_node >= self.size


def group_of(size: int, stride: int, processes_per_node: int) -> Group:
    """`size` ranks, every stride-th, the first at a multiple of their whole span or at an offset within the stride.

    Ranks are numbered as nodes are filled (`config/layout.py`: pipeline outermost, then data, context, tensor). A span
    that does not divide the node straddles two somewhere: then as many are counted together as surely are.
    """
    span = size * stride
    if span <= processes_per_node and processes_per_node % span == 0:
        return Group(size, size)
    return Group(size, max(1, min(size - 1, processes_per_node // stride)))


@dataclass(frozen=True)
class Volume:
    """One kind of message of one axis. whole: bytes of the tensor that is gathered, summed, exchanged (each rank's own)
    or sent. count: how often in a step. beside: what computation it runs beside, "" for none: then somebody waits.
    parts: in how many messages the tensor goes."""

    axis: AxisName
    kind: Kind
    whole: int
    count: int
    group: Group
    beside: Beside = ""
    parts: int = 1

    @property
    def bytes_each(self) -> float:
        """That a rank sends each time, by a ring (an all-reduce of n ranks: 2 (n - 1) / n of the tensor)."""
        share = (self.group.size - 1) / self.group.size
        return self.whole * {"all-reduce": 2 * share, "send": 1.0}.get(self.kind, share)

    @property
    def bytes_a_rank(self) -> float:
        """That a rank sends in a step."""
        return self.count * self.bytes_each

    @property
    def inside_node(self) -> bool:
        """Whether nothing of it leaves the node."""
        return self.group.inside_node
