"""Where this process stands among the ranks. Here, and in megatron/launch, the environment is read; nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from megatron.config.errors import ConfigError, UnavailableError


@dataclass(frozen=True)
class Mesh:
    """One rank's place. device is where its model lives."""

    rank: int
    world_size: int
    device: torch.device


def current_mesh() -> Mesh:
    """The place that the launcher gave us (RANK, WORLD_SIZE); one process where there is no launcher.

    Raises UnavailableError for more than one process, which this version cannot do.
    """
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if world_size != 1:
        raise UnavailableError(
            f"WORLD_SIZE is {world_size}: this version trains on one process; start it without torchrun, "
            "or with --nproc-per-node 1"
        )
    return Mesh(rank, world_size, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _number(name: str, default: int) -> int:
    words = os.environ.get(name, str(default))
    if not words.isdecimal():
        raise ConfigError(f"environment variable {name} is {words!r}, a whole number is needed: unset it or start anew")
    return int(words)
