"""Losses by source from losses by row, gathered from whichever ranks have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.kernels.cross_entropy import IGNORED
from megatron.parallel.mesh import Mesh, sum_over


@dataclass(frozen=True)
class RowLosses:
    """Sum of losses, valid targets and source of every row of a batch, float64 [3, rows]."""

    table: Tensor

    def by_source(self) -> dict[int, tuple[float, int]]:
        """Source id -> (sum of losses in nats, valid targets), added up in the rows' order."""
        sums: dict[int, tuple[float, int]] = {}
        for loss, count, source in self.table.t().tolist():
            before = sums.get(int(source), (0.0, 0))
            sums[int(source)] = (before[0] + loss, before[1] + int(count))
        return dict(sorted(sums.items()))


def valid_targets(mesh: Mesh, targets: Sequence[Tensor]) -> int:
    """Targets of the global batch that count, from those that each data rank was given; added up on the host."""
    place = mesh.place
    speaks = place.tensor == place.context == place.pipeline == 0
    return mesh.sum_on_host([speaks * sum(int((target != IGNORED).sum()) for target in targets)])[0]


def gather_rows(
    mesh: Mesh, rows: int, first: int, targets: Sequence[Tensor], sources: Sequence[Tensor], losses: Tensor | None
) -> RowLosses:
    """The table of a batch of `rows` rows, the same on every rank.

    This rank has the rows from `first` on, whose targets [b, T] and source_ids [b] are given by microbatch. losses:
    their sums over this rank's positions, float64 [n]; None where another pipeline rank holds the head.
    One sum over all ranks: in each sum exactly one rank, or the context ranks with a part each, has something to add,
    so that the order of the ranks changes nothing.
    """
    table = torch.zeros(3, rows, dtype=torch.float64, device=mesh.device)
    place = mesh.place
    own = slice(first, first + sum(target.shape[0] for target in targets))
    if losses is not None and place.tensor == 0:
        table[0, own] = losses.to(table.device)
    if place.tensor == place.context == place.pipeline == 0:
        # What the loader made lies on the host; nobody waits for its copy.
        counts = torch.cat([(target != IGNORED).sum(1) for target in targets])
        table[1, own] = counts.to(table.device, table.dtype, non_blocking=True)
        table[2, own] = torch.cat(list(sources)).to(table.device, table.dtype, non_blocking=True)
    return RowLosses(sum_over(table, mesh.everyone))
