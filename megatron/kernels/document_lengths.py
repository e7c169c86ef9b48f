"""Where documents begin among packed positions, found on the device without waiting for it.

Kernels of variable length take a microbatch as batch * T positions one after another, and an int32 tensor of document
starts ("cu_seqlens"): document i is positions [starts[i], starts[i + 1]). How many documents there are only the data
know, and a tensor's length has to be known to the host; so the tensor is as long as a bound says, and what is left
over repeats the end: documents of no positions.

The bound has to be tight. Flash's backward pass keeps 128 rows of float32 for each document, be it empty (torch's
flash_attn/flash_api.cpp, dq_accum), and forward and backward launch longest / 128 programs for each: with batch * T
documents of at most T positions that is more memory than a GPU has. `document_bounds` counts on the CPU, where the
loader made the document ids, before they are copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.kernels.attention import piece_starts

TILE = 128
"""Positions that a program of the flash kernels takes; a longest document is rounded up to whole tiles."""


@dataclass(frozen=True)
class DocumentBounds:
    """What the host knows of a microbatch. documents: of all its rows, at most; each row begins one. longest: positions
    of a document, at most.
    """

    documents: int
    longest: int


def document_bounds(document_ids: Tensor) -> DocumentBounds:
    """Counts document_ids [batch, T] of the CPU exactly. Raises ValueError where they lie on a device, which it would
    have to wait for.
    """
    if document_ids.device.type != "cpu":
        raise ValueError(f"document ids are counted on the CPU before they are copied, not on {document_ids.device}")
    return asked_bounds(piece_starts(document_ids))


def asked_bounds(first: Tensor) -> DocumentBounds:
    """The same from first [batch, T] (`piece_starts`), wherever it lies. On a device the host waits for it: for callers
    that have no copy of the document ids, once a microbatch.
    """
    if first.numel() == 0:
        return DocumentBounds(first.shape[0], 0)
    places = torch.arange(first.shape[1], device=first.device)
    documents, longest = torch.stack(((first == places).sum(), (places - first).max() + 1)).tolist()
    return DocumentBounds(documents, longest)


def loosest_bounds(batch: int, length: int) -> DocumentBounds:
    """True of any microbatch, and too much for the flash kernels' backward pass at sizes of training (see above)."""
    return DocumentBounds(batch * length, length)


def roomy(count: int) -> int:
    """count or up to an eighth more, one of eight values between powers of two: so few lengths of tensors occur that an
    allocator or a cache by shape meets each soon.
    """
    step = max(1, (1 << max(0, count - 1).bit_length()) // 16)
    return -(-count // step) * step


def document_starts(first: Tensor, documents: int, cut: int | None = None) -> Tensor:
    """Starts among the batch * T packed positions, int32 [documents + 1 (+ batch with cut)], on the device of first
    [batch, T] (int64, `piece_starts`): ascending, from 0, with batch * T from the last document's end on.

    documents: as many as there are at most; with fewer than there are, the last ones are lost without a word, since to
    look would mean to wait. cut: a position at which every row's document ends too, and a next one begins.
    """
    batch, length = first.shape
    places = torch.arange(length, device=first.device)
    begins = first == places
    if cut is not None and cut < length:
        begins = begins | (places == cut)
    numbers = begins.flatten().cumsum(0)
    room = documents + 1 + (batch if cut is not None else 0)
    # The n-th document starts where n begin: a search of sorted numbers, whose result has the length of what it seeks.
    sought = torch.arange(1, room + 1, device=first.device)
    return torch.searchsorted(numbers, sought, out_int32=True)
