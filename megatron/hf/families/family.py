"""What a family is: a model class of `transformers` as data, read both ways.

Every field of a ModelShape is said by a key of config.json, or by the rotary words, or is always the same in the class,
or says nothing about its function (FREE). So one table gives a shape from a config, a config from a shape, and the
fields in which a shape is something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape, check_shape, padded_vocabulary
from megatron.hf.families.config_values import activation_name, read_value
from megatron.hf.families.rotary import Rotary
from megatron.hf.families.windows import Windows, no_windows, plain_layers
from megatron.hf.name_table import Entry

FREE = frozenset({"padded_vocab_size", "document_mask", "hidden_dropout", "family"})
"""Fields that no class needs to say: of training, or of ourselves."""
_ROTARY = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_theta"})
_WINDOWS = frozenset({"sliding_window", "sliding_pattern"})

_SAME = object()

Limit = Callable[[Mapping[str, Any], Mapping[str, Any]], Iterator[str]]
"""What a config asks for that the decoder cannot do, in words: (config, fields of the ModelShape read so far)."""


@dataclass(frozen=True)
class Key:
    """A key of config.json and the field of ModelShape that says the same.

    default: what `transformers` takes where the key is left out; null: what it makes of a null, default the same.
    None there is every head for num_key_value_heads, hidden_size / num_attention_heads for head_dim. reading, writing:
    the field's value from the key's (with the fields that were read before), and back; default as it stands. A default
    that is a function gets those fields, too.
    """

    theirs: str
    ours: str
    default: Any = None
    null: Any = _SAME
    reading: Callable[[str, Any, Mapping[str, Any]], Any] | None = None
    writing: Callable[[ModelShape], Any] | None = None

    def read(self, config: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
        """The field's value. Raises ConfigError for a value of another kind."""
        value = config.get(self.theirs)
        if value is None:
            if self.theirs in config and self.null is _SAME and type(self.default) in (int, float):
                raise ConfigError(
                    f"{self.theirs} is null, and must be a number: write it, or leave the key out for {self.default}"
                )
            left_out = self.theirs not in config or self.null is _SAME
            other = self.default if left_out else self.null
            return other(found) if callable(other) else other
        if self.reading is not None:
            return self.reading(self.theirs, value, found)
        return read_value(self.theirs, self.ours, value)

    def write(self, shape: ModelShape) -> Any:
        """The key's value."""
        return getattr(shape, self.ours) if self.writing is None else self.writing(shape)


