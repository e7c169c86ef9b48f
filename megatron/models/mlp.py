"""The feed-forward part of a layer, gated (SwiGLU, GeGLU) or plain."""

from __future__ import annotations

from torch import Tensor

from megatron.config.model_shape import ModelShape
from megatron.kernels.choice import Kernels, activations
from megatron.models.joined import JoinedProjections
from megatron.models.layers import Linear, RowLinear, column_linear, project
from megatron.parallel.model_place import ONE_PROCESS, ModelPlace


class MLP(JoinedProjections):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where the shape is not gated."""

    def __init__(self, shape: ModelShape, kernels: Kernels, place: ModelPlace = ONE_PROCESS) -> None:
        super().__init__()
        hidden, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.gate = column_linear(hidden, inner, bias, kernels, place) if shape.gated_mlp else None
        self.up = column_linear(hidden, inner, bias, kernels, place)
        self.down = RowLinear(inner, hidden, bias, kernels, place)
        self.activation, self.functions, self.place = shape.hidden_act, activations(kernels.activation), place

    def together(self) -> tuple[Linear, ...]:
        """Gate and up."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def forward(self, x: Tensor) -> Tensor:
        if self.joined is not None:
            return self.down(self.functions.gated_halves(self.project_joined(x), self.activation))
        if self.gate is None:
            (up,) = project(x, (self.up,), self.place)
            return self.down(self.functions.activate(up, self.activation))
        gate, up = project(x, (self.gate, self.up), self.place)
        return self.down(self.functions.gated(gate, up, self.activation))
