"""A step's numbers over all ranks, and whether any rank was asked to stop: one small sum on the host a step."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

from megatron.parallel.mesh import Mesh
from megatron.trainer.signals import HANDLED
from megatron.trainer.state import BatchLike

_WORD = 2**64 - 1
_MANY = 2**20
"""More than there are ranks: requests by signal are counted in digits of this base."""

B = TypeVar("B", bound=BatchLike)


class OverRanks(Protocol):
    """Called by all ranks at the same places. Signals are names; empty: none."""

    def stop_asked(self, signal_name: str) -> str:
        """The signal by which any rank was asked to stop."""

    def end_of_step(self, batch: B, signal_name: str) -> tuple[B, str]:
        """The batch with the global batch's digest and sums, and what `stop_asked` gives."""


class OneRank:
    """One process: its numbers are the global ones."""

    def stop_asked(self, signal_name: str) -> str:
        """The process's own."""
        return signal_name

    def end_of_step(self, batch: B, signal_name: str) -> tuple[B, str]:
        """As they are."""
        return batch, signal_name


class AllRanks:
    """Sums over a mesh. Each data rank counts once, through the first of the ranks that read the same rows; all of
    these are compared: RuntimeError names those that read something else."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        place = mesh.place
        self._counts = place.pipeline == place.context == place.tensor == 0
        self._alike = mesh.world_size // mesh.layout.data

    def stop_asked(self, signal_name: str) -> str:
        """The first of the handled signals, in their order, that any rank was sent."""
        return self._first_of(self._mesh.sum_on_host([_digit_of(signal_name)])[0])

    def end_of_step(self, batch: B, signal_name: str) -> tuple[B, str]:
        """The global numbers. Raises RuntimeError where ranks of one data rank read different rows."""
        part = cast(Any, batch)
        mine = [int(part.digest, 16), *part.loaded, part.valid_targets]
        counted = [number if self._counts else 0 for number in mine]
        *sums, asked = self._mesh.sum_on_host([*counted, *mine, _digit_of(signal_name)])
        whole, all_ranks = sums[: len(mine)], sums[len(mine) :]
        if any((alike - self._alike * one) & _WORD for one, alike in zip(whole, all_ranks, strict=True)):
            self._name_who_differs(mine)
        digest, first, second, valid = (number & _WORD for number in whole)
        full = replace(part, digest=f"{digest:016x}", loaded=(first, second), valid_targets=valid)
        return full, self._first_of(asked)

    def _name_who_differs(self, mine: list[int]) -> None:
        mesh, size = self._mesh, self._mesh.world_size
        table = mesh.sum_on_host([mine[0] if rank == mesh.rank else 0 for rank in range(size)])
        places = [mesh.layout.place_of(rank) for rank in range(size)]
        by_data_rank: dict[tuple[int, int], int] = {}
        different = []
        for rank, place in enumerate(places):
            first = by_data_rank.setdefault((place.replicate, place.shard), rank)
            if table[rank] != table[first]:
                different.append(f"rank {rank} read something else than rank {first}")
        raise RuntimeError(
            f"ranks that share a data rank must read the same samples: {'; '.join(different) or 'sums differ'}: "
            "nothing was saved since; go on from the last checkpoint, and report this"
        )

    @staticmethod
    def _first_of(total: int) -> str:
        for place, number in enumerate(HANDLED):
            if total // _MANY**place % _MANY:
                return number.name
        return ""


def _digit_of(signal_name: str) -> int:
    return _MANY ** HANDLED.index(signal.Signals[signal_name]) if signal_name else 0
