"""Sliding windows in a config.json: which layers have one, and how long it is.

A window of w in `transformers` shows a token w positions, its own among them (sliding_window_overlay in its
masking_utils: key > query - w), as ModelShape.sliding_window does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.families.config_values import read_value

FULL, SLIDING = "full_attention", "sliding_attention"
_ALL, _NONE = 0, 1
"""Of which layers have a window: every so-many-th has none, but that 0 is: all have one."""


def plain_layers(shape: ModelShape) -> ModelShape:
    """The same function in the fewest fields: a pattern that no layer reaches is none, and so is a base of rotary
    positions of layers with a window that is the base of all."""
    if shape.sliding_pattern > shape.num_hidden_layers:
        if shape.rope_local_theta:
            shape = replace(shape, rope_theta=shape.rope_local_theta, rope_scaling=None)
        shape = replace(shape, sliding_pattern=0, rope_local_theta=0.0)
    if shape.rope_local_theta == shape.rope_theta and shape.rope_scaling is None:
        shape = replace(shape, rope_local_theta=0.0)
    return shape


def layers_within(shape: ModelShape, longest: int) -> ModelShape:
    """As `plain_layers`, of sequences no longer than that: windows that hide nothing of them are none, or all equal
    where their layers differ in more."""
    shape = plain_layers(shape)
    if not shape.sliding_window or shape.window_bites(longest):
        return shape
    if shape.rope_local_theta:
        return replace(shape, sliding_window=longest)
    return replace(shape, sliding_window=0, sliding_pattern=0)


@dataclass(frozen=True)
class Windows:
    """Where a class keeps its windows.

    default: the window where `sliding_window` is left out. by_layer: whether layers may differ, by `layer_types`.
    pattern: where these are left out, every so-many-th layer has no window; 0: all have one. pattern_key: the older key
    of that number. switched: whether windows are Qwen's, which `use_sliding_window` must turn on, and which begin at
    `max_window_layers`. own_base: whether layers with a window are turned unlike the others.
    """

    default: int | None = None
    by_layer: bool = False
    pattern: int = _ALL
    pattern_key: str | None = None
    switched: bool = False
    own_base: bool = False

    NO_WINDOW: ClassVar[dict[str, Any]] = {"sliding_window": 0, "sliding_pattern": 0}

    def only(self, shape: ModelShape) -> dict[str, Any]:
        """Values of fields that this class cannot choose."""
        return {} if self.by_layer else {"sliding_pattern": 0}

    def read(self, config: Mapping[str, Any], found: Mapping[str, Any], complaints: list[str]) -> dict[str, Any]:
        """The fields; what the decoder cannot express is added to `complaints`. Raises ConfigError for wrong values."""
        kinds, window = config.get("layer_types"), self._window(config)
        if kinds is not None and (fault := layer_types_fault(kinds, found)):
            complaints.append(fault)
            return self.NO_WINDOW
        pattern = self._pattern(config, found, window) if kinds is None else pattern_of(kinds)
        if kinds is not None and not self.by_layer and pattern != (_NONE if window is None else _ALL):
            complaints.append(
                f"layer_types has {_counted(kinds)} and sliding_window is {window!r}: this class of transformers does "
                "not read layer_types, and all of its layers are alike; leave them out"
            )
        elif window is None and pattern != _NONE and (kinds is not None or self.by_layer):
            off = " (use_sliding_window is not true)" if self.switched else ""
            some = f"layer_types has {_counted(kinds)}" if kinds else "most layers have a window (no layer_types)"
            complaints.append(f"{some}, and there is no sliding_window{off}")
        elif pattern is None:
            complaints.append(self._irregular(config, found, window))
        elif window is not None and pattern != _NONE:
            return {"sliding_window": window, "sliding_pattern": pattern}
        return self.NO_WINDOW

    def _window(self, config: Mapping[str, Any]) -> int | None:
        window = config.get("sliding_window", self.default)
        if self.switched and not read_flag(config, "use_sliding_window"):
            return None
        return None if window is None else int(read_value("sliding_window", "sliding_window", window))

    def _pattern(self, config: Mapping[str, Any], found: Mapping[str, Any], window: int | None) -> int | None:
        """Which layers have a window where `layer_types` does not say it; None for those that no pattern gives."""
        layers = found["num_hidden_layers"]
        if self.switched:
            first = _whole(config, "max_window_layers", 28)
            return _NONE if window is None or first >= layers else _ALL if first == 0 else None
        pattern = _whole(config, self.pattern_key, self.pattern) if self.pattern_key else self.pattern
        if self.pattern_key and pattern < 1:
            raise ConfigError(f"{self.pattern_key} = {pattern} is not a whole number of at least 1")
        return _ALL if pattern > layers else pattern

    def _irregular(self, config: Mapping[str, Any], found: Mapping[str, Any], window: int | None) -> str:
        kinds, longest = config.get("layer_types"), found["max_position_embeddings"]
        if kinds is None:
            said = f"max_window_layers = {config.get('max_window_layers', 28)} with use_sliding_window = true"
            remedy = "use_sliding_window to false"
        else:
            said, remedy = f"layer_types has {_counted(kinds)}", f"layer_types to {FULL} in every layer"
        line = f"{said}: the decoder's layers all have a window, or all but every n-th (sliding_pattern)"
        if window is None or self.own_base:
            return line
        longer = f"max_position_embeddings to {window} and " if longest > window else ""
        return f"{line}; up to {window} positions the model is the same without it: set {longer}{remedy} to take it so"

    def write(self, shape: ModelShape) -> dict[str, Any]:
        """The keys."""
        window, layers = shape.sliding_window, shape.num_hidden_layers
        kinds = {"layer_types": [SLIDING if shape.slides(number) else FULL for number in range(layers)]}
        if self.switched:
            if not window:
                return {"use_sliding_window": False, "sliding_window": None}
            # Readers that know no layer_types go by the first layer with a window.
            return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0, **kinds}
        if not self.by_layer:
            return {"sliding_window": window or None}
        # Without a window the key is left out: these classes want a number, which then means nothing.
        said = kinds | ({"sliding_window": window} if window else {})
        if self.pattern_key:
            said[self.pattern_key] = (shape.sliding_pattern or layers + 1) if window else _NONE
        return said


def no_windows(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a config of a class without windows: their keys must say none, or one that hides nothing."""
    kinds, window, longest = config.get("layer_types"), config.get("sliding_window"), found["max_position_embeddings"]
    hides = isinstance(window, bool) or not isinstance(window, int) or window < longest
    if kinds is not None and (fault := layer_types_fault(kinds, found)):
        yield fault
    elif window is not None and hides:
        yield (
            f"sliding_window = {window!r}: the layers of this class of transformers have no window, and its cache "
            "would keep one; leave the key out, or name a class that has them"
        )
    elif kinds is not None and SLIDING in kinds and window is None:
        yield f"layer_types has {_counted(kinds)}: the layers of this class of transformers have no window"


