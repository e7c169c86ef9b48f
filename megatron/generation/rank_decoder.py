"""One rank's part of a model that decodes, filled from stored weights, and how hidden states reach the next stage.

Tensor ranks hold slices, pipeline ranks layers; each reads its own boxes and nothing else. One rank is the case of both
axes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.tensor_shards import TensorSource
from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.config.schema import ParallelSection
from megatron.engines.model_parts import build_parts, whole_parameters
from megatron.models.decoder import Decoder
from megatron.models.decoding import DEFINITIONS, CachedDecoder
from megatron.models.parameter_cuts import parameter_cuts
from megatron.parallel.mesh import Mesh


class RankDecoder:
    """This rank's part of a model. All ranks of the mesh call each method together.

    tensor x pipeline ranks of the mesh make up the model; there are no others. Raises ConfigError where the shape does
    not divide over them, CheckpointError where the weights are another model's.
    """

    def __init__(self, shape: ModelShape, weights: TensorSource, mesh: Mesh, dtype: torch.dtype) -> None:
        """dtype: that of the weights in memory, and of the computation."""
        section = ParallelSection(tensor=mesh.layout.tensor, pipeline=mesh.layout.pipeline)
        (self.part,) = build_parts(shape, section, mesh, DEFINITIONS, dtype, seed=0).modules
        self.shape, self.mesh, self.dtype = shape, mesh, dtype
        _check(shape, weights)
        _fill(self.part, weights, mesh)
        self._cached: CachedDecoder | None = None

    def begin(self, rows: int, capacity: int) -> int:
        """Room for so many rows of so many tokens, prompt and answer together. Bytes of keys and values here."""
        self._cached = CachedDecoder(self.part, rows, capacity)
        return self._cached.nbytes

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone."""
        assert self._cached is not None
        self._cached.keep(rows)

    @torch.no_grad()
    def extend(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor | None:
        """Goes on by tokens int64 [b, T], of which row r has counts[r], from the left.

        Logits [b, vocab_size] behind each row's last token on the last stage; None on the others.
        """
        assert self._cached is not None, "begin was not called"
        axis = self.mesh.pipeline
        x = tokens.to(self.mesh.device)
        if not self.part.place.first:
            x = torch.empty(*tokens.shape, self.shape.hidden_size, dtype=self.dtype, device=self.mesh.device)
            dist.recv(x, group=axis.group, group_src=axis.rank - 1)
        out = self._cached.extend(x, counts)
        if self.part.place.last:
            return out
        dist.send(out.contiguous(), group=axis.group, group_dst=axis.rank + 1)
        return None

    def told(self, numbers: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
        """Numbers [rows] that the last stage has, on every stage; on the host."""
        axis = self.mesh.pipeline
        if axis.alone:
            assert numbers is not None
            return numbers.cpu()
        if numbers is None:
            numbers = torch.empty(rows, dtype=dtype, device=self.mesh.device)
        dist.broadcast(numbers, group=axis.group, group_src=axis.size - 1)
        return numbers.cpu()


def _check(shape: ModelShape, weights: TensorSource) -> None:
    wanted, found = whole_parameters(shape), set(weights.names())
    if wrong := sorted(wanted.keys() ^ found):
        raise CheckpointError(f"the weights and the model shape do not name the same tensors: {', '.join(wrong[:8])}")
    for name, parameter in wanted.items():
        if weights.shape(name) != tuple(parameter.shape):
            raise CheckpointError(
                f"tensor {name} is {list(weights.shape(name))}, and the model shape says {list(parameter.shape)}"
            )


def _fill(part: Decoder, weights: TensorSource, mesh: Mesh) -> None:
    """Gives the part memory, box by box, each narrowed as it is read."""
    cuts = parameter_cuts(part)
    state = {}
    for name, parameter in part.named_parameters():
        size = tuple(parameter.shape)
        box = weights.read(name, cuts[name].offset_of(size, mesh.tensor), size)
        state[name] = box.to(mesh.device, parameter.dtype)
    part.load_state_dict(state, assign=True)
