"""Token embedding whose gradient is summed in float32 at least.

torch sums the rows of a frequent token one after the other in the weight's own dtype on CPU; in bfloat16 that stops
growing after a few hundred occurrences, so the sum is kept wide and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        total = torch.ops.aten.embedding_dense_backward(grad.to(wide), tokens, ctx.rows, -1, False)
        return None, total.to(ctx.dtype)


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [vocabulary, hidden] for tokens [...] (int64): [..., hidden]."""
    return _Embedding.apply(tokens, weight)
