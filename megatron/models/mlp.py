"""The feed-forward part of a layer, gated (SwiGLU, GeGLU) or plain."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model_shape import ModelShape
from megatron.kernels.swiglu import activate, gated
from megatron.models.layers import Linear


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where the shape is not gated."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.gate = Linear(hidden, inner, bias) if shape.gated_mlp else None
        self.up = Linear(hidden, inner, bias)
        self.down = Linear(inner, hidden, bias, residual=True)
        self.activation = shape.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(activate(self.up(x), self.activation))
        return self.down(gated(self.gate(x), self.up(x), self.activation))
