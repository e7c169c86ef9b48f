"""GPT-NeoX' tensors as ours (megatron/model/transformer.py and word_embeddings.py there).

Cut over model-parallel ranks as Megatron-LM's. With as many key-value heads as heads, the joint projection's rows are
head by head [query | key | value]; with fewer, on each rank all its queries, then its keys, then its values. A gated
MLP's first matrix (linear1) holds on each rank up rows, then gate rows; the older dense_h_to_4h the one of a plain MLP,
the older w1, w3, w2 gate, up and down. In a parallel block (gpt_j_residual) each rank adds its bias of attention's and
the MLP's output before the sum over ranks, so that the model's bias is the sum of theirs; else they are all the same.
Norms of a parallel block drift apart between ranks (GPT-NeoX-20B's did); as in their own converter the mean is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.foreign.neox_folder import NeoxFiles
from megatron.foreign.pieces import (
    Assembly,
    ForeignTensors,
    Piece,
    StoredTensor,
    check_sizes,
    columns_of,
    computed,
    rows_of,
    whole_piece,
)

_WHY = "config and the number of ranks"
_SPELLED = {
    "attention.query_key_value": "qkv",
    "attention.dense": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.linear1": "fc1",
    "mlp.dense_h_to_4h": "fc1",
    "mlp.linear2": "fc2",
    "mlp.dense_4h_to_h": "fc2",
    "mlp.w1": "gate",
    "mlp.w3": "up",
    "mlp.w2": "fc2",
    "norm": "final_norm",
    "word_embeddings": "embedding",
    "position_embeddings": "positions",
    "final_linear": "head",
}
_KINDS = {"weight": "weight", "bias": "bias", "scale": "weight"}

Ranks = list[StoredTensor]


class NeoxLayers:
    """The layers' tensors by one set of names, each taken once."""

    def __init__(self, files: NeoxFiles) -> None:
        """Raises CheckpointError for a tensor that no plain GPT-NeoX has."""
        self._files = files
        self._left: dict[tuple[int, str], Ranks] = {}
        for number, ranks in files.layers.items():
            for theirs, stored in ranks[0].items():
                path, _, kind = theirs.rpartition(".")
                if path not in _SPELLED or kind not in _KINDS:
                    raise CheckpointError(
                        f"{stored}: is none of a plain GPT-NeoX or Llama, which is what can be imported"
                    )
                if any(theirs not in rank for rank in ranks):
                    raise CheckpointError(f"{stored}: is not on every model-parallel rank")
                self._left[number, f"{_SPELLED[path]}.{_KINDS[kind]}"] = [rank[theirs] for rank in ranks]

    def has(self, number: int, name: str) -> bool:
        """Whether a layer has a tensor that was not taken yet."""
        return (number, name) in self._left

    def take(self, number: int, name: str) -> Ranks:
        """A layer's tensor of every rank. Raises CheckpointError where it is missing."""
        if (number, name) not in self._left:
            raise CheckpointError(
                f"{self._files.folder}: layer {number} lacks {name} (in its own words), which the config says it has"
            )
        return self._left.pop((number, name))

    def check_empty(self) -> None:
        """Raises CheckpointError where a tensor was left over."""
        for stored in self._left.values():
            raise CheckpointError(f"{stored[0]}: the config does not say that the model has this tensor")

    def shown_by_weights(self, gated: bool) -> dict[str, Any]:
        """Keys of the [model] table that the first layer's tensors show: MLP's width, biases."""
        if self.has(2, "gate.weight"):
            inner, mlp_bias = sum(part.shape[0] for part in self._left[2, "gate.weight"]), self.has(2, "fc2.bias")
        else:
            parts = self._left.get((2, "fc1.weight")) or self.take(2, "fc1.weight")
            inner = sum(part.shape[0] for part in parts) // (2 if gated else 1)
            mlp_bias = self.has(2, "fc1.bias")
        joint, output = self.has(2, "qkv.bias"), self.has(2, "output.bias")
        return {
            "intermediate_size": inner,
            "mlp_bias": mlp_bias,
            "attention_bias": joint and output,
            "query_key_value_bias": joint and not output,
        }


def neox_tensors(files: NeoxFiles, shape: ModelShape) -> ForeignTensors:
    """The weights by our names. Raises CheckpointError naming file and tensor where one is missing, unknown, or of
    another size."""
    layers, assemblies = NeoxLayers(files), {}
    hidden, last = shape.hidden_size, shape.num_hidden_layers + 3
    assemblies["embedding.weight"] = _words(layers.take(0, "embedding.weight"), shape)
    if shape.position_embedding == "learned":
        size = (shape.max_position_embeddings, hidden)
        assemblies["positions.weight"] = _same(layers.take(0, "positions.weight"), size)
    for number in range(shape.num_hidden_layers):
        assemblies |= dict(_layer(layers, number, shape))
    for kind in _norm_kinds(shape):
        assemblies[f"final_norm.{kind}"] = _mean(layers.take(last, f"final_norm.{kind}"), (hidden,))
    if not shape.tie_word_embeddings:
        assemblies["head.weight"] = _words(layers.take(last + 1, "head.weight"), shape)
    layers.check_empty()
    return ForeignTensors(assemblies)


def _norm_kinds(shape: ModelShape) -> tuple[str, ...]:
    return ("weight", "bias") if shape.norm == "layernorm" else ("weight",)