@dataclass(frozen=True)
class Family:
    """A class of `transformers`.

    name: of the class. table: its tensors. keys: its config, but for rotary positions and windows (None: the class has
    none). always: fields of ModelShape that it cannot choose, where they are not ModelShape's defaults. constants:
    further keys to write. A function among these gets the fields. spellings: how names of the table may begin instead.
    buffers: ends of names of stored tensors that are no weights. whole_heads: hidden_size must be a multiple of
    num_attention_heads.
    """

    name: str
    model_type: str
    table: tuple[Entry, ...]
    keys: tuple[Key, ...]
    always: Mapping[str, Any]
    rotary: Rotary | None = Rotary()
    windows: Windows | None = None
    limits: tuple[Limit, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    spellings: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    whole_heads: bool = False

    def key_of(self, ours: str) -> str | None:
        """The key of config.json that says a field; None where another thing says it."""
        return next((key.theirs for key in self.keys if key.ours == ours), None)

    def other_names(self, theirs: str) -> Iterator[str]:
        """A name of the table, and as what it may be found instead."""
        yield theirs
        for begin, other in self.spellings:
            if theirs.startswith(begin):
                yield other + theirs.removeprefix(begin)

    def wants(self, shape: ModelShape) -> list[tuple[str, Any, Any]]:
        """(field, its value, the value that this class can say) for each field in which the shape is something else."""
        shape = plain_layers(shape)
        wanted = self._always(shape) | ({} if self.rotary is None else self.rotary.only(shape))
        wanted |= {} if self.windows is None else self.windows.only(shape)
        found = vars(shape)
        for key in self.keys:
            if key.ours not in FREE:
                wanted.setdefault(key.ours, key.read({key.theirs: key.write(shape)}, found))
        return [(name, found[name], only) for name, only in wanted.items() if not same_value(found[name], only)]

    def _always(self, shape: ModelShape) -> dict[str, Any]:
        said = {key.ours for key in self.keys} | FREE | _ROTARY | (_WINDOWS if self.windows else frozenset())
        wanted = {item.name: item.default for item in fields(ModelShape) if item.name not in said}
        wanted |= _settled(self.always, vars(shape))
        if "attention_multiplier" in wanted and same_value(shape.attention_scale, shape.head_dim**-0.5):
            wanted["attention_multiplier"] = shape.attention_multiplier
        if self.whole_heads:
            wanted["hidden_size"] = shape.hidden_size // shape.num_attention_heads * shape.num_attention_heads
        return wanted

    def shape(self, config: Mapping[str, Any], vocab_rows: int | None = None) -> ModelShape:
        """The shape that a config.json of this class means. vocab_rows: instead of its vocab_size.

        Raises ConfigError for a value that is wrong, and for all together that the decoder cannot express.
        """
        found: dict[str, Any] = {"hidden_dropout": 0.0, "document_mask": True, "family": ""}
        for key in self.keys:
            value = key.read(config, found)
            if key.ours in found.keys() - FREE and value != found[key.ours]:
                raise ConfigError(
                    f"{key.theirs} = {value!r} contradicts {self.key_of(key.ours)}: leave the wrong one out"
                )
            found[key.ours] = value
        if vocab_rows is not None:
            found["vocab_size"] = vocab_rows
        complaints = [line for limit in self.limits for line in limit(config, found)]
        found |= self._read_windows(config, found, complaints)
        found |= Rotary.NONE if self.rotary is None else self.rotary.read(config, found, complaints)
        if complaints:
            raise ConfigError("\n  ".join([f"a {self.name} that the decoder cannot express:", *complaints]))
        heads = found["num_attention_heads"]
        found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
        found["head_dim"] = found.get("head_dim") or _head_dim(found["hidden_size"], heads)
        found["padded_vocab_size"] = padded_vocabulary(found["vocab_size"])
        shape = ModelShape(**(_settled(self.always, found) | found))
        check_shape(shape)
        return shape

    def _read_windows(
        self, config: Mapping[str, Any], found: Mapping[str, Any], complaints: list[str]
    ) -> dict[str, Any]:
        if self.windows is not None:
            return self.windows.read(config, found, complaints)
        complaints.extend(no_windows(config, found))
        return {}

    def config(self, shape: ModelShape) -> dict[str, Any]:
        """The keys of config.json that say the shape. For a shape that this class wants nothing of."""
        shape = plain_layers(shape)
        values = {key.theirs: key.write(shape) for key in self.keys}
        values |= _settled(self.constants, vars(shape))
        values |= {} if self.windows is None else self.windows.write(shape)
        return values | ({} if self.rotary is None else self.rotary.write(shape))


def activation(theirs: str, default: Any, name_of_tanh: str = "gelu_pytorch_tanh") -> Key:
    """The key of the activation. name_of_tanh: what is written for the approximate GELU."""

    def writing(shape: ModelShape) -> str:
        return name_of_tanh if shape.hidden_act == "gelu_tanh" else activation_name(shape.hidden_act)

    return Key(theirs, "hidden_act", default, writing=writing)


def _settled(values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value(found) if callable(value) else value for name, value in values.items()}


def same_value(value: Any, other: Any) -> bool:
    """Equal, floats as far as float32 tells them apart."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-7)
    return bool(value == other)


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and no head_dim is said"
        )
    return hidden // heads
