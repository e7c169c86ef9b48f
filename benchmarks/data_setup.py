"""What the rows of the data benchmark share: where things are, how large, and how a measurement is started."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_measure import Outcome, measure

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sizes:
    """How much each row does. Bytes of jsonl; documents of synthetic datasets; samples of a blend."""

    corpus: int = 300_000_000
    first_part: float = 1 / 3
    vocabulary: int = 32_000
    documents: int = 10_000_000
    arm_documents: int = 2_000_000
    read_documents: int = 50_000
    read_samples: int = 2_000
    blend_samples: int = 100_000_000
    blend_sources: tuple[int, ...] = (2, 8, 64)
    far: int = 10**12
    resume_at: int = 10**9
    batch: int = 512


QUICK = Sizes(
    corpus=1_500_000,
    vocabulary=1_000,
    documents=20_000,
    arm_documents=5_000,
    read_documents=500,
    read_samples=64,
    blend_samples=10_000,
    blend_sources=(2, 8),
    far=10**7,
    resume_at=10_000,
    batch=50,
)


@dataclass(frozen=True)
class Setup:
    """peer: Megatron-LM's tree, None to measure ours alone. peer_python: an interpreter that imports what it needs."""

    peer: Path | None
    peer_python: str
    work: Path
    repeat: int
    sizes: Sizes
    quick: bool
    limit: float = 900.0

    def ours(self, what: str, arguments: dict[str, Any], limit: float | None = None) -> Outcome:
        """One measurement of ours, `data_ours.py`, with its own time limit in seconds where one is given."""
        return measure([sys.executable, HERE / "data_ours.py", what, json.dumps(arguments)], limit or self.limit)

    def theirs(self, what: str, arguments: dict[str, Any]) -> Outcome:
        """One measurement of Megatron-LM, `data_peer.py`."""
        assert self.peer is not None
        command: list[str | Path] = [self.peer_python, HERE / "data_peer.py", self.peer, what, json.dumps(arguments)]
        return measure(command, self.limit, self.peer)

    def their_tool(self, tool: str, arguments: list[str]) -> Outcome:
        """One run of a command of Megatron-LM."""
        assert self.peer is not None
        command: list[str | Path] = [self.peer_python, HERE / "data_peer.py", self.peer, "tool", tool, "--"]
        return measure([*command, *arguments], self.limit, self.peer)

    def sides(
        self, ours: Callable[[int], Outcome], peer: Callable[[int], Outcome]
    ) -> dict[str, Callable[[int], Outcome]]:
        """Both sides, or ours alone where there is no peer."""
        return {"ours": ours, "peer": peer} if self.peer is not None else {"ours": ours}

    def fresh(self, name: str) -> Path:
        """An empty folder of that name within the work folder; what was there is deleted."""
        folder = self.work / "fresh" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def gathered(taken: dict[str, list[Outcome]], side: str, name: str) -> list[float]:
    """A printed value of every measurement of a side."""
    return [outcome.values[name] for outcome in taken.get(side, [])]


def both(taken: dict[str, list[Outcome]], name: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """A printed value of every measurement, Megatron-LM's first, times `scale`."""
    peer, ours = ([value * scale for value in gathered(taken, side, name)] for side in ("peer", "ours"))
    return peer, ours


def seconds_of(taken: dict[str, list[Outcome]], side: str) -> list[float]:
    """Wall clock of every measured process of a side."""
    return [outcome.seconds for outcome in taken.get(side, [])]


def peaks_of(taken: dict[str, list[Outcome]], side: str) -> list[float]:
    """Peak resident memory of the largest process, MB."""
    return [outcome.peak_mb for outcome in taken.get(side, [])]
