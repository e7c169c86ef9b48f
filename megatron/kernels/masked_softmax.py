"""Softmax of scaled and masked scores (Megatron-LM's scaled masked softmax): the definition.

softmax(scale * scores), where what is not visible has no weight; a row that sees nothing is 0. Statistics are float32
(float64 for float64), the result has the scores' dtype.

Two masks, of which either may be None: a span says for each query which stretch of keys it sees, as causality and
documents do, in 8 bytes a query; a bool mask says anything, in a byte a score.
`masked_softmax_triton.py` promises to equal this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Query q of row b sees keys [first[b, q], end[b, q]): int32 [batch or 1, Q], both of one shape."""

    first: Tensor
    end: Tensor


Softmax = Callable[[Tensor, float, "Span | None", "Tensor | None"], None]
SoftmaxGradient = Callable[[Tensor, Tensor, float, "Span | None"], None]


@dataclass(frozen=True)
class InPlaceSoftmax:
    """The two passes of an implementation, without autograd: `softmax_into` and `softmax_gradient_into`."""

    forward: Softmax
    backward: SoftmaxGradient


def causal_span(queries: int, keys: int, device: torch.device | None = None) -> Span:
    """The last of `queries` sees all keys, and each one key more than the one before it."""
    end = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32, device=device)[None]
    return Span(torch.zeros_like(end), end)


def document_span(first: Tensor, positions: Tensor | None = None) -> Span:
    """Queries at positions [Q] (None: all) see keys from first [batch, T] (`piece_starts`) to themselves."""
    places = torch.arange(first.shape[1], device=first.device)
    if positions is not None:
        first, places = first[:, positions], positions.to(first.device)
    return Span(first.int(), (places + 1).int().expand(first.shape).contiguous())


def five(shape: torch.Size) -> tuple[int, int, int, int, int]:
    """A shape of scores [batch, heads, Q, K] or [batch, groups, Q, heads a group, K] as the latter. Raises ValueError
    for another number of dimensions.
    """
    if len(shape) == 4:
        return shape[0], shape[1], shape[2], 1, shape[3]
    if len(shape) == 5:
        return shape[0], shape[1], shape[2], shape[3], shape[4]
    raise ValueError(f"scores are [batch, heads, Q, K] or [batch, groups, Q, heads a group, K], not {list(shape)}")


def check_span(span: Span, shape: torch.Size) -> None:
    """Raises ValueError where a span does not fit scores."""
    batch, _, queries, _, _ = five(shape)
    fits = span.first.shape == span.end.shape and span.first.dtype == span.end.dtype == torch.int32
    if not fits or span.first.shape not in ((batch, queries), (1, queries)):
        raise ValueError(
            f"a span for scores {list(shape)} is int32 [{batch} or 1, {queries}], not {span.first.dtype} "
            f"{list(span.first.shape)} and {span.end.dtype} {list(span.end.shape)}"
        )


def _visible(shape: torch.Size, span: Span | None, mask: Tensor | None) -> Tensor | None:
    """Broadcastable to the scores; None: everything."""
    if span is None:
        return mask
    check_span(span, shape)
    keys = torch.arange(shape[-1], device=span.first.device)
    within = (keys >= span.first[..., None]) & (keys < span.end[..., None])
    within = within[:, None] if len(shape) == 4 else within[:, None, :, None]
    return within if mask is None else within & mask


def masked_softmax(scores: Tensor, scale: float = 1.0, span: Span | None = None, mask: Tensor | None = None) -> Tensor:
    """scores [batch, heads, Q, K] or [batch, groups, Q, heads a group, K], any strides, and a bool mask (True: visible)
    that broadcasts to them -> the same shape and dtype, contiguous. Raises ValueError where a span does not fit.
    """
    five(scores.shape)
    if scores.shape[-1] == 0:
        return scores.clone()
    wide = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32) * scale
    visible = _visible(scores.shape, span, mask)
    if visible is not None:
        wide = wide.masked_fill(~visible, -torch.inf)
    highest = wide.detach().amax(-1, keepdim=True)
    weights = torch.exp(wide - highest.masked_fill(highest == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1)).to(scores.dtype).contiguous()


@torch.no_grad()
def softmax_into(scores: Tensor, scale: float, span: Span | None = None, mask: Tensor | None = None) -> None:
    """`masked_softmax` written over the scores, which autograd does not see."""
    scores.copy_(masked_softmax(scores, scale, span, mask))


@torch.no_grad()
def softmax_gradient_into(weights: Tensor, grad: Tensor, scale: float, span: Span | None = None) -> None:
    """The gradient of the scores written over that of the weights: scale * weights * (grad - sum(weights * grad)).

    weights: what `masked_softmax` gave. span: the forward pass's; keys outside it are not read, and get 0.
    """
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    product = weights.to(wide) * grad.to(wide)
    visible = _visible(grad.shape, span, None)
    if visible is not None:
        product = product.masked_fill(~visible, 0)
    grad.copy_(scale * (product - weights.to(wide) * product.sum(-1, keepdim=True)))


EAGER = InPlaceSoftmax(softmax_into, softmax_gradient_into)
