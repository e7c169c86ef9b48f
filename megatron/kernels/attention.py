"""Causal attention that never crosses a document's end: what may be seen, and the definition by torch's own SDPA.

What is derived from document ids is made once a microbatch and shared by all layers. `attention_blockwise.py` promises
to equal the definition here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

AttentionBackend = Literal["sdpa", "blockwise", "varlen", "cudnn", "flex", "unfused"]
"""Which kernel runs: torch's own with a mask, or that of `attention_NAME.py` (cudnn: `attention_varlen.py`); what can
run where says `attention_choice.py`.
"""


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


@dataclass(frozen=True)
class Piece:
    """Queries [q0, q1) of those at hand see keys within [k0, k1) of all, by mask [batch or 1, 1, q1 - q0, k1 - k0]
    (True: visible). None: they are the same positions, each of which sees all before it.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    mask: Tensor | None


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


def runs_of(positions: Tensor) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive positions [T_local], as (first index, index after the last, position of the first)."""
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), positions.shape[0]]
    for q0, q1 in zip(edges[:-1], edges[1:], strict=True):
        yield q0, q1, int(positions[q0])


def plan_for_sdpa(first: Tensor, divided: bool | None = None) -> Tensor | None:
    """The whole mask, bool [batch, 1, T, T]; None where causality alone says it all.

    divided: whether a document begins within some row, where the caller knows (`document_bounds`). None: first is
    asked, which on a GPU makes the host wait.
    """
    if not (bool(first.any()) if divided is None else divided):
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


def plan_pieces(first: Tensor, positions: Tensor | None = None, divided: bool | None = None) -> tuple[Piece, ...]:
    """What SDPA is called on, for queries at positions [T_local] (None: at all) that see keys from first [batch, T] on.

    One call for each run of consecutive positions, on no more keys than its queries may see; with `divided` (see
    `plan_for_sdpa`) nothing is asked of first, and a run gets all keys up to its end.
    """
    if positions is None:
        return (Piece(0, first.shape[1], 0, first.shape[1], plan_for_sdpa(first, divided)),)
    pieces = []
    for q0, q1, begin in runs_of(positions):
        end = begin + q1 - q0
        if divided is None:
            k0, latest = int(first[:, begin].min()), int(first[:, end - 1].max())
        else:
            k0, latest = 0, end - 1 if divided else 0
        if latest <= k0 == begin:
            mask = None
        else:
            # Where no document begins after k0, one row's mask serves all.
            mask = visibility(first if latest > k0 else torch.zeros_like(first[:1]), begin, end, k0, end)[:, None]
        pieces.append(Piece(q0, q1, k0, end, mask))
    return tuple(pieces)


def attention_sdpa_pieces(query: Tensor, key: Tensor, value: Tensor, pieces: tuple[Piece, ...]) -> Tensor:
    """`attention_sdpa` piece by piece: query [batch, groups, T_local, heads a group, d], key and value [batch, groups,
    T, 1, d] -> [batch, T_local, groups * heads a group * d].
    """
    outputs = [
        attention_sdpa(query[:, :, p.q0 : p.q1], key[:, :, p.k0 : p.k1], value[:, :, p.k0 : p.k1], p.mask)
        for p in pieces
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
