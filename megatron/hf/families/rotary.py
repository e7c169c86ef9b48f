"""Rotary positions in a config.json: for readers of `rope_parameters` (transformers 5) and of `rope_theta` with
`rope_scaling` (transformers 4, vLLM) both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.config.rope_scaling import rope_scaling_of
from megatron.hf.families.config_values import read_value
from megatron.hf.families.windows import FULL, SLIDING

_SHARE = "partial_rotary_factor"


@dataclass(frozen=True)
class Rotary:
    """Where a class keeps its rotary positions.

    theta: the older key of the base. share: the older key of the part of a head that is turned; None where the class
    turns it all. default_share, default_theta: where nothing says it. scales: whether the class knows the decoder's
    scalings. by_kind: whether `rope_parameters` has a table for each kind of layer, with a sliding window and without;
    the first is never scaled. local: the older key of the base of layers with a window, default_local where nothing
    says it; without such a key they have that of the others.
    """

    theta: str = "rope_theta"
    share: str | None = None
    default_share: float = 1.0
    scales: bool = True
    default_theta: float = 10000.0
    by_kind: bool = False
    local: str | None = None
    default_local: float = 10000.0

    NONE: ClassVar[dict[str, Any]] = {"rope_theta": 10000.0, "rope_scaling": None, _SHARE: 1.0}
    """The fields of a shape whose positions are not rotary."""

    def only(self, shape: ModelShape) -> dict[str, Any]:
        """Values of fields that this class cannot choose."""
        only = ({} if self.share else {_SHARE: 1.0}) | ({} if self.scales else {"rope_scaling": None})
        if not (self.by_kind and shape.sliding_pattern):
            all_slide = self.by_kind and shape.sliding_window > 0
            return only | {"rope_local_theta": 0.0} | ({"rope_scaling": None} if all_slide else {})
        if self.local is None:
            return only | {"rope_local_theta": shape.rope_theta if shape.rope_scaling else 0.0}
        return only | ({} if shape.rope_local_theta else {"rope_scaling": None})

    def read(self, config: Mapping[str, Any], found: Mapping[str, Any], complaints: list[str]) -> dict[str, Any]:
        """The fields; what the decoder cannot express is added to `complaints`. Raises ConfigError for what is wrong.

        As `transformers` 5 does, but that words which contradict each other are refused: readers of the older and of
        the newer ones would make different models of them.
        """
        words = self._words(config)
        table = f"rope_parameters.{FULL}" if self.by_kind else "rope_parameters"
        theta = _agreed("rope_theta", words, config, "rope_theta", self.theta, table=table)
        share = _agreed(_SHARE, words, config, _SHARE, self.share or _SHARE)
        scaling = None
        if not isinstance(kind := _kind(words), str):
            raise ConfigError(f"rope_type = {kind!r} is no name")
        try:
            scaling = rope_scaling_of(words, "rope_scaling", found["max_position_embeddings"])
        except ConfigError as error:
            complaints.append(str(error))
        turned = self.default_share if share is None else read_value(self.share or _SHARE, _SHARE, share)
        if turned > 1:
            raise ConfigError(f"{self.share or _SHARE} = {turned} turns more than a head: it is at most 1")
        if not self.share and share not in (None, 1.0):
            complaints.append(f"{_SHARE} = {share}: this class of transformers turns whole heads and does not read it")
        if scaling is not None and not self.scales:
            complaints.append(f"rope_scaling of rope_type {scaling.rope_type!r}: this class of transformers refuses it")
        fields: dict[str, Any] = {
            "rope_theta": self.default_theta if theta is None else read_value(self.theta, "rope_theta", theta),
            "rope_scaling": scaling,
            _SHARE: turned,
        }
        return fields | (self._local(config, found, fields, complaints) if self.by_kind else {})

    def _local(
        self, config: Mapping[str, Any], found: Mapping[str, Any], whole: Mapping[str, Any], complaints: list[str]
    ) -> dict[str, Any]:
        """The fields of layers with a window, or all fields where there are no others. whole: of those without."""
        if not found["sliding_window"]:
            return {}
        words, theta = self._table(config, SLIDING), whole["rope_theta"]
        name = f"rope_parameters.{SLIDING}"
        if (kind := _kind(words)) != "default" or _scaling(words):
            complaints.append(
                f"{name} of rope_type {kind!r}: layers with a window are never scaled, here and in version 4"
            )
        if (share := words.get(_SHARE)) not in (None, 1.0):
            complaints.append(f"{name}.{_SHARE} = {share}: this class of transformers turns whole heads")
        key = self.local or f"{name}.rope_theta"
        said = _agreed("rope_theta", words, config, self.local, table=name) if self.local else words.get("rope_theta")
        default = self.default_local if self.local else self.default_theta
        local = default if said is None else read_value(key, "rope_theta", said)
        if self.local is None and local != theta:
            complaints.append(
                f"{name}.rope_theta is {local}{' where it is left out' if said is None else ''}, and that of the other "
                f"layers {theta}: version 4 of transformers turns both alike; say one base in rope_theta and in both "
                "tables of rope_parameters"
            )
        if not found["sliding_pattern"]:
            return {"rope_theta": local, "rope_scaling": None}
        return {"rope_local_theta": 0.0 if local == theta and whole["rope_scaling"] is None else local}

    def _table(self, config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
        """A kind of layer's words of `rope_parameters`. Raises ConfigError."""
        tables = config.get("rope_parameters") or {}
        if not isinstance(tables, Mapping):
            raise ConfigError(f"rope_parameters = {tables!r} is no table")
        if tables and not tables.keys() & {FULL, SLIDING}:
            raise ConfigError(f"rope_parameters has no table {FULL} and no {SLIDING}, and this class reads no other")
        words = tables.get(kind) or {}
        if not isinstance(words, Mapping):
            raise ConfigError(f"rope_parameters.{kind} = {words!r} is no table")
        return words

    def _words(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """`rope_scaling` or `rope_parameters`, whichever is there. Raises ConfigError where they differ."""
        older: Any = config.get("rope_scaling") or {}
        newer: Any = self._table(config, FULL) if self.by_kind else config.get("rope_parameters") or {}
        for name, given in (("rope_scaling", older), ("rope_parameters", newer)):
            if not isinstance(given, Mapping):
                raise ConfigError(f"{name} = {given!r} is no table")
        if older and newer:
            said = [(_scaling(words) | {"rope_type": _kind(words)}) for words in (older, newer)]
            if said[0] != said[1]:
                raise ConfigError(
                    f"rope_scaling says {said[0]} and rope_parameters {said[1]}: older and newer readers would take it "
                    "for different models; leave the wrong one out"
                )
            return {**newer, **older}
        found: Mapping[str, Any] = older or newer
        return found

    def write(self, shape: ModelShape) -> dict[str, Any]:
        """The keys, older and newer."""
        scaling = None if shape.rope_scaling is None else shape.rope_scaling.to_json()
        share = {_SHARE: shape.partial_rotary_factor} if self.share else {}
        older = {self.theta: shape.rope_theta, "rope_theta": shape.rope_theta, "rope_scaling": scaling}
        if self.share:
            older[self.share] = shape.partial_rotary_factor
        parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": shape.rope_theta} | share
        if not self.by_kind:
            return older | {"rope_parameters": parameters}
        local = shape.rope_local_theta or shape.rope_theta
        older |= {self.local: local} if self.local else {}
        return older | {"rope_parameters": {FULL: parameters, SLIDING: {"rope_type": "default", "rope_theta": local}}}


def _kind(words: Mapping[str, Any]) -> Any:
    return words.get("rope_type") or words.get("type") or "default"


def _scaling(words: Mapping[str, Any]) -> dict[str, Any]:
    """What is said beside base, share and kind."""
    beside = ("rope_type", "type", "rope_theta", _SHARE)
    return {key: value for key, value in words.items() if key not in beside and value is not None}


def _agreed(
    name: str, words: Mapping[str, Any], config: Mapping[str, Any], *older: str, table: str = "rope_parameters"
) -> Any:
    """The one value that is said among the rotary words, of this table, or beside them by an older key, None where none
    is. Raises ConfigError where two are."""
    said = {f"{table}.{name}": words.get(name)} | {key: config.get(key) for key in older}
    given = {key: value for key, value in said.items() if value is not None}
    if len(set(map(str, map(_number, given.values())))) > 1:
        raise ConfigError(
            f"{' and '.join(f'{key} = {value!r}' for key, value in given.items())} contradict each other: older and "
            "newer readers would take it for different models; leave the wrong one out"
        )
    return next(iter(given.values()), None)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) else value
