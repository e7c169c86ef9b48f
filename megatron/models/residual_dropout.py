"""Dropout of what is added to the residual stream: the embedding, and each layer's attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron.kernels.dropout import dropout, row_keys


@dataclass(frozen=True)
class ResidualDropout:
    """A microbatch's dropout. sample_numbers: int64 [batch], of the run. positions: int64 [T_local], of the residual
    stream's columns here in the whole sequence.
    """

    rate: float
    seed: int
    sample_numbers: Tensor
    positions: Tensor

    def drop(self, x: Tensor, layer: int, site: int) -> Tensor:
        """x [batch, T_local, hidden] at a site of kernels/dropout.py in the layer of this global number."""
        return dropout(x, self.rate, row_keys(self.seed, self.sample_numbers, layer, site), self.positions)
