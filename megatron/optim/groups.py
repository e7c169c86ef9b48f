"""Which parameters decay: matrices do; biases and norms, the vectors, do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer from (name, parameter) pairs, the decaying one first; an empty one is left out."""
    pairs = list(parameters)
    groups = [
        {"params": [p for _, p in pairs if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in pairs if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