def _layer(layers: NeoxLayers, number: int, shape: ModelShape) -> Iterator[tuple[str, Assembly]]:
    hidden, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    prefix, theirs = f"layers.{number}.", number + 2
    for norm in ("attention_norm", "mlp_norm"):
        for kind in _norm_kinds(shape):
            yield f"{prefix}{norm}.{kind}", _mean(layers.take(theirs, f"{norm}.{kind}"), (hidden,))
    yield from _joint(layers.take(theirs, "qkv.weight"), f"{prefix}attention.", "weight", shape)
    if shape.projection_bias:
        yield from _joint(layers.take(theirs, "qkv.bias"), f"{prefix}attention.", "bias", shape)
    yield f"{prefix}attention.output.weight", _cut_by_inputs(layers.take(theirs, "output.weight"), (hidden, query))
    if shape.attention_bias:
        yield f"{prefix}attention.output.bias", _output_bias(layers.take(theirs, "output.bias"), shape)
    yield from _mlp(layers, theirs, f"{prefix}mlp.", shape)


def _joint(parts: Ranks, prefix: str, kind: str, shape: ModelShape) -> Iterator[tuple[str, Assembly]]:
    size, heads, groups, ranks = shape.head_dim, shape.num_attention_heads, shape.num_key_value_heads, len(parts)
    rest = (shape.hidden_size,) if kind == "weight" else ()
    if heads % ranks or groups % ranks:
        raise CheckpointError(f"{parts[0]}: {heads} heads and {groups} groups cannot lie on {ranks} ranks")
    here = (heads + 2 * groups) // ranks * size
    for part in parts:
        check_sizes(part, (here, *rest), _WHY)
    for number, (name, count) in enumerate((("query", heads), ("key", groups), ("value", groups))):
        pieces: list[Piece] = []
        for head in range(count):
            rank, within = divmod(head, count // ranks)
            if groups == heads:
                row = (within * 3 + number) * size
            else:
                before = (0, heads // ranks, (heads + groups) // ranks)[number]
                row = (before + within) * size
            pieces += rows_of(parts, head * size, rank * here + row, size)
        yield f"{prefix}{name}.{kind}", computed(pieces, (count * size, *rest))


def _mlp(layers: NeoxLayers, theirs: int, prefix: str, shape: ModelShape) -> Iterator[tuple[str, Assembly]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    names = ("up", "gate") if shape.gated_mlp else ("up",)
    for kind in ("weight", "bias") if shape.mlp_bias else ("weight",):
        rest = (hidden,) if kind == "weight" else ()
        if layers.has(theirs, f"gate.{kind}"):
            for name in names:
                parts = layers.take(theirs, f"{name}.{kind}")
                check_sizes(parts[0], (inner // len(parts), *rest), _WHY)
                yield f"{prefix}{name}.{kind}", computed(list(rows_of(parts, 0, 0, inner)), (inner, *rest))
            continue
        parts = layers.take(theirs, f"fc1.{kind}")
        here = inner // len(parts)
        for part in parts:
            check_sizes(part, (here * len(names), *rest), _WHY)
        for number, name in enumerate(names):
            pieces: list[Piece] = []
            for rank in range(len(parts)):
                pieces += rows_of(parts, rank * here, (rank * len(names) + number) * here, here)
            yield f"{prefix}{name}.{kind}", computed(pieces, (inner, *rest))
    yield f"{prefix}down.weight", _cut_by_inputs(layers.take(theirs, "fc2.weight"), (hidden, inner))
    if shape.mlp_bias:
        yield f"{prefix}down.bias", _output_bias(layers.take(theirs, "fc2.bias"), shape)


def _cut_by_inputs(parts: Ranks, size: tuple[int, int]) -> Assembly:
    for part in parts:
        check_sizes(part, (size[0], size[1] // len(parts)), _WHY)
    return computed(list(columns_of(parts)), size)


def _output_bias(parts: Ranks, shape: ModelShape) -> Assembly:
    if shape.parallel_block and len(parts) > 1:
        return _over_ranks(parts, (shape.hidden_size,), "sum")
    return _same(parts, (shape.hidden_size,))


def _same(parts: Ranks, size: tuple[int, ...]) -> Assembly:
    for part in parts:
        check_sizes(part, size, _WHY)
    return computed([whole_piece(parts[0])], size)


def _mean(parts: Ranks, size: tuple[int, ...]) -> Assembly:
    return _over_ranks(parts, size, "mean") if len(parts) > 1 else _same(parts, size)


def _over_ranks(parts: Ranks, size: tuple[int, ...], join: Any) -> Assembly:
    for part in parts:
        check_sizes(part, size, _WHY)
    return computed([whole_piece(part) for part in parts], size, join)


def _words(parts: Ranks, shape: ModelShape) -> Assembly:
    for part in parts:
        check_sizes(part, (parts[0].shape[0], shape.hidden_size), _WHY)
    rows = sum(part.shape[0] for part in parts)
    if rows < shape.vocab_size:
        raise CheckpointError(
            f"{parts[0]}: {rows} words on {len(parts)} ranks, and the vocabulary has {shape.vocab_size}: is it this "
            "model's tokenizer?"
        )
    return computed(list(rows_of(parts, 0, 0, shape.vocab_size)), (shape.padded_vocab_size, shape.hidden_size))
