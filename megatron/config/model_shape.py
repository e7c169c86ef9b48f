"""The decoder's shape with nothing left open: preset, the user's fields and the tokenizer, resolved and checked.

Free of torch, so that a login node can plan with it.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, get_args

from pydantic import BaseModel

from megatron.config.errors import ConfigError
from megatron.config.model_section import FamilyName
from megatron.config.presets import LLAMA_STYLE, PRESETS
from megatron.config.rope_scaling import RopeScaling, rope_scaling_of
from megatron.config.schema import ModelSection

VOCABULARY_MULTIPLE = 64
"""The embedding's rows are padded to a multiple of this, so that GEMMs stay aligned. Padding is never data."""

NO_FUNCTION = {"document_mask", "family", "hidden_dropout", "initializer_range", "max_position_embeddings"}
"""Fields of a ModelShape in which weights that are put together may differ: they say how to train, or how far."""

_MUST_BE_SAID = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """A resolved decoder. Fields are named as in Hugging Face's configs; sizes are counts, not bytes."""

    vocab_size: int
    padded_vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    hidden_act: str
    gated_mlp: bool
    norm: str
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    parallel_block: bool
    rope_theta: float
    partial_rotary_factor: float
    tie_word_embeddings: bool
    initializer_range: float
    document_mask: bool
    max_position_embeddings: int
    hidden_dropout: float = 0.0
    query_key_value_bias: bool = False
    qk_norm: str = "none"
    norm_place: str = "before"
    norm_unit_offset: bool = False
    position_embedding: str = "rope"
    rope_scaling: RopeScaling | None = None
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 0.0
    sliding_window: int = 0
    sliding_pattern: int = 0
    rope_local_theta: float = 0.0
    shared_norm: bool = False
    logit_multiplier: float = 1.0
    family: str = ""

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that the rotary embedding turns; even, 0 for learned positions."""
        return 0 if self.position_embedding == "learned" else int(self.head_dim * self.partial_rotary_factor)

    @property
    def projection_bias(self) -> bool:
        """Whether query, key and value have biases."""
        return self.attention_bias or self.query_key_value_bias

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.attention_multiplier or self.head_dim**-0.5

    @property
    def norms_before(self) -> bool:
        """Whether a layer norms what attention and MLP read."""
        return self.norm_place != "after"

    @property
    def norms_after(self) -> bool:
        """Whether a layer norms what attention and MLP give, before it is added to the residual stream."""
        return self.norm_place != "before"

    @property
    def norms_a_layer(self) -> int:
        """How many norms of the residual stream's width a layer has."""
        return (1 if self.shared_norm else 2) * self.norms_before + 2 * self.norms_after

    def slides(self, layer: int) -> bool:
        """Whether a layer's tokens see no further back than the sliding window."""
        return self.sliding_window > 0 and not (self.sliding_pattern and (layer + 1) % self.sliding_pattern == 0)

    def window_bites(self, seq_length: int | None = None) -> bool:
        """Whether some layer's tokens see less than all that is before them in a sequence of this length, or of the
        longest."""
        return 0 < self.sliding_window < (seq_length or self.max_position_embeddings)

    def attended_lengths(self, seq_length: int, *, causal: bool = True) -> int:
        """Over all layers, the length of the sequence whose attention costs as much as theirs: T without a sliding
        window; with one of w < T positions 2w - w^2 / T, twice the mean of what is visible (causal), or w."""
        window, each = self.sliding_window, seq_length
        if self.window_bites(seq_length):
            each = 2 * window - window * window // seq_length if causal else window
        sliding = sum(self.slides(layer) for layer in range(self.num_hidden_layers))
        return sliding * each + (self.num_hidden_layers - sliding) * seq_length

    def parameter_count(self) -> int:
        """Parameters of the whole decoder, vocabulary padding included, a tied head counted once."""
        head = 0 if self.tie_word_embeddings else self.padded_vocab_size * self.hidden_size
        ends = self.embedding_count() + self.position_count() + self._norm() + head
        return self.num_hidden_layers * self.layer_parameter_count() + ends

    def layer_parameter_count(self) -> int:
        """Parameters of one decoder layer: attention, MLP and their norms."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = hidden * (2 * query + 2 * key_value)
        attention += (query + 2 * key_value) if self.projection_bias else 0
        attention += hidden if self.attention_bias else 0
        attention += {"none": 0, "head": 2 * self.head_dim, "width": query + key_value}[self.qk_norm]
        wide = 2 if self.gated_mlp else 1
        mlp = (wide + 1) * hidden * inner
        mlp += (wide * inner + hidden) if self.mlp_bias else 0
        return attention + mlp + self.norms_a_layer * self._norm()

    def embedding_count(self) -> int:
        """Parameters of the token embedding, vocabulary padding included."""
        return self.padded_vocab_size * self.hidden_size

    def position_count(self) -> int:
        """Parameters of learned positions; none where positions are rotary."""
        return self.max_position_embeddings * self.hidden_size if self.position_embedding == "learned" else 0

    def _norm(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    def flops_per_token(self, seq_length: int, *, causal: bool = True) -> int:
        """Operations to train on one token, forward and backward: 6N + 6·L·h·d·T (causal) or 6N + 12·L·h·d·T.

        N counts the weights that are multiplied (the head yes, look-ups of words and positions no). The first
        convention counts only the visible half of the attention matrix, the second all of it (the "PaLM" convention);
        with a sliding window T is less (`attended_lengths`).
        """
        looked_up = (0 if self.tie_word_embeddings else self.embedding_count()) + self.position_count()
        multiplied = self.parameter_count() - looked_up
        attention = self.num_attention_heads * self.head_dim * self.attended_lengths(seq_length, causal=causal)
        return 6 * multiplied + (6 if causal else 12) * attention

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` gives the same shape back."""
        scaling = None if self.rope_scaling is None else self.rope_scaling.to_json()
        return asdict(self) | {"rope_scaling": scaling}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelShape:
        """The shape that `to_json` wrote. ConfigError names fields that are missing, unknown, of another type, or wrong
        beside each other.

        Fields with a default are younger than the first checkpoints and may be missing.
        """
        names = {field.name: str(field.type) for field in fields(cls)}
        data = {field.name: field.default for field in fields(cls) if field.default is not MISSING} | data
        if missing := sorted(names.keys() - data.keys()):
            raise ConfigError(f"model shape lacks {', '.join(missing)}")
        if unknown := sorted(data.keys() - names.keys()):
            raise ConfigError(f"model shape has unknown fields {', '.join(unknown)}: written by another version?")
        shape = cls(**{name: _read(name, kind, data[name]) for name, kind in names.items()})
        check_shape(shape)
        return shape


