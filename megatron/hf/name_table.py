"""Which of our tensors is which of Hugging Face's: one declarative table for each architecture, read both ways.

An entry names our tensors and theirs, the size of ours in words of the ModelShape, and how they are laid out:

    same          the tensor itself
    vocabulary    rows past `vocab_size` are padding: cut off on export, zero on import
    per-head qkv  query, key and value interleaved head by head: [heads, 3, head_dim] rows (GPT-NeoX)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron.config.model_shape import ModelShape

Layout = Literal["same", "vocabulary", "per-head qkv"]
Condition = Literal["attention_bias", "mlp_bias", "layernorm", "gated_mlp", "untied", None]
LAYER = "{layer}"


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs. `size` are the dimensions of each of ours; `only_if` says which models have it."""

    ours: tuple[str, ...]
    theirs: str
    size: tuple[tuple[str, ...], ...]
    layout: Layout = "same"
    only_if: Condition = None


def _one(ours: str, theirs: str, *size: str, layout: Layout = "same", only_if: Condition = None) -> Entry:
    return Entry((ours,), theirs, (size,), layout, only_if)


_OURS = "layers.{layer}."
_LLAMA = "model.layers.{layer}."
_NEOX = "gpt_neox.layers.{layer}."
_QKV = ("query", "key", "value")

LLAMA: tuple[Entry, ...] = (
    _one("embedding.weight", "model.embed_tokens.weight", "vocabulary", "hidden", layout="vocabulary"),
    _one(_OURS + "attention_norm.weight", _LLAMA + "input_layernorm.weight", "hidden"),
    _one(_OURS + "attention.query.weight", _LLAMA + "self_attn.q_proj.weight", "query", "hidden"),
    _one(_OURS + "attention.query.bias", _LLAMA + "self_attn.q_proj.bias", "query", only_if="attention_bias"),
    _one(_OURS + "attention.key.weight", _LLAMA + "self_attn.k_proj.weight", "key", "hidden"),
    _one(_OURS + "attention.key.bias", _LLAMA + "self_attn.k_proj.bias", "key", only_if="attention_bias"),
    _one(_OURS + "attention.value.weight", _LLAMA + "self_attn.v_proj.weight", "value", "hidden"),
    _one(_OURS + "attention.value.bias", _LLAMA + "self_attn.v_proj.bias", "value", only_if="attention_bias"),
    _one(_OURS + "attention.output.weight", _LLAMA + "self_attn.o_proj.weight", "hidden", "query"),
    _one(_OURS + "attention.output.bias", _LLAMA + "self_attn.o_proj.bias", "hidden", only_if="attention_bias"),
    _one(_OURS + "mlp_norm.weight", _LLAMA + "post_attention_layernorm.weight", "hidden"),
    _one(_OURS + "mlp.gate.weight", _LLAMA + "mlp.gate_proj.weight", "intermediate", "hidden"),
    _one(_OURS + "mlp.gate.bias", _LLAMA + "mlp.gate_proj.bias", "intermediate", only_if="mlp_bias"),
    _one(_OURS + "mlp.up.weight", _LLAMA + "mlp.up_proj.weight", "intermediate", "hidden"),
    _one(_OURS + "mlp.up.bias", _LLAMA + "mlp.up_proj.bias", "intermediate", only_if="mlp_bias"),
    _one(_OURS + "mlp.down.weight", _LLAMA + "mlp.down_proj.weight", "hidden", "intermediate"),
    _one(_OURS + "mlp.down.bias", _LLAMA + "mlp.down_proj.bias", "hidden", only_if="mlp_bias"),
    _one("final_norm.weight", "model.norm.weight", "hidden"),
    _one("head.weight", "lm_head.weight", "vocabulary", "hidden", layout="vocabulary", only_if="untied"),
)

GPT_NEOX: tuple[Entry, ...] = (
    _one("embedding.weight", "gpt_neox.embed_in.weight", "vocabulary", "hidden", layout="vocabulary"),
    _one(_OURS + "attention_norm.weight", _NEOX + "input_layernorm.weight", "hidden"),
    _one(_OURS + "attention_norm.bias", _NEOX + "input_layernorm.bias", "hidden"),
    _one(_OURS + "mlp_norm.weight", _NEOX + "post_attention_layernorm.weight", "hidden"),
    _one(_OURS + "mlp_norm.bias", _NEOX + "post_attention_layernorm.bias", "hidden"),
    Entry(
        tuple(f"{_OURS}attention.{part}.weight" for part in _QKV),
        _NEOX + "attention.query_key_value.weight",
        (("query", "hidden"), ("key", "hidden"), ("value", "hidden")),
        "per-head qkv",
    ),
    Entry(
        tuple(f"{_OURS}attention.{part}.bias" for part in _QKV),
        _NEOX + "attention.query_key_value.bias",
        (("query",), ("key",), ("value",)),
        "per-head qkv",
        "attention_bias",
    ),
    _one(_OURS + "attention.output.weight", _NEOX + "attention.dense.weight", "hidden", "query"),
    _one(_OURS + "attention.output.bias", _NEOX + "attention.dense.bias", "hidden", only_if="attention_bias"),
    _one(_OURS + "mlp.up.weight", _NEOX + "mlp.dense_h_to_4h.weight", "intermediate", "hidden"),
    _one(_OURS + "mlp.up.bias", _NEOX + "mlp.dense_h_to_4h.bias", "intermediate"),
    _one(_OURS + "mlp.down.weight", _NEOX + "mlp.dense_4h_to_h.weight", "hidden", "intermediate"),
    _one(_OURS + "mlp.down.bias", _NEOX + "mlp.dense_4h_to_h.bias", "hidden"),
    _one("final_norm.weight", "gpt_neox.final_layer_norm.weight", "hidden"),
    _one("final_norm.bias", "gpt_neox.final_layer_norm.bias", "hidden"),
    _one("head.weight", "embed_out.weight", "vocabulary", "hidden", layout="vocabulary", only_if="untied"),
)


def entries(table: tuple[Entry, ...], shape: ModelShape) -> Iterator[Entry]:
    """The table's entries that `shape` has, with the layers counted out, in the table's order."""
    present = {
        "attention_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
        "layernorm": shape.norm == "layernorm",
        "gated_mlp": shape.gated_mlp,
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
    words = {
        "vocabulary": shape.padded_vocab_size,
        "hidden": shape.hidden_size,
        "intermediate": shape.intermediate_size,
        "query": shape.num_attention_heads * shape.head_dim,
        "key": shape.num_key_value_heads * shape.head_dim,
        "value": shape.num_key_value_heads * shape.head_dim,
    }
    return tuple(words[word] for word in size)


def their_size(entry: Entry, shape: ModelShape) -> tuple[int, ...]:
    """The dimensions of the tensor as Hugging Face holds it, the vocabulary without padding."""
    rows = sum(our_size(size, shape)[0] for size in entry.size)
    if entry.layout == "vocabulary":
        rows = shape.vocab_size
    return (rows, *our_size(entry.size[0], shape)[1:])
