"""What a config.json may ask for that the decoder does not do, each named with its value and what it would need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")


@dataclass(frozen=True)
class Only:
    """A key of which only some values can be expressed. needs: what others would need; a missing key is fine."""

    key: str
    values: tuple[Any, ...]
    needs: str

    def __call__(self, config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
        value = config.get(self.key)
        if value is not None and value not in self.values:
            words = " or ".join(map(repr, self.values))
            yield f"{self.key} = {value!r}: this needs {self.needs}; only {words} can be expressed"


@dataclass(frozen=True)
class Softcap:
    """Scores or logits bent by a hyperbolic tangent. default: the bound where the key is left out."""

    key: str
    default: float | None

    def __call__(self, config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
        value = config.get(self.key, self.default)
        if value is not None:
            said = "" if self.key in config else " (what the class takes where the key is left out)"
            yield f"{self.key} = {value!r}{said}: this needs soft-capped scores; only null can be expressed"


def whole_weights(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Weights as numbers, one decoder, one MLP a layer: of every family."""
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        yield f"quantization_config ({method}): weights must be floating point numbers; dequantize the model first"
    for key in _EXPERTS:
        if config.get(key):
            yield f"{key} = {config[key]!r}: this needs a mixture of experts"
    for key in ("is_encoder_decoder", "add_cross_attention"):
        if config.get(key):
            yield f"{key} = {config[key]!r}: this needs cross-attention"
    if config.get("use_bidirectional_attention"):
        yield f"use_bidirectional_attention = {config['use_bidirectional_attention']!r}: this needs attention ahead"