def unlike_fields(first: ModelShape, other: ModelShape) -> list[str]:
    """Fields, with both values, that keep the weights of `other` from being averaged with those of `first`."""
    then, now = first.to_json(), other.to_json()
    free = NO_FUNCTION if first.position_embedding == "rope" else NO_FUNCTION - {"max_position_embeddings"}
    names = sorted(then.keys() - free)
    return [f"{name} is {now[name]!r}, not {then[name]!r}" for name in names if then[name] != now[name]]


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _read(name: str, kind: str, value: Any) -> Any:
    """A field of a shape from JSON, by the name of its type."""
    if name == "rope_scaling":
        if not isinstance(value, dict | None):
            raise ConfigError(f"model shape field rope_scaling is {value!r}, which is no table")
        return rope_scaling_of(value, "model shape field rope_scaling")
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"model shape field {name} is {value!r}, which is not {kind}")
    return float(value) if isinstance(value, int) and kind == "float" else value


def resolve_model(
    section: ModelSection, tokenizer_vocab_size: int, max_position_embeddings: int | None = None
) -> ModelShape:
    """The decoder that a [model] table asks for: what it says, over its preset, over Llama's habits.

    tokenizer_vocab_size: ids that the tokenizer can give; vocab_size where the table does not say it.
    max_position_embeddings: the longest training sequence; default model.seq_length.
    Raises ConfigError for a preset that does not exist, a field that nothing gives, and sizes that do not divide.
    """
    given = {**LLAMA_STYLE, **_preset_fields(section.preset)}
    own = {name for name in ModelSection.model_fields if name not in ("preset", "seq_length")}
    said = {name: value for name in own if (value := getattr(section, name)) is not None}
    given.update(said)
    for name in _MUST_BE_SAID:
        if given.get(name) is None:
            raise ConfigError(f"model.{name} is missing: say it, or set model.preset to one of {', '.join(PRESETS)}")
    vocab_size = given.get("vocab_size") or tokenizer_vocab_size
    if vocab_size < tokenizer_vocab_size:
        raise ConfigError(
            f"model.vocab_size {vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size} ids: "
            f"set it to at least {tokenizer_vocab_size}, or leave it out"
        )
    given["num_key_value_heads"] = given.get("num_key_value_heads") or given["num_attention_heads"]
    given["head_dim"] = given.get("head_dim") or _head_dim(given["hidden_size"], given["num_attention_heads"])
    given["vocab_size"] = vocab_size
    given["padded_vocab_size"] = padded_vocabulary(vocab_size)
    given["document_mask"] = section.document_mask
    given.update(_positions(given, said.keys(), max_position_embeddings or section.seq_length))
    shape = ModelShape(**given)
    check_shape(shape)
    return shape


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding for so many ids."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


_ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_theta")


def _positions(given: Mapping[str, Any], said: Collection[str], longest: int) -> dict[str, Any]:
    """The fields that say where a token stands. said: keys of the [model] table itself. longest: training sequence."""
    if given.get("position_embedding", "rope") == "rope":
        if "max_position_embeddings" in said:
            raise ConfigError(
                f"model.max_position_embeddings = {given['max_position_embeddings']} is for learned positions: rotary "
                "ones have no limit, and an export names the longest sequence; leave it out, or set "
                "model.position_embedding = learned"
            )
        scaling = given.get("rope_scaling")
        if isinstance(scaling, BaseModel):
            scaling = scaling.model_dump()
        return {"max_position_embeddings": longest, "rope_scaling": rope_scaling_of(scaling, "model.rope_scaling")}
    if without := sorted(set(_ROTARY) & set(said)):
        raise ConfigError(
            f"model.{without[0]} turns queries and keys, and model.position_embedding is learned: leave it out, or set "
            "model.position_embedding = rope"
        )
    rows = given.get("max_position_embeddings") or longest
    if longest > rows:
        raise ConfigError(
            f"a training sequence of {longest} positions is longer than model.max_position_embeddings {rows}, and each "
            "position has a learned vector: set model.seq_length (or the stage's own) to at most "
            f"{rows}, or max_position_embeddings to {longest}"
        )
    return {"max_position_embeddings": rows, "rope_scaling": None, "rope_local_theta": 0.0} | {
        name: LLAMA_STYLE[name] for name in ("rope_theta", "partial_rotary_factor")
    }


def _preset_fields(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"model.preset {name!r} is unknown: {hint}There are {', '.join(PRESETS)}")
    return dict(PRESETS[name].fields)


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        near = _nearest_multiple(hidden, heads)
        raise ConfigError(
            f"model.hidden_size {hidden} is not a multiple of model.num_attention_heads {heads} "
            f"({hidden} = {heads} x {hidden // heads} + {hidden % heads}): set hidden_size to {near}, "
            f"num_attention_heads to {_nearest_divisor(hidden, heads)}, or model.head_dim"
        )
    return hidden // heads


