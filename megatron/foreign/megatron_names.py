"""Names of a GPT's tensors in Megatron-LM's checkpoints, in the words of all its eras, as one set of names.

    legacy      language_model.encoder.layers.0.self_attention.query_key_value.weight, nested dictionaries on the way
                (transformer for encoder and attention for self_attention until 2021; …_layernorm for …_norm until 2023)
    mcore       decoder.layers.0.self_attention.linear_qkv.weight, in one flat dictionary; norms of their own
                (transformer implementation "local") or held by the matrix that reads them (Transformer Engine's)

The one set: embedding.weight, positions.weight, head.weight, final_norm.weight, and of a layer of this file
layers.0.{attention_norm,qkv,output,mlp_norm,fc1,fc2,query_norm,key_norm}.weight; the same with .bias.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Era = Literal["legacy", "mcore"]

_ENDS = {
    "embedding.word_embeddings": "embedding",
    "embedding.position_embeddings": "positions",
    "output_layer": "head",
    "word_embeddings_for_head": "head",
    "word_embeddings": "head",
    "encoder.final_norm": "final_norm",
    "encoder.final_layernorm": "final_norm",
    "transformer.final_layernorm": "final_norm",
    "decoder.final_layernorm": "final_norm",
    "decoder.final_norm": "final_norm",
}
_LEGACY_LAYER = {
    "input_norm": "attention_norm",
    "input_layernorm": "attention_norm",
    "self_attention.query_key_value": "qkv",
    "attention.query_key_value": "qkv",
    "self_attention.dense": "output",
    "attention.dense": "output",
    "post_attention_norm": "mlp_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "fc1",
    "mlp.dense_4h_to_h": "fc2",
}
_CORE_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_qkv.layer_norm": "attention_norm",
    "self_attention.q_layernorm": "query_norm",
    "self_attention.k_layernorm": "key_norm",
    "self_attention.linear_proj": "output",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "fc1",
    "mlp.linear_fc1.layer_norm": "mlp_norm",
    "mlp.linear_fc2": "fc2",
}
_LAYER = re.compile(r"(?:encoder|transformer|decoder)\.layers\.(\d+)\.(.+)")
_KIND = re.compile(r"(.+)[._](weight|bias)")
_NOT_WEIGHTS = ("_extra_state", "inv_freq")
"""What modules keep beside weights: Transformer Engine's scales of fp8, rotary frequencies of some forks."""


def is_weight(name: str) -> bool:
    """Whether a tensor is a parameter of the model."""
    return not any(part in name for part in _NOT_WEIGHTS)


def era_of(name: str) -> Era:
    """In which words a tensor is named."""
    return "legacy" if name.startswith(("language_model.", "word_embeddings")) else "mcore"


def one_name(name: str) -> str | None:
    """The name in the one set; None for a tensor that no plain GPT has."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    layers = _LEGACY_LAYER if era_of(name) == "legacy" else _CORE_LAYER
    split = _KIND.fullmatch(name.removeprefix("language_model."))
    if split is None:
        return None
    path, kind = split.groups()
    if found := _LAYER.fullmatch(path):
        part = layers.get(found[2])
        return None if part is None else f"layers.{int(found[1])}.{part}.{kind}"
    part = _ENDS.get(path)
    return None if part is None else f"{part}.{kind}"


Spelling = Literal["legacy", "mcore", "mcore-local"]
"""Names to write: legacy's last ones, mcore's with Transformer Engine's fused layers, or with layers of its own."""

_WRITTEN_CORE = {
    "embedding": "embedding.word_embeddings",
    "positions": "embedding.position_embeddings",
    "head": "output_layer",
    "tied_head": "output_layer",
    "final_norm": "decoder.final_layernorm",
    "attention_norm": "self_attention.linear_qkv.layer_norm",
    "qkv": "self_attention.linear_qkv",
    "query_norm": "self_attention.q_layernorm",
    "key_norm": "self_attention.k_layernorm",
    "output": "self_attention.linear_proj",
    "mlp_norm": "mlp.linear_fc1.layer_norm",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
_WRITTEN: dict[Spelling, dict[str, str]] = {
    "legacy": {
        "embedding": "language_model.embedding.word_embeddings",
        "positions": "language_model.embedding.position_embeddings",
        "head": "language_model.output_layer",
        "tied_head": "word_embeddings_for_head",
        "final_norm": "language_model.encoder.final_norm",
        "attention_norm": "input_norm",
        "qkv": "self_attention.query_key_value",
        "output": "self_attention.dense",
        "mlp_norm": "post_attention_norm",
        "fc1": "mlp.dense_h_to_4h",
        "fc2": "mlp.dense_4h_to_h",
    },
    "mcore": _WRITTEN_CORE,
    "mcore-local": _WRITTEN_CORE | {"attention_norm": "input_layernorm", "mlp_norm": "pre_mlp_layernorm"},
}
_NESTS = frozenset(
    [
        "language_model",
        "embedding",
        "word_embeddings",
        "position_embeddings",
        "encoder",
        "output_layer",
        "word_embeddings_for_head",
    ]
)


def written_name(name: str, spelling: Spelling) -> str:
    """How the one set's name is written."""
    path, kind = name.rsplit(".", 1)
    if not path.startswith("layers."):
        return f"{_WRITTEN[spelling][path]}.{kind}"
    _, number, part = path.split(".")
    layers = "language_model.encoder.layers" if spelling == "legacy" else "decoder.layers"
    there = _WRITTEN[spelling][part]
    return f"{layers}.{number}.{there}{'_' if there.endswith('layer_norm') else '.'}{kind}"


def extra_states(layers: int, spelling: Spelling) -> Iterator[str]:
    """Names of the states that Transformer Engine's linear modules keep beside weights: empty here, but a strict reader
    looks for them. Other modules have none, or fill in what is missing."""
    if spelling == "mcore":
        parts = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        yield from (f"decoder.layers.{number}.{part}._extra_state" for number in range(layers) for part in parts)


def nested(flat: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Legacy's dictionaries within dictionaries, of names joined with dots; the encoder's own stay joined."""
    found: OrderedDict[str, Any] = OrderedDict()
    for name, value in flat.items():
        here, rest = found, name.split(".")
        while rest[0] in _NESTS:
            here = here.setdefault(rest.pop(0), OrderedDict())
        here[".".join(rest)] = value
    return found
