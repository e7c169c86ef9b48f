"""How rotary frequencies are stretched for contexts longer than those of pretraining, in Hugging Face's words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron.config.errors import ConfigError

_FIELDS: dict[str, frozenset[str]] = {
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}),
}
"""By rope_type, what it takes; of yarn the last three may be left out."""

_REFUSED = {
    "dynamic": "its frequencies depend on the length of the sequence at hand",
    "longrope": "it has a factor for every dimension, and another set of them for long sequences",
    "proportional": "it spreads the frequencies of a part of a head over all of it",
}
_ELSEWHERE = frozenset({"type", "rope_theta", "partial_rotary_factor"})
"""Keys of Hugging Face's dict that other fields of a ModelShape hold."""


@dataclass(frozen=True)
class RopeScaling:
    """One stretching; what its rope_type does not take is None.

    linear (Chen et al., arXiv 2306.15595): all frequencies / factor. llama3 (Llama 3.1): those of wavelengths over
    original_max_position_embeddings / low_freq_factor are divided, those under … / high_freq_factor kept, between them
    a smooth passage. yarn (Peng et al., arXiv 2309.00071): divided from beta_slow turns within the original length on,
    kept from beta_fast; cos and sin times attention_factor (None: 0.1 ln(factor) + 1).
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        return _yarn_scale(self.factor) if self.attention_factor is None else self.attention_factor

    def to_json(self) -> dict[str, Any]:
        """The fields that its rope_type takes, which are Hugging Face's; `rope_scaling_of` gives the same back."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_scaling_of(
    words: Mapping[str, Any] | None, where: str, max_position_embeddings: int | None = None
) -> RopeScaling | None:
    """The scaling that Hugging Face's `rope_parameters` or `rope_scaling` asks for; None for the default frequencies.

    where: names the dict in errors. max_position_embeddings: of the config, which stands for a missing
    original_max_position_embeddings, and with it for yarn's missing factor, as in `transformers`. `rope_theta` and
    `partial_rotary_factor`, which newer configs write beside them, are for the caller. yarn's mscale and mscale_all_dim
    become the attention_factor that they stand for. Raises ConfigError that names a key that is unknown, is missing, or
    has no meaning here.
    """
    if not words:
        return None
    given = {key: value for key, value in words.items() if value is not None and key not in _ELSEWHERE}
    kind = given.pop("rope_type", words.get("type") or "default")
    if kind == "default":
        if given:
            raise ConfigError(
                f"{where}: {', '.join(sorted(given))} with rope_type default, which scales nothing: say the rope_type"
            )
        return None
    _refuse_unknown_type(kind, where)
    for name, value in given.items():
        if name != "truncate" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{where}: {name} = {value!r} is not a number")
    if kind == "yarn":
        given = _yarn_words(given, where, max_position_embeddings)
    if "original_max_position_embeddings" in _FIELDS[kind] and max_position_embeddings is not None:
        given.setdefault("original_max_position_embeddings", max_position_embeddings)
    if unknown := sorted(given.keys() - _FIELDS[kind]):
        raise ConfigError(
            f"{where}: {', '.join(unknown)} is not known for rope_type {kind}: it takes "
            f"{', '.join(sorted(_FIELDS[kind]))}"
        )
    if missing := sorted(_FIELDS[kind] - given.keys() - {"attention_factor"}):
        raise ConfigError(f"{where}: rope_type {kind} needs {', '.join(missing)}")
    length = given.get("original_max_position_embeddings")
    values = {name: float(value) for name, value in given.items()} | ({} if length is None else {_LENGTH: length})
    scaling = RopeScaling(kind, **values)
    for fault in rope_scaling_faults(scaling):
        raise ConfigError(f"{where}: {fault}")
    return scaling


_LENGTH = "original_max_position_embeddings"


def _refuse_unknown_type(kind: object, where: str) -> None:
    if kind in _FIELDS:
        return
    why = f": {_REFUSED[kind]}" if isinstance(kind, str) and kind in _REFUSED else ""
    raise ConfigError(
        f"{where}: rope_type {kind!r} cannot be expressed{why}; there are {', '.join(_FIELDS)}, or default for none"
    )


def _yarn_words(given: dict[str, Any], where: str, max_position_embeddings: int | None) -> dict[str, Any]:
    """With what may be left out filled in as `transformers` does."""
    given = dict(given)
    if given.pop("truncate", True) is not True:
        raise ConfigError(f"{where}: truncate = false of rope_type yarn cannot be expressed; leave it out")
    original = given.get(_LENGTH)
    if "factor" not in given and original and max_position_embeddings:
        given["factor"] = max_position_embeddings / original
    mscale, over = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if mscale and over and "factor" in given:
        factor = given["factor"]
        given.setdefault("attention_factor", _yarn_scale(factor, mscale) / _yarn_scale(factor, over))
    # Zero stands for "not said", there and here.
    given["beta_fast"] = given.get("beta_fast") or 32.0
    given["beta_slow"] = given.get("beta_slow") or 1.0
    return given


def rope_scaling_faults(scaling: RopeScaling) -> Iterator[str]:
    """What is wrong with a scaling, in words that follow the name of its table."""
    if scaling.rope_type not in _FIELDS:
        yield f"rope_type {scaling.rope_type!r} is none of {', '.join(_FIELDS)}"
        return
    own = _FIELDS[scaling.rope_type]
    for item in fields(scaling):
        if item.name != "rope_type" and item.name not in own and getattr(scaling, item.name) is not None:
            yield f"{item.name} has no effect on rope_type {scaling.rope_type}: leave it out"
    if not math.isfinite(scaling.factor) or scaling.factor < 1:
        yield f"factor {scaling.factor} is below 1: it says how many times longer the context becomes"
    for name in own - {"factor", "attention_factor"}:
        value = getattr(scaling, name)
        if value is None or not math.isfinite(value) or value <= 0 or (name == _LENGTH and value != int(value)):
            yield f"{name} = {value} must be a {'whole ' if name == _LENGTH else ''}number above 0"
    if scaling.attention_factor is not None and not 0 < scaling.attention_factor < math.inf:
        yield f"attention_factor = {scaling.attention_factor} must be above 0"
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and high <= low:
        yield f"high_freq_factor {high} must be above low_freq_factor {low}"
    fast, slow = scaling.beta_fast, scaling.beta_slow
    if fast is not None and slow is not None and fast < slow:
        yield f"beta_fast {fast} must not be below beta_slow {slow}"
