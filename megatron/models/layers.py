"""The parts that hold parameters: linear, norm and embedding. Tensor-parallel kinds will stand beside these.

Constructors leave parameters unset; `initialise` or a checkpoint fills them. Each part computes in the dtype of the
tensors that it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron.config.model_shape import ModelShape
from megatron.kernels.embedding import embedding
from megatron.kernels.rms_norm import rms_norm


class Linear(nn.Module):
    """y = x W^T + b with weight [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, residual: bool = False) -> None:
        """residual: the output is added to the residual stream, so that its initial weights are scaled by depth."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, by the shape's `norm`. Parameters stay in the master's dtype."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden_size))
        self.bias = nn.Parameter(torch.empty(shape.hidden_size)) if shape.norm == "layernorm" else None
        self.eps = shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.layer_norm(x, self.weight.shape, weight, bias, self.eps)


class Embedding(nn.Module):
    """Rows of weight [padded vocabulary, hidden]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.padded_vocab_size, shape.hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)
