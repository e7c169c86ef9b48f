"""Which parameters decay, and which of them Muon takes: both by name and dimensions, so that every rank agrees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def parameter_groups(parameters: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer from (name, parameter) pairs, the decaying one first; an empty one is left out.

    Matrices decay; biases and norms, the vectors, do not. A shard has its whole tensor's dimensions, so that what a
    rank holds of a tensor, even nothing, does not change its group.
    """
    pairs = list(parameters)
    groups = [
        {"params": [p for _, p in pairs if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in pairs if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_layer_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix inside a layer, which Muon may take; embedding and head are not."""
    return ndim == 2 and name.startswith("layers.") and name.endswith(".weight")
