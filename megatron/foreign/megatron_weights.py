"""Megatron-LM's tensors as ours: how its tensor and pipeline ranks cut a GPT, and where each of our rows lies.

Matrices that read the residual stream are cut by outputs, those that write to it by inputs, the embedding by words
(arXiv 1909.08053); norms and the biases of the latter are whole on every tensor rank. Rows of the joint query, key and
value projection, by checkpoint_version (megatron/training/checkpointing.py there, fix_query_key_value_ordering):

    2 and 3   over all ranks together: group by group [heads of the group | key | value], each head_dim rows
    1         on each rank: [heads, head_dim, 3], so that query, key and value take turns row by row
    0         on each rank: [3, heads, head_dim], all queries before all keys before all values

A gated MLP's first matrix holds on each rank that rank's gate rows, then its up rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.foreign.megatron_folder import Chunk, MegatronFiles
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

_WHY = "args and the number of tensor ranks"


@dataclass(frozen=True)
class Habits:
    """How a checkpoint stores what it stores.

    interleaved: rotary pairs are neighbours, not a half apart. norm_plus: what its norms' weights lack.
    """

    version: float = 3.0
    interleaved: bool = False
    norm_plus: float = 0.0


def layer_counts(chunks: Sequence[Chunk]) -> list[int]:
    """How many layers each chunk holds. Raises CheckpointError where one between the first and the last is missing."""
    counts = []
    for chunk in chunks:
        numbers = {int(name.split(".")[1]) for name in chunk[0] if name.startswith("layers.")}
        if numbers != set(range(len(numbers))):
            gap = min(set(range(max(numbers) + 1)) - numbers)
            file = next(iter(chunk[0].values())).file.path
            raise CheckpointError(f"{file}: holds layers up to {max(numbers)} of its own, but not number {gap}")
        counts.append(len(numbers))
    return counts


def megatron_tensors(files: MegatronFiles, shape: ModelShape, habits: Habits) -> ForeignTensors:
    """The weights by our names. Raises CheckpointError naming file and tensor where one is missing, unknown to the
    shape, or of another size."""
    left = {(number, name) for number, chunk in enumerate(files.chunks) for name in chunk[0]}
    assemblies: dict[str, Assembly] = {}

    def parts(number: int, name: str) -> list[StoredTensor]:
        chunk = files.chunks[number]
        if name not in chunk[0]:
            where = next(iter(chunk[0].values())).file.path if chunk[0] else files.folder
            raise CheckpointError(f"{where}: lacks {name} (in its own words), which args say the model has")
        left.discard((number, name))
        return [rank[name] for rank in chunk]

    last = len(files.chunks) - 1
    assemblies |= _embedding(parts(0, "embedding.weight"), "embedding.weight", shape)
    if shape.position_embedding == "learned":
        assemblies["positions.weight"] = _whole(
            parts(0, "positions.weight"), (shape.max_position_embeddings, shape.hidden_size)
        )
    first = 0
    for number, count in enumerate(layer_counts(files.chunks)):
        for layer in range(count):
            names = [name for name, _, _ in _layer_sizes(shape)]
            own = {name: parts(number, f"layers.{layer}.{name}") for name in names}
            assemblies |= dict(_layer(own, f"layers.{first + layer}.", shape, habits))
        first += count
    if first != shape.num_hidden_layers:
        raise CheckpointError(
            f"{files.folder}: holds {first} layers, and args.num_layers says {shape.num_hidden_layers}"
        )
    for kind in _norm_kinds(shape):
        stored = parts(last, f"final_norm.{kind}")
        assemblies[f"final_norm.{kind}"] = _norm(stored, kind, shape.hidden_size, habits)
    if not shape.tie_word_embeddings:
        assemblies |= _embedding(parts(last, "head.weight"), "head.weight", shape)
    elif "head.weight" in files.chunks[last][0]:
        _check_copy(parts(0, "embedding.weight"), parts(last, "head.weight"))
    if left:
        number, name = sorted(left)[0]
        raise CheckpointError(f"{files.chunks[number][0][name]}: args do not say that the model has this tensor")
    return ForeignTensors(assemblies)


def _norm_kinds(shape: ModelShape) -> tuple[str, ...]:
    return ("weight", "bias") if shape.norm == "layernorm" else ("weight",)


def _layer_sizes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """A layer's tensors in the one set of names: whole size, and the dimension that tensor ranks cut (None: none)."""
    hidden, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    query = shape.num_attention_heads * head
    joint = query + 2 * shape.num_key_value_heads * head
    wide = (2 if shape.gated_mlp else 1) * inner
    for norm in ("attention_norm", "mlp_norm"):
        yield from ((f"{norm}.{kind}", (hidden,), None) for kind in _norm_kinds(shape))
    yield "qkv.weight", (joint, hidden), 0
    yield "output.weight", (hidden, query), 1
    yield "fc1.weight", (wide, hidden), 0
    yield "fc2.weight", (hidden, inner), 1
    if shape.projection_bias:
        yield "qkv.bias", (joint,), 0
    if shape.attention_bias:
        yield "output.bias", (hidden,), None
    if shape.mlp_bias:
        yield "fc1.bias", (wide,), 0
        yield "fc2.bias", (hidden,), None
    if shape.qk_norm == "head":
        yield "query_norm.weight", (head,), None
        yield "key_norm.weight", (head,), None