def check_shape(shape: ModelShape) -> None:
    """Raises ConfigError for fields that the decoder cannot express beside each other, or at all."""
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if groups > heads or heads % groups:
        raise ConfigError(
            f"model.num_attention_heads {heads} is not a multiple of model.num_key_value_heads {groups} "
            f"({heads} = {groups} x {heads // groups} + {heads % groups}): "
            f"set num_key_value_heads to {_nearest_divisor(heads, groups)}, "
            f"or num_attention_heads to {_nearest_multiple(heads, groups)}"
        )
    for name, words in _WORDS.items():
        if (value := getattr(shape, name)) not in words:
            raise ConfigError(f"model.{name} = {value!r} is unknown: set one of {', '.join(words)}")
    if shape.position_embedding == "rope" and (shape.rotary_dim % 2 or shape.rotary_dim == 0):
        raise ConfigError(
            f"model.head_dim {shape.head_dim} x model.partial_rotary_factor {shape.partial_rotary_factor} turns "
            f"{shape.rotary_dim} dimensions, and rotary embeddings turn them in pairs: "
            f"set partial_rotary_factor to {_even_factor(shape)}, or an even head_dim of at least 2"
        )
    if shape.position_embedding == "learned" and shape.rope_scaling is not None:
        raise ConfigError("model.rope_scaling with model.position_embedding = learned scales nothing: leave it out")
    if shape.attention_bias and shape.query_key_value_bias:
        raise ConfigError(
            "model.query_key_value_bias = true has no effect beside model.attention_bias = true, which gives these and "
            "the output projection biases: leave one of them out"
        )
    if shape.norm_unit_offset and shape.norm != "rmsnorm":
        raise ConfigError(
            f"model.norm_unit_offset = true is RMSNorm's, and model.norm is {shape.norm}: set model.norm = rmsnorm, or "
            "leave norm_unit_offset out"
        )
    if shape.shared_norm and not (shape.parallel_block and shape.norms_before):
        raise ConfigError(
            "model.shared_norm = true is one norm before attention and MLP side by side, and here "
            f"model.parallel_block is {str(shape.parallel_block).lower()} and model.norm_place {shape.norm_place}: set "
            "parallel_block = true and norm_place to before or both, or leave shared_norm out"
        )
    _check_window(shape)
    for name in ("embedding_multiplier", "attention_multiplier", "logit_multiplier"):
        value, least = getattr(shape, name), 0 if name == "attention_multiplier" else sys.float_info.min
        if not least <= value < math.inf:
            raise ConfigError(f"model.{name} = {value} must be a number above 0; leave it out for the default")


def _check_window(shape: ModelShape) -> None:
    for name in ("sliding_window", "sliding_pattern", "rope_local_theta"):
        if not 0 <= getattr(shape, name) < math.inf:
            raise ConfigError(f"model.{name} = {getattr(shape, name)} must not be negative; leave it out for none")
    if shape.sliding_pattern and not shape.sliding_window:
        raise ConfigError(
            f"model.sliding_pattern {shape.sliding_pattern} says which layers have no window, and model.sliding_window "
            "is 0: set sliding_window, or leave sliding_pattern out"
        )
    if shape.sliding_pattern == 1:
        raise ConfigError(
            "model.sliding_pattern 1 leaves no layer with the window: set it to 2 or more, or leave sliding_window and "
            "sliding_pattern out"
        )
    if shape.rope_local_theta and not (shape.sliding_pattern and shape.position_embedding == "rope"):
        raise ConfigError(
            f"model.rope_local_theta {shape.rope_local_theta} turns layers with a window unlike the others, and here "
            "they are all alike: set model.sliding_window and sliding_pattern, or rope_theta instead"
        )


_WORDS = {
    "norm": ("rmsnorm", "layernorm", "layernorm_no_bias"),
    "hidden_act": ("silu", "gelu", "gelu_tanh"),
    "qk_norm": ("none", "head", "width"),
    "norm_place": ("before", "after", "both"),
    "position_embedding": ("rope", "learned"),
    "family": ("", *get_args(FamilyName)),
}


def _even_factor(shape: ModelShape) -> float:
    """The factor nearest to what was asked that turns a whole number of pairs."""
    pairs = max(1, min(shape.head_dim // 2, round(shape.head_dim * shape.partial_rotary_factor / 2)))
    return 2 * pairs / shape.head_dim


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`; of two equally close, the smaller."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def _nearest_multiple(number: int, of: int) -> int:
    """The positive multiple of `of` closest to `number`."""
    return max(of, of * round(number / of))
