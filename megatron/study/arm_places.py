"""Where each key of an arm's config was written: an override of the arm, the base that all arms have, or the arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.load import Location, Places
from megatron.study.overrides import Override
from megatron.study.study_file import Study


@dataclass(frozen=True)
class ArmPlaces(Places):
    """source: FILE:LINE and name of the arm, for what is its own."""

    study: Study | None = None
    sets: Sequence[Override] = ()

    def of(self, location: Location) -> str:
        """FILE:LINE of a key, with the arm whose config it spoils."""
        arm = self.source.partition(": ")[2]
        for override in self.sets:
            steps = tuple(override.key.split("."))
            if steps == tuple(map(str, location[: len(steps)])):
                return f"{override.place}: {arm}: {override.by}"
        if self.study is None or not location or location[0] not in self.study.base:
            return self.source
        return f"{self.study.base_place(*location)}: the base, first read for {arm}"