def _layer(
    own: Mapping[str, Sequence[StoredTensor]], prefix: str, shape: ModelShape, habits: Habits
) -> Iterator[tuple[str, Assembly]]:
    for name, size, cut in _layer_sizes(shape):
        parts = own[name]
        for part in parts:
            wanted = list(size)
            if cut is not None:
                wanted[cut], left = divmod(size[cut], len(parts))
                if left:
                    raise CheckpointError(
                        f"{part}: {size[cut]} rows or columns cannot lie on {len(parts)} tensor ranks"
                    )
            check_sizes(part, wanted, _WHY)
        part_name, kind = name.split(".")
        if part_name in ("attention_norm", "mlp_norm"):
            yield prefix + name, _norm(parts, kind, size[0], habits)
        elif part_name in ("query_norm", "key_norm"):
            pieces = tuple(_head(parts[:1], 0, 0, shape, habits.interleaved))
            yield f"{prefix}attention.{name}", computed(pieces, size, plus=habits.norm_plus)
        elif part_name == "qkv":
            yield from _joint(parts, kind, prefix, shape, habits)
        elif part_name == "fc1":
            yield from _fc1(parts, kind, prefix, shape)
        else:
            ours = f"{prefix}{'attention.output' if part_name == 'output' else 'mlp.down'}.{kind}"
            yield ours, computed([whole_piece(parts[0])] if cut is None else list(columns_of(parts)), size)


def _joint(
    parts: Sequence[StoredTensor], kind: str, prefix: str, shape: ModelShape, habits: Habits
) -> Iterator[tuple[str, Assembly]]:
    """Query, key and value of the joint projection's weight or bias."""
    rest = parts[0].shape[1:]
    counts = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    for number, (name, heads) in enumerate(zip(("query", "key", "value"), counts, strict=True)):
        pieces: list[Piece] = []
        for head in range(heads):
            ours = head * shape.head_dim
            if habits.version >= 2:
                theirs = _row_in_groups(number, head, shape)
                pieces += _head(parts, ours, theirs, shape, habits.interleaved and number < 2)
            else:
                theirs, step = _row_on_rank(number, head, shape, len(parts), habits.version)
                pieces += rows_of(parts, ours, theirs, shape.head_dim, step)
        yield f"{prefix}attention.{name}.{kind}", computed(pieces, (heads * shape.head_dim, *rest))


def _row_in_groups(number: int, head: int, shape: ModelShape) -> int:
    """Where a head's rows begin in versions 2 and 3. number: 0 query, 1 key, 2 value."""
    each = shape.num_attention_heads // shape.num_key_value_heads
    group, within = divmod(head, each) if number == 0 else (head, each + number - 1)
    return (group * (each + 2) + within) * shape.head_dim


def _row_on_rank(number: int, head: int, shape: ModelShape, ranks: int, version: float) -> tuple[int, int]:
    """Where a head's rows begin in versions 0 and 1, counted over all ranks, and how far apart they are."""
    size, here = shape.head_dim, shape.num_attention_heads // ranks
    rank, within = divmod(head, here)
    before = rank * here * 3 * size
    if version == 0:
        return before + (number * here + within) * size, 1
    return before + within * size * 3 + number, 3


