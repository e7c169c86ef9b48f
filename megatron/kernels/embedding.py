"""Token embedding whose gradient is summed in float32 at least, of all words or of a part of them.

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
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, first: int | None) -> Tensor:
        ctx.rows, ctx.dtype, ctx.part = weight.shape[0], weight.dtype, first is not None
        if first is None:
            ctx.save_for_backward(tokens)
            return torch.nn.functional.embedding(tokens, weight)
        held = tokens - first
        elsewhere = (held < 0) | (held >= ctx.rows)
        held.masked_fill_(elsewhere, 0)
        ctx.save_for_backward(held, elsewhere)
        return torch.nn.functional.embedding(held, weight).masked_fill_(elsewhere[..., None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        held, *elsewhere = ctx.saved_tensors
        wide = grad.to(torch.float64 if ctx.dtype == torch.float64 else torch.float32)
        if elsewhere:
            wide = wide.masked_fill(elsewhere[0][..., None], 0)
        total = torch.ops.aten.embedding_dense_backward(wide, held, ctx.rows, -1, False)
        return None, total.to(ctx.dtype), None


def embedding(tokens: Tensor, weight: Tensor, first: int | None = None) -> Tensor:
    """Rows of weight [vocabulary, hidden] for tokens [...] (int64): [..., hidden].

    first: weight holds only the words from this number on; words that are elsewhere give rows of zeros.
    """
    return _Embedding.apply(tokens, weight, first)
