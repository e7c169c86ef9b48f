"""The decoder's shape with nothing left open: preset, the user's fields and the tokenizer, resolved and checked.

Free of torch, so that a login node can plan with it.
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.presets import LLAMA_STYLE, PRESETS
from megatron.config.schema import ModelSection

VOCABULARY_MULTIPLE = 64
"""The embedding's rows are padded to a multiple of this, so that GEMMs stay aligned. Padding is never data."""

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

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that the rotary embedding turns; even."""
        return int(self.head_dim * self.partial_rotary_factor)

    def parameter_count(self) -> int:
        """Parameters of the whole decoder, vocabulary padding included, a tied head counted once."""
        head = 0 if self.tie_word_embeddings else self.padded_vocab_size * self.hidden_size
        return self.num_hidden_layers * self.layer_parameter_count() + self.embedding_count() + self._norm() + head

    def layer_parameter_count(self) -> int:
        """Parameters of one decoder layer: attention, MLP and their norms."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = hidden * (2 * query + 2 * key_value)
        attention += (query + 2 * key_value + hidden) if self.attention_bias else 0
        wide = 2 if self.gated_mlp else 1
        mlp = (wide + 1) * hidden * inner
        mlp += (wide * inner + hidden) if self.mlp_bias else 0
        return attention + mlp + 2 * self._norm()

    def embedding_count(self) -> int:
        """Parameters of the token embedding, vocabulary padding included."""
        return self.padded_vocab_size * self.hidden_size

    def _norm(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    def flops_per_token(self, seq_length: int, *, causal: bool = True) -> int:
        """Operations to train on one token, forward and backward: 6N + 6·L·h·d·T (causal) or 6N + 12·L·h·d·T.

        N counts the weights that are multiplied (the head yes, the embedding look-up no). The first convention counts
        only the visible half of the attention matrix, the second all of it (the "PaLM" convention).
        """
        multiplied = self.parameter_count() - (0 if self.tie_word_embeddings else self.embedding_count())
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_length
        return 6 * multiplied + (6 if causal else 12) * attention

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` gives the same shape back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelShape:
        """The shape that `to_json` wrote. ConfigError names fields that are missing, unknown or of another type.

        Fields with a default are younger than the first checkpoints and may be missing.
        """
        names = {field.name: str(field.type) for field in fields(cls)}
        data = {field.name: field.default for field in fields(cls) if field.default is not MISSING} | data
        if missing := sorted(names.keys() - data.keys()):
            raise ConfigError(f"model shape lacks {', '.join(missing)}")
        if unknown := sorted(data.keys() - names.keys()):
            raise ConfigError(f"model shape has unknown fields {', '.join(unknown)}: written by another version?")
        kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
        for name, kind in names.items():
            value = data[name]
            if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
                raise ConfigError(f"model shape field {name} is {value!r}, which is not {kind}")
        values: dict[str, Any] = {
            name: float(data[name]) if kind == "float" else data[name] for name, kind in names.items()
        }
        return cls(**values)


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
    given.update({name: value for name in own if (value := getattr(section, name)) is not None})
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
    given["padded_vocab_size"] = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    given["max_position_embeddings"] = max_position_embeddings or section.seq_length
    given["document_mask"] = section.document_mask
    shape = ModelShape(**given)
    _check(shape)
    return shape


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


def _check(shape: ModelShape) -> None:
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if groups > heads or heads % groups:
        raise ConfigError(
            f"model.num_attention_heads {heads} is not a multiple of model.num_key_value_heads {groups} "
            f"({heads} = {groups} x {heads // groups} + {heads % groups}): "
            f"set num_key_value_heads to {_nearest_divisor(heads, groups)}, "
            f"or num_attention_heads to {_nearest_multiple(heads, groups)}"
        )
    if shape.rotary_dim % 2 or shape.rotary_dim == 0:
        raise ConfigError(
            f"model.head_dim {shape.head_dim} x model.partial_rotary_factor {shape.partial_rotary_factor} turns "
            f"{shape.rotary_dim} dimensions, and rotary embeddings turn them in pairs: "
            f"set partial_rotary_factor to {_even_factor(shape)}, or an even head_dim of at least 2"
        )


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
