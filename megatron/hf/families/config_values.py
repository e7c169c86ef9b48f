"""Values of a config.json: of which kind a field is, and the names of activations."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape

_HIGHEST = 2**63
_KINDS = {item.name: str(item.type) for item in fields(ModelShape)}
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
}
"""Ours, and the names in `transformers` of the same function; the first is written."""


def activation_name(ours: str) -> str:
    """What a config.json calls an activation of ours."""
    return _ACTIVATIONS[ours][0]


def read_value(theirs: str, ours: str, value: Any) -> Any:
    """The value of a key, as the field of that name has it. Raises ConfigError that names the key."""
    if ours == "hidden_act":
        return _activation(theirs, value)
    kind = _KINDS[ours]
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{theirs} = {value!r} is neither true nor false")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _HIGHEST:
        raise ConfigError(f"{theirs} = {value!r} is not a number")
    if kind == "int":
        if value != int(value) or value < 1:
            raise ConfigError(f"{theirs} = {value!r} is not a whole number of at least 1")
        return int(value)
    least, most = (0.0, 1.0) if ours == "hidden_dropout" else (sys.float_info.min, _HIGHEST)
    if not least <= value < most:
        raise ConfigError(f"{theirs} = {value!r} is not {'from 0 to below 1' if least == 0 else 'above 0'}")
    return float(value)


def _activation(theirs: str, value: Any) -> str:
    for ours, names in _ACTIVATIONS.items():
        if value in names:
            return ours
    known = ", ".join(name for names in _ACTIVATIONS.values() for name in names)
    raise ConfigError(f"{theirs} = {value!r}: the decoder has no such activation, only {known}")
