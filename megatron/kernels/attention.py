"""Causal attention that never crosses a document's end: what may be seen, and the definition by torch's own SDPA.

What is derived from document ids is made once a microbatch and shared by all layers. `attention_blockwise.py` promises
to equal the definition here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Block:
    """Queries [q0, q1) see keys within [k0, k1). Columns of [k0, m0) are visible to every query of every row; the
    rest, [m0, k1), are added the mask [batch or 1, 1, q1 - q0, 1, k1 - m0]: 0 where visible, minus infinity where not.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    m0: int
    mask: Tensor


def piece_starts(document_ids: Tensor) -> Tensor:
    """Where the piece of each position begins: document_ids [batch, T] of any int dtype -> int64 [batch, T]."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    begins = torch.zeros_like(places)
    begins[:, 1:] = torch.where(document_ids[:, 1:] != document_ids[:, :-1], places[:, 1:], 0)
    return begins.cummax(dim=1).values


def visibility(first: Tensor, q0: int, q1: int, k0: int, k1: int) -> Tensor:
    """Whether queries [q0, q1) may see keys [k0, k1): first [batch, T] -> bool [batch, q1 - q0, k1 - k0]."""
    queries = torch.arange(q0, q1, device=first.device)[None, :, None]
    keys = torch.arange(k0, k1, device=first.device)[None, None, :]
    return (keys <= queries) & (keys >= first[:, q0:q1, None])


def plan_for_sdpa(first: Tensor) -> Tensor | None:
    """The whole mask, bool [batch, 1, T, T]; None where causality alone says it all."""
    if not bool(first.any()):
        return None
    return visibility(first, 0, first.shape[1], 0, first.shape[1])[:, None]


def attention_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The definition. query [batch, groups, T, heads a group, d], key and value [batch, groups, T, 1, d].

    Returns [batch, T, groups * heads a group * d]. Scores are scaled by 1 / sqrt(d).
    """
    batch, groups, length, heads, size = query.shape
    queries = query.transpose(2, 3).reshape(batch, groups * heads, length, size)
    out = functional.scaled_dot_product_attention(
        queries, key.squeeze(3), value.squeeze(3), attn_mask=mask, is_causal=mask is None, enable_gqa=heads > 1
    )
    return out.transpose(1, 2).reshape(batch, length, groups * heads * size)
