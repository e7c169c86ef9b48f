"""A step's numbers over all ranks, and what any rank was asked by now: one small sum on the host a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

from megatron.parallel.mesh import Mesh
from megatron.trainer.decisions import Decision, decision_of
from megatron.trainer.state import BatchLike

_WORD = 2**64 - 1
_MANY = 2**20
"""More than there are ranks: what they were asked is counted in digits of this base."""
_DIGITS = 3
"""Of a number of the sum."""

B = TypeVar("B", bound=BatchLike)


class OverRanks(Protocol):
    """Called by all ranks at the same places. asked: what this one was asked, see `stopping`."""

    def decide(self, asked: Sequence[str]) -> Decision:
        """What all ranks do."""

    def end_of_step(self, batch: B, asked: Sequence[str], skipped: int = 0) -> tuple[B, Decision]:
        """The batch with the global batch's digest and sums, and what `decide` gives. skipped: steps that this rank
        has seen to make no update, which must be as many on all."""


class OneRank:
    """One process: its numbers are the global ones, and what it is asked is decided."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self._reasons = reasons

    def decide(self, asked: Sequence[str]) -> Decision:
        """As it was asked."""
        return decision_of(asked, self._reasons)

    def end_of_step(self, batch: B, asked: Sequence[str], skipped: int = 0) -> tuple[B, Decision]:
        """The batch as it is."""
        return batch, decision_of(asked, self._reasons)


class AllRanks:
    """Sums over a mesh. Each data rank counts once, through the first of the ranks that read the same rows; all of
    these are compared: RuntimeError names those that read something else."""

    def __init__(self, mesh: Mesh, reasons: Sequence[str]) -> None:
        """reasons: all that a rank may be asked by, the one that counts first."""
        self._mesh, self._reasons = mesh, tuple(reasons)
        place = mesh.place
        self._counts = place.pipeline == place.context == place.tensor == 0
        self._alike = mesh.world_size // mesh.layout.data

    def decide(self, asked: Sequence[str]) -> Decision:
        """From what any rank was asked."""
        return self._decided(self._mesh.sum_on_host(self._counted(asked)))

    def end_of_step(self, batch: B, asked: Sequence[str], skipped: int = 0) -> tuple[B, Decision]:
        """The global numbers. Raises RuntimeError where ranks of one data rank read different rows, or ranks differ in
        what they left without an update: their weights would have parted."""
        part = cast(Any, batch)
        mine = [int(part.digest, 16), *part.loaded, part.valid_targets]
        counted = [number if self._counts else 0 for number in mine]
        sums = self._mesh.sum_on_host([*counted, *mine, skipped, *self._counted(asked)])
        whole, all_ranks = sums[: len(mine)], sums[len(mine) : 2 * len(mine)]
        together, *votes = sums[2 * len(mine) :]
        if any((alike - self._alike * one) & _WORD for one, alike in zip(whole, all_ranks, strict=True)):
            self._name_who_differs(mine)
        if together != self._mesh.world_size * skipped:
            self._name_who_skipped(skipped)
        digest, first, second, valid = (number & _WORD for number in whole)
        full = replace(part, digest=f"{digest:016x}", loaded=(first, second), valid_targets=valid)
        return full, self._decided(votes)

    def _name_who_skipped(self, skipped: int) -> None:
        counts = self._mesh.sum_on_host([skipped if n == self._mesh.rank else 0 for n in range(self._mesh.world_size)])
        raise RuntimeError(
            f"ranks have left different numbers of steps without an update ({', '.join(map(str, counts))}, by rank): "
            "their weights have parted, and nothing was saved since; go on from the last checkpoint, and report this"
        )

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

    def _counted(self, asked: Sequence[str]) -> list[int]:
        """A digit for each reason, _DIGITS of them a number."""
        numbers = [0] * (-(-len(self._reasons) // _DIGITS))
        for reason in asked:
            place = self._reasons.index(reason)
            numbers[place // _DIGITS] += _MANY ** (place % _DIGITS)
        return numbers

    def _decided(self, votes: Sequence[int]) -> Decision:
        asked = [
            reason
            for place, reason in enumerate(self._reasons)
            if votes[place // _DIGITS] // _MANY ** (place % _DIGITS) % _MANY
        ]
        return decision_of(asked, self._reasons)