def layer_types_fault(kinds: Any, found: Mapping[str, Any]) -> str | None:
    """Why `layer_types` cannot be expressed whatever its order is; None where it can."""
    layers = found["num_hidden_layers"]
    if not isinstance(kinds, list) or not all(kind in (FULL, SLIDING) for kind in kinds):
        odd = [kind for kind in kinds if kind not in (FULL, SLIDING)][:1] if isinstance(kinds, list) else [kinds]
        return f"layer_types has {odd[0]!r}: only {FULL} and {SLIDING} can be expressed"
    return None if len(kinds) == layers else f"layer_types names {len(kinds)} layers, and there are {layers}"


def pattern_of(kinds: list[str]) -> int | None:
    """Every so-many-th layer has no window: 1 for none that has one, 0 for all, None for another order."""
    pattern = kinds.index(FULL) + 1 if FULL in kinds else _ALL
    wanted = [SLIDING if not pattern or (number + 1) % pattern else FULL for number in range(len(kinds))]
    return pattern if kinds == wanted else None


def read_flag(config: Mapping[str, Any], key: str) -> bool:
    """A key that is true or false; false where it is left out. Raises ConfigError."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} = {value!r} is neither true nor false")
    return bool(value)


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{key} = {value!r} is not a whole number of at least 0")
    return value


def _counted(kinds: list[str]) -> str:
    """Which layers slide, in words."""
    sliding = [number for number, kind in enumerate(kinds) if kind == SLIDING]
    some = ", ".join(map(str, sliding[:8])) + (", …" if len(sliding) > 8 else "")
    return f"{SLIDING} in {len(sliding)} of {len(kinds)} layers" + (
        f" ({some})" if 0 < len(sliding) < len(kinds) else ""
    )