def _head(
    parts: Sequence[StoredTensor], ours: int, theirs: int, shape: ModelShape, interleaved: bool
) -> Iterator[Piece]:
    """A head's rows; of interleaved pairs the first ones go to the first half of what is turned, the others behind."""
    size, turned = shape.head_dim, shape.rotary_dim if interleaved else 0
    if turned:
        yield from rows_of(parts, ours, theirs, turned // 2, 2)
        yield from rows_of(parts, ours + turned // 2, theirs + 1, turned // 2, 2)
    if size > turned:
        yield from rows_of(parts, ours + turned, theirs + turned, size - turned)


def _fc1(parts: Sequence[StoredTensor], kind: str, prefix: str, shape: ModelShape) -> Iterator[tuple[str, Assembly]]:
    inner, rest = shape.intermediate_size, parts[0].shape[1:]
    names = ("gate", "up") if shape.gated_mlp else ("up",)
    here = inner // len(parts)
    for number, name in enumerate(names):
        pieces: list[Piece] = []
        for rank in range(len(parts)):
            pieces += rows_of(parts, rank * here, (rank * len(names) + number) * here, here)
        yield f"{prefix}mlp.{name}.{kind}", computed(pieces, (inner, *rest))


def _norm(parts: Sequence[StoredTensor], kind: str, size: int, habits: Habits) -> Assembly:
    for part in parts:
        check_sizes(part, (size,), _WHY)
    return computed([whole_piece(parts[0])], (size,), plus=habits.norm_plus if kind == "weight" else 0.0)


def _whole(parts: Sequence[StoredTensor], size: tuple[int, ...]) -> Assembly:
    for part in parts:
        check_sizes(part, size, _WHY)
    return computed([whole_piece(parts[0])], size)


def _embedding(parts: Sequence[StoredTensor], name: str, shape: ModelShape) -> dict[str, Assembly]:
    """Words of all ranks; those past the vocabulary are padding, left out."""
    for part in parts:
        check_sizes(part, (parts[0].shape[0], shape.hidden_size), _WHY)
    rows = sum(part.shape[0] for part in parts)
    if rows < shape.vocab_size:
        raise CheckpointError(
            f"{parts[0]}: {rows} words on {len(parts)} tensor ranks, and the vocabulary has {shape.vocab_size}: is it "
            "this model's tokenizer?"
        )
    pieces = list(rows_of(parts, 0, 0, shape.vocab_size))
    return {name: computed(pieces, (shape.padded_vocab_size, shape.hidden_size))}


def _check_copy(embedding: Sequence[StoredTensor], head: Sequence[StoredTensor]) -> None:
    """Raises CheckpointError where the last stage's copy of a tied embedding is another tensor."""
    for ours, copy in zip(embedding, head, strict=True):
        check_sizes(copy, ours.shape, f"the embedding that it is a copy of, {ours},")
        step = max(1, 2**22 // max(1, ours.shape[1]))
        for row in range(0, ours.shape[0], step):
            box = (min(step, ours.shape[0] - row), ours.shape[1])
            if not torch.equal(ours.read((row, 0), box), copy.read((row, 0), box)):
                raise CheckpointError(
                    f"{copy}: differs from {ours} between rows {row} and {row + box[0]}, and args say that the head is "
                    "the embedding (no --untie-embeddings-and-output-weights): the checkpoint contradicts itself"
                )


def drifted(files: MegatronFiles) -> list[tuple[str, float]]:
    """Tensors that every tensor rank should hold alike and does not, with the largest difference."""
    found: list[tuple[str, float]] = []
    for chunk in files.chunks:
        for name, stored in chunk[0].items():
            part = name.rsplit(".", 2)[-2]
            alike = (
                part.endswith("norm") or part == "positions" or (name.endswith(".bias") and part in ("output", "fc2"))
            )
            if not alike:
                continue
            first = stored.read((0,) * len(stored.shape), stored.shape)
            others = (rank[name] for rank in chunk[1:])
            differences = [(first.double() - o.read((0,) * len(o.shape), o.shape).double()).abs().max() for o in others]
            if differences and (largest := float(max(differences))) > 0:
                found.append((str(stored), largest))
    return found
