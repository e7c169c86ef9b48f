"""The blend as a stream: which source gives the next sample (laws M1, M3, M4).

The rule is the chairman assignment (Tijdeman 1980), in the form of earliest deadline first. Source s with c samples
given may get its next one from the first slot t with target_s(t) > c on, and must have it by the first slot with
target_s(t) >= c + 1. Among the sources that may, the one with the earliest deadline is taken; ties go to the group
that is furthest behind its target, then to the name that sorts first. Every prefix then keeps |count − target| < 1.

The state is the counts alone, so that resuming needs no history. `PlainMixture` defines the rule in exact Python
integers; csrc/mixture.cpp equals it and is used where the extension was built. It also seeks to any sample without the
steps before it and without any stored state: csrc/mixture_seek.cpp says how, and why the counts are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.native import native
from megatron.data.weight_function import WeightFunction

# The widest products of the rule must stay inside the 128-bit integers of the C++ stream.
_NATIVE_BITS = 124


class MixtureStream(Protocol):
    """A position in the blend of one training stage. Sources are numbered in the order of `function.sources`."""

    @property
    def position(self) -> int: ...

    @property
    def counts(self) -> list[int]: ...

    def take(self, samples: int) -> NDArray[np.int32]:
        """The sources of the next `samples` samples."""
        ...

    def seek(self, position: int) -> None:
        """Moves to any sample number of the stage, as if it had been reached sample by sample."""
        ...


def open_mixture(
    function: WeightFunction,
    groups: Mapping[str, str],
    counts: Sequence[int] | None = None,
    horizon: int = 0,
) -> MixtureStream:
    """The stream at the position that `counts` say (default: the stage's start); native where it was built.

    Args:
        function: the stage's resolved weights.
        groups: the group of each source, for ties.
        counts: samples already given by each source, in the order of `function.sources`.
        horizon: the largest sample number that will be asked for, for the check of integer width.
    """
    module = native()
    if module is None or _bits(function, horizon) > _NATIVE_BITS:
        return PlainMixture(function, groups, counts)
    names = function.sources
    group_names = sorted({groups[name] for name in names})
    segments = []
    for index, part in enumerate(function.segments):
        end = function.segments[index + 1].start if index + 1 < len(function.segments) else -1
        to = part.weights if part.to is None else part.to
        segments.append((part.start, end, [part.weights.get(n, 0) for n in names], [to.get(n, 0) for n in names]))
    stream: MixtureStream = module.MixtureStream(
        function.denominator,
        [group_names.index(groups[name]) for name in names],
        segments,
        list(counts) if counts is not None else [0] * len(names),
    )
    return stream


def _bits(function: WeightFunction, horizon: int) -> int:
    reach = max(horizon, function.segments[-1].start, 1) + 2 * function.denominator
    starts = [part.start for part in function.segments]
    longest = max((end - start for start, end in pairwise(starts)), default=1)
    return (8 * function.denominator * reach * longest).bit_length()


class PlainMixture:
    """The definition: every step looks at every source, in unbounded integers."""

    def __init__(
        self, function: WeightFunction, groups: Mapping[str, str], counts: Sequence[int] | None = None
    ) -> None:
        self._function = function
        self._names = function.sources
        self._groups = [groups[name] for name in self._names]
        self._targets = [function.tables[name] for name in self._names]
        self._counts = list(counts) if counts is not None else [0] * len(self._names)
        self._windows = [self._window(index) for index in range(len(self._names))]

    @property
    def position(self) -> int:
        """Samples given so far."""
        return sum(self._counts)

    @property
    def counts(self) -> list[int]:
        """Samples given so far by each source."""
        return list(self._counts)

    def take(self, samples: int) -> NDArray[np.int32]:
        """The sources of the next `samples` samples, by number."""
        return np.array([self._next() for _ in range(samples)], dtype=np.int32)

    def seek(self, position: int) -> None:
        """Moves to `position`: at once where every target is whole there, else by whole periods and then by steps.

        Outside constant stages that is every step from the start, or from here where `position` lies ahead: some tens
        of thousands a second. Only the native stream is quick there.
        """
        if position < self.position:
            self._restart([0] * len(self._names))
        whole = self._whole_targets(position)
        if whole is not None:
            self._restart(whole)
            return
        if self._function.is_constant:
            period = self._function.denominator
            jump = position // period * period
            if jump > self.position:
                self._restart([table.first[0] * (jump // period) for table in self._targets])
        while self.position < position:
            self._next()

    def _whole_targets(self, position: int) -> list[int] | None:
        fractions = [table.at(position) for table in self._targets]
        if any(numerator % scale for numerator, scale in fractions):
            return None
        return [numerator // scale for numerator, scale in fractions]

    def _restart(self, counts: Sequence[int]) -> None:
        self._counts = list(counts)
        self._windows = [self._window(index) for index in range(len(self._names))]

    def _window(self, index: int) -> tuple[int | None, int | None]:
        count = self._counts[index]
        return self._targets[index].first_above(count), self._targets[index].first_reaching(count + 1)

    def _next(self) -> int:
        slot = self.position + 1
        ready = [index for index, (release, _) in enumerate(self._windows) if release is not None and release <= slot]
        deadlines = [self._windows[index][1] for index in ready]
        earliest = min((deadline for deadline in deadlines if deadline is not None), default=None)
        tied = [index for index, deadline in zip(ready, deadlines, strict=True) if deadline == earliest]
        if len(tied) > 1:
            tied.sort(key=lambda index: (-self._lag(self._groups[index], slot), self._names[index]))
        chosen = tied[0]
        self._counts[chosen] += 1
        self._windows[chosen] = self._window(chosen)
        return chosen

    def _lag(self, group: str, slot: int) -> int:
        """How far a group is behind its target at `slot`, over the denominator that all sources share there."""
        members = [index for index, name in enumerate(self._groups) if name == group]
        scale = self._targets[members[0]].at(slot)[1]
        return sum(self._targets[index].at(slot)[0] - self._counts[index] * scale for index in members)
