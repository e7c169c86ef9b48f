"""One axis of the layout as a rank sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """This rank's number on the axis, the axis's size, and its process group; None where it is alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.size == 1


ALONE = Axis()
