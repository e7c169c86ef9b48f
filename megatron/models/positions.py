"""Learned positions (GPT-2): a vector for each position within a document, added to the token's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.kernels.embedding import embedding
from megatron.models.layers import replicated
from megatron.parallel.model_place import ONE_PROCESS, ModelPlace


class Positions(nn.Module):
    """Rows of weight [max_position_embeddings, hidden], whole on every tensor rank."""

    def __init__(self, shape: ModelShape, place: ModelPlace = ONE_PROCESS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.max_position_embeddings, shape.hidden_size))
        self.cuts = {"weight": replicated(place)}
        self.place = place

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x [batch, T_local, hidden] plus the vectors of its tokens.

        places: int64 [batch or 1, T], each token's number within its document, of all positions that the tensor ranks
        share; under sequence parallel this rank's part of them is taken.
        """
        if self.place.sequence and not self.place.tensor.alone:
            places = places.chunk(self.place.tensor.size, 1)[self.place.tensor.rank]
        return x + embedding(places, self.weight)


def check_length(shape: ModelShape, length: int) -> None:
    """Raises ConfigError where rows of this length have positions that were never learned; rotary ones have no end."""
    rows = shape.max_position_embeddings
    if shape.position_embedding == "learned" and length > rows:
        raise ConfigError(
            f"a sequence of {length} positions is longer than model.max_position_embeddings {rows}, and each position "
            f"has a learned vector: use sequences of at most {rows}"
        )
