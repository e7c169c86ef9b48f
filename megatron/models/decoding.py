"""Decoding with a cache of keys and values: the training decoder itself, whose attention reads what was kept.

Nothing of the model is defined here again. `decoding_part` makes a second Decoder of the same modules around the same
parameters, of which only the core of attention is another: it writes this call's keys and values behind those of the
calls before and attends to them all. A token's slot in the cache is its position in its row, so that prompts of
different lengths stand in one batch, filled up on the right, and each row goes on from its own end.

On a rank of a layout it is that rank's part: tokens or hidden states in, hidden states or logits out. Tensor ranks call
it together, with the same tokens; pipeline stages one after the other, each with the hidden states of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from megatron.kernels.attention import attention_sdpa
from megatron.kernels.choice import Kernels
from megatron.models.attention import AttentionPlan, turning
from megatron.models.decoder import Decoder, DecoderLayer
from megatron.models.positions import check_length
from megatron.parallel.axis import ALONE
from megatron.parallel.tensor_mappings import gather_from_sequence

DEFINITIONS = Kernels(attention="sdpa")
"""One-token steps are too small for compiled or 8-bit products to pay."""


@dataclass(frozen=True)
class _Call:
    """Where this call's tokens go, the same for all layers; b rows of T columns.

    starts: slots that are filled before, by row. even: every row has the same start and no column is padding.
    slots: int64 [b, T] where each token's keys go; None where even. visible: bool [b, 1, T, ends] keys that each query
    sees; None where all of the first `end` slots are, or where fresh. fresh: nothing was kept before, so that
    attention is causal over this call's own keys.
    """

    starts: list[int]
    length: int
    end: int
    even: bool
    fresh: bool
    slots: Tensor | None
    visible: Tensor | None


@dataclass(frozen=True)
class _LayerCache:
    """Keys and values of one layer [b, groups, capacity + 1, d], and the call at hand. In the place of a mask."""

    keys: Tensor
    values: Tensor
    call: _Call


def decoding_part(model: Decoder, kernels: Kernels = DEFINITIONS) -> Decoder:
    """A Decoder around the same parameters that decodes: in eval mode, without sequence or context parallel, and with
    cached attention. What was compiled or recomputes in `model` stays there.

    For parameters that are plain tensors; sharded ones must be gathered first.
    """
    place = replace(model.place, sequence=False, context=ALONE, context_method="auto", split_backward=False)
    with torch.device("meta"):
        part = Decoder(model.shape, kernels, place)
    part.load_state_dict(dict(model.named_parameters()), assign=True)
    for layer in part.layers.values():
        assert isinstance(layer, DecoderLayer)
        layer.attention.core = _cached_attention  # type: ignore[assignment]
    return part.eval()


class CachedDecoder:
    """This rank's part of a model and what it has kept of a batch of rows. `lengths`: tokens kept, by row."""

    def __init__(self, model: Decoder, rows: int, capacity: int, kernels: Kernels = DEFINITIONS) -> None:
        """capacity: tokens that a row may have, prompt and answer together. Memory for them is taken at once.

        Raises ConfigError where learned positions end before.
        """
        check_length(model.shape, capacity)
        part = decoding_part(model, kernels)
        self.part, self.capacity, self.lengths = part, capacity, [0] * rows
        weight = next(part.parameters())
        # One slot more than there are tokens: what padding writes goes there.
        size = (2, rows, _groups(part), capacity + 1, part.shape.head_dim)
        empty = [weight.new_zeros(size) for _ in part.layers]
        self._kept = dict(zip(part.layers, empty, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(kept.nbytes for kept in self._kept.values())

    @torch.no_grad()
    def extend(self, x: Tensor, counts: Sequence[int] | None = None, *, every: bool = False) -> Tensor:
        """Goes on by some tokens in every row.

        x: tokens int64 [b, T] where the embedding is here, else hidden states [b, T, hidden]. counts: how many of a
        row's columns are tokens, from the left; the rest is padding of any value. None: all. A row of 0 stands still,
        and what is returned for it means nothing.

        Returns hidden states [b, T, hidden] where the head is elsewhere; else logits of the next token in the weights'
        dtype, padding words left out, the same on all tensor ranks: [b, vocab_size] behind each row's last token, with
        `every` [b, T, vocab_size] behind every column. Raises ValueError where a row would grow beyond the capacity.
        """
        batch, length = x.shape[:2]
        counts = [length] * batch if counts is None else list(counts)
        call, positions = self._call(batch, length, counts, x.device)
        if self.part.place.first:
            x = self.part.embedded(x, positions)
        shape = self.part.shape
        table = turning(shape, positions, x.dtype)
        tables = (table, turning(shape, positions, x.dtype, slides=True) if shape.sliding_pattern else table)
        calls = (call, _windowed(call, positions, shape.sliding_window) if shape.window_bites(call.end) else call)
        for number, layer in self.part.layers.items():
            keys, values = self._kept[number]
            caches = [_LayerCache(keys, values, each) for each in calls]
            whole, local = map(AttentionPlan, tables, caches)  # type: ignore[arg-type]
            x = layer(x, replace(whole, local=local))
        self.lengths = [start + count for start, count in zip(self.lengths, counts, strict=True)]
        if self.part.final_norm is None:
            return x
        if not every:
            last = torch.tensor([max(count - 1, 0) for count in counts], device=x.device)
            x = x[torch.arange(batch, device=x.device), last, None]
        logits = self._logits(self.part.final_norm(x))
        return logits if every else logits[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone, in this order; a row may be named more than once (beams)."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        for number, kept in self._kept.items():
            self._kept[number] = kept.index_select(1, index.to(kept.device))
        self.lengths = [self.lengths[row] for row in rows]

    def _call(self, batch: int, length: int, counts: list[int], device: torch.device) -> tuple[_Call, Tensor]:
        """The call, and the position of each column, int64 [b or 1, T]."""
        starts = self.lengths
        if len(counts) != batch or batch != len(starts):
            raise ValueError(f"{batch} rows with {len(counts)} counts for a cache of {len(starts)} rows")
        if length < 1 or not all(0 <= count <= length for count in counts):
            raise ValueError(f"counts of 0 to {length} tokens are expected, not {counts}")
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(ends) > self.capacity:
            raise ValueError(f"a row of {max(ends)} tokens in a cache for {self.capacity}")
        even = len(set(starts)) == 1 and min(counts) == length
        fresh = max(starts) == 0
        rows = starts[:1] if even else starts
        positions = torch.tensor(rows, device=device)[:, None] + torch.arange(length, device=device)
        positions = positions.clamp(max=self.capacity - 1)  # of padding: there may be no vector for those beyond
        slots, visible = None, None
        if not even:
            padding = torch.arange(length, device=device) >= torch.tensor(counts, device=device)[:, None]
            slots = positions.masked_fill(padding, self.capacity)
        if not fresh and not (even and length == 1):
            visible = torch.arange(max(ends), device=device) <= positions[:, None, :, None]
        return _Call(starts, length, max(ends), even, fresh, slots, visible), positions

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = functional.linear(hidden, self.part.head_weight)
        axis = self.part.place.tensor
        if not axis.alone:
            # ranks' words lie one behind the other, as positions do under sequence parallel
            logits = gather_from_sequence(logits.flatten(0, 1), axis).unflatten(0, logits.shape[:2])
        return logits[..., : self.part.shape.vocab_size]


def _windowed(call: _Call, positions: Tensor, window: int) -> _Call:
    """The call for layers whose queries, at positions [b or 1, T], see no more than the window's last keys."""
    keys, queries = torch.arange(call.end, device=positions.device), positions[:, None, :, None]
    return replace(call, fresh=False, visible=(keys <= queries) & (keys > queries - window))


def _groups(part: Decoder) -> int:
    """Key-value heads of this tensor rank."""
    return max(1, part.shape.num_key_value_heads // part.place.tensor.size)


def _cached_attention(query: Tensor, key: Tensor, value: Tensor, cache: _LayerCache, *_: object) -> Tensor:
    """In the place of `context_attention`: query [b, groups, T, heads a group, d], key and value [b, groups, T, 1, d]
    of this call's tokens -> [b, T, groups * heads a group * d]."""
    call = cache.call
    _write(cache.keys, key.squeeze(3), call)
    _write(cache.values, value.squeeze(3), call)
    if call.fresh:
        return attention_sdpa(query, key, value, None)
    keys, values = cache.keys[:, :, : call.end], cache.values[:, :, : call.end]
    if call.length > 1:
        return attention_sdpa(query, keys[:, :, :, None], values[:, :, :, None], call.visible)
    return _one_token(query, keys, values, call.visible)


def _write(kept: Tensor, new: Tensor, call: _Call) -> None:
    """New keys or values [b, groups, T, d] to their slots of kept [b, groups, capacity + 1, d]."""
    if call.slots is None:
        kept[:, :, call.starts[0] : call.starts[0] + call.length] = new
    else:
        rows = torch.arange(new.shape[0], device=new.device)[:, None]
        kept[rows, :, call.slots] = new.transpose(1, 2)


def _one_token(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of one query a head, as two products: SDPA would repeat keys and values for each head of a group.

    query [b, groups, 1, heads a group, d], keys and values [b, groups, K, d]; visible [b, 1, 1, K].
    """
    batch, groups, _, heads, size = query.shape
    scores = torch.matmul(query.squeeze(2) * size**-0.5, keys.transpose(2, 3))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide).to(values.dtype)
    return torch.matmul(weights, values).reshape(batch, 1, groups * heads * size)
