"""What a model has to know of the layout: which part of it this rank holds, and with whom it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron.parallel.axis import ALONE, Axis


@dataclass(frozen=True)
class ModelPlace:
    """One rank's part of a model.

    tensor: the ranks that share each layer's matrices. sequence: between them, norms and residuals are cut along the
    sequence. context: the ranks that share each sequence, by context_method.
    layers: global numbers of the layers held here, None for all. first: the embedding is here. last: the final norm
    and the head are.
    split_backward: the schedule runs input and weight gradients apart (zero-bubble), so that no autograd Function may
    hold both a weight and a collective.
    """

    tensor: Axis = ALONE
    sequence: bool = False
    context: Axis = ALONE
    context_method: Literal["auto", "all-to-all", "gather"] = "auto"
    layers: range | None = None
    first: bool = True
    last: bool = True
    split_backward: bool = False


ONE_PROCESS = ModelPlace()
"""The whole model on one rank."""


@dataclass(frozen=True)
class ParameterCut:
    """How a parameter lies on the tensor ranks.

    dim: the dimension that is cut into equal parts in order, None where every tensor rank holds the whole.
    partial: the whole is held, but each rank's gradient is only its part of a sum over the tensor ranks (norms and
    biases under sequence parallel; keys and values of fewer heads than ranks).
    """

    dim: int | None = None
    partial: bool = False

    def shape_of_whole(self, local: Sequence[int], tensor: Axis) -> tuple[int, ...]:
        """The whole tensor's shape, from that of this rank's part."""
        return tuple(size * tensor.size if number == self.dim else size for number, size in enumerate(local))

    def offset_of(self, local: Sequence[int], tensor: Axis) -> tuple[int, ...]:
        """Where this rank's part begins in the whole tensor."""
        return tuple(size * tensor.rank if number == self.dim else 0 for number, size in enumerate(local))
