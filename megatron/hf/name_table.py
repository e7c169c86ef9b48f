"""Which of our tensors is which of Hugging Face's: the words of the tables in `families/`, read both ways.

An entry names our tensors and theirs, the size of ours in words of the ModelShape, and how they are laid out:

    same              the tensor itself
    vocabulary        rows past `vocab_size` are padding: cut off on export, zero on import
    per-head qkv      query, key and value interleaved head by head: [heads, 3, head_dim] rows (GPT-NeoX)
    interleaved heads rows 0, d/2, 1, d/2 + 1, ... of each head of ours: rotary positions that turn neighbours (Cohere)
    stacked           the rows of ours one after the other (Phi-3's qkv_proj and gate_up_proj)
    transposed        [inputs, outputs] where ours is [outputs, inputs] (GPT-2's Conv1D)
    transposed stack  ours stacked, then transposed (GPT-2's c_attn)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron.config.model_shape import ModelShape

Layout = Literal["same", "vocabulary", "per-head qkv", "interleaved heads", "stacked", "transposed", "transposed stack"]
Condition = Literal["qkv_bias", "output_bias", "mlp_bias", "untied", None]
LAYER = "{layer}"
OURS = "layers.{layer}."


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs. `size` are the dimensions of each of ours; `only_if` says which models have it."""

    ours: tuple[str, ...]
    theirs: str
    size: tuple[tuple[str, ...], ...]
    layout: Layout = "same"
    only_if: Condition = None

    @property
    def transposed(self) -> bool:
        """Whether their rows are our columns."""
        return self.layout in ("transposed", "transposed stack")


def one(ours: str, theirs: str, *size: str, layout: Layout = "same", only_if: Condition = None) -> Entry:
    """The entry of one tensor of ours."""
    return Entry((ours,), theirs, (size,), layout, only_if)


def words(ours: str, theirs: str, only_if: Condition = None) -> Entry:
    """The entry of a matrix with a row for each word."""
    return one(ours, theirs, "vocabulary", "hidden", layout="vocabulary", only_if=only_if)


def joined(parts: dict[str, str], theirs: str, *inputs: str, layout: Layout, only_if: Condition = None) -> Entry:
    """The entry of several of ours in one of theirs. parts: our names, each with the word of its first dimension."""
    return Entry(tuple(parts), theirs, tuple((size, *inputs) for size in parts.values()), layout, only_if)


def query_key_value(kind: str) -> dict[str, str]:
    """The names and first dimensions of the three projections' `weight` or `bias`."""
    return {f"{OURS}attention.{part}.{kind}": part for part in ("query", "key", "value")}


def entries(table: tuple[Entry, ...], shape: ModelShape) -> Iterator[Entry]:
    """The table's entries that `shape` has, with the layers counted out, in the table's order."""
    present = {
        "qkv_bias": shape.attention_bias or shape.query_key_value_bias,
        "output_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
        "untied": not shape.tie_word_embeddings,
        None: True,
    }
    for entry in table:
        if not present[entry.only_if]:
            continue
        if LAYER not in entry.theirs:
            yield entry
            continue
        for layer in range(shape.num_hidden_layers):
            number = str(layer)
            ours = tuple(name.replace(LAYER, number) for name in entry.ours)
            yield replace(entry, ours=ours, theirs=entry.theirs.replace(LAYER, number))


def our_size(size: tuple[str, ...], shape: ModelShape) -> tuple[int, ...]:
    """The dimensions of one of our tensors, the vocabulary padded."""
    sizes = {
        "vocabulary": shape.padded_vocab_size,
        "positions": shape.max_position_embeddings,
        "hidden": shape.hidden_size,
        "intermediate": shape.intermediate_size,
        "query": shape.num_attention_heads * shape.head_dim,
        "key": shape.num_key_value_heads * shape.head_dim,
        "value": shape.num_key_value_heads * shape.head_dim,
        "head": shape.head_dim,
    }
    return tuple(sizes[word] for word in size)


def their_size(entry: Entry, shape: ModelShape) -> tuple[int, ...]:
    """The dimensions of the tensor as Hugging Face holds it, the vocabulary without padding."""
    rows = sum(our_size(size, shape)[0] for size in entry.size)
    if entry.layout == "vocabulary":
        rows = shape.vocab_size
    size = (rows, *our_size(entry.size[0], shape)[1:])
    return size[::-1] if entry.transposed else size
