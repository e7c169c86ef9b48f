"""The feed-forward part of a layer, gated (SwiGLU, GeGLU) or plain."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model_shape import ModelShape
from megatron.kernels.swiglu import activate, gated
from megatron.models.layers import RowLinear, column_linear, project
from megatron.parallel.model_place import ONE_PROCESS, ModelPlace


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where the shape is not gated."""

    def __init__(self, shape: ModelShape, place: ModelPlace = ONE_PROCESS) -> None:
        super().__init__()
        hidden, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.gate = column_linear(hidden, inner, bias, place) if shape.gated_mlp else None
        self.up = column_linear(hidden, inner, bias, place)
        self.down = RowLinear(inner, hidden, bias, place)
        self.activation, self.place = shape.hidden_act, place

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            (up,) = project(x, (self.up,), self.place)
            return self.down(activate(up, self.activation))
        gate, up = project(x, (self.gate, self.up), self.place)
        return self.down(gated(gate, up, self.activation))
