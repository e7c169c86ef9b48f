"""Which Hugging Face architecture says the same as a ModelShape, and the other way round.

A model that no architecture can express, and a config that the decoder cannot, is refused with the field that stands in
the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.config.errors import CheckpointError, ConfigError
from megatron.config.model_shape import ModelShape
from megatron.hf.families.cohere import COHERE
from megatron.hf.families.family import Family
from megatron.hf.families.gemma import GEMMA, GEMMA2, GEMMA3
from megatron.hf.families.gpt2 import GPT2
from megatron.hf.families.gpt_neox import GPT_NEOX
from megatron.hf.families.llama import LLAMA
from megatron.hf.families.mistral import MISTRAL
from megatron.hf.families.olmo2 import OLMO2, OLMO3
from megatron.hf.families.phi3 import PHI3
from megatron.hf.families.qwen2 import QWEN2
from megatron.hf.families.qwen3 import QWEN3

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, OLMO3),
    *(GPT_NEOX, GPT2, PHI3, GEMMA, GEMMA2, GEMMA3, COHERE),
)
"""The plainest first: where several say a shape, the first does."""

CONFIG = "config.json"


def architecture_for(shape: ModelShape) -> Family:
    """The family that the shape names, or the plainest that says it.

    Raises ConfigError with each field that the family cannot say: the named one, or the nearest where none can.
    """
    if shape.family:
        family = family_named(shape.family)
        if wanted := family.wants(shape):
            begin = f'model.family = "{shape.family}" makes this a {family.name}, which cannot express it all:'
            raise _refused(begin, family, wanted)
        return family
    missed = [(family, family.wants(shape)) for family in FAMILIES]
    family, wanted = min(missed, key=lambda item: len(item[1]))
    if wanted:
        raise _refused(f"no architecture expresses this model; the nearest is {family.name}:", family, wanted)
    return family


def family_named(model_type: str) -> Family:
    """The family of this model_type. Raises ConfigError."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise ConfigError(
        f"model.family = {model_type!r} is unknown: there are {', '.join(f.model_type for f in FAMILIES)}"
    )


def _refused(begin: str, family: Family, wanted: list[tuple[str, Any, Any]]) -> ConfigError:
    lines = [
        f"model.{field} = {_shown(value)}: {family.name} can only say {_shown(only)}" for field, value, only in wanted
    ]
    return ConfigError("\n  ".join([begin, *lines]))


def _shown(value: Any) -> str:
    """true and false as in the config file."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def config_json(shape: ModelShape, *, bos_token_id: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
    """The folder's config.json, in the words of `transformers` 4 and 5 both. `dtype`: "float32" or "bfloat16"."""
    family = architecture_for(shape)
    return {
        "architectures": [family.name],
        "model_type": family.model_type,
        **family.config(shape),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,  # some classes would take an id of their own, and never train its embedding
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def shape_from_folder(folder: Path) -> ModelShape:
    """The shape that a Hugging Face folder's config.json means; nothing else in the folder is read.

    Raises CheckpointError where there is none that can be read, ConfigError for what the decoder cannot express.
    """
    path = Path(folder) / CONFIG
    return shape_from_config(read_config(path), str(path))


def shape_from_config(config: Mapping[str, Any], where: str = CONFIG, vocab_rows: int | None = None) -> ModelShape:
    """The shape that a config.json means; its `family` is said where another would be the plainest.

    where: names it in errors. vocab_rows: rows of the embedding, where they are not its vocab_size. Code that
    `auto_map` names is never looked at. Raises ConfigError that names each field that the decoder cannot express.
    """
    family = family_of(config, where)
    try:
        shape = family.shape(config, vocab_rows)
        if wanted := family.wants(shape):
            raise _refused(f"a {family.name} that contradicts itself:", family, wanted)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return shape if architecture_for(shape) is family else replace(shape, family=family.model_type)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises CheckpointError where it is missing or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: it says what the folder's weights mean") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return config


def family_of(config: Mapping[str, Any], where: str = CONFIG) -> Family:
    """The family that a config.json names. Raises ConfigError for one that is not here."""
    kind, names = config.get("model_type"), config.get("architectures") or []
    known = ", ".join(f"{family.name} ({family.model_type})" for family in FAMILIES)
    if not isinstance(names, list):
        raise ConfigError(f"{where}: architectures = {names!r} is no list of names")
    for family in FAMILIES:
        if kind == family.model_type or (kind is None and family.name in names):
            if names and family.name not in names:
                raise ConfigError(
                    f"{where}: architectures = {names!r} with model_type {kind!r}: only {family.name} can be expressed"
                )
            return family
    code = "; code that comes with a model is never run" if "auto_map" in config else ""
    raise ConfigError(
        f"{where}: model_type = {kind!r}, architectures = {names!r} cannot be expressed{code}; known: {known}"
    )


def training_notes(config: Mapping[str, Any]) -> list[str]:
    """What a config.json says of training or loading that a shape does not carry, in sentences for whoever imports."""
    notes = []
    for key in ("attention_dropout", "attn_pdrop"):
        if config.get(key):
            notes.append(f"{key} = {config[key]}: attention has no dropout here; training goes on without it")
    drops = [config.get(key) for key in ("resid_pdrop", "embd_pdrop") if config.get(key) is not None]
    if len(set(drops)) > 1:
        notes.append(f"resid_pdrop and embd_pdrop are {drops[0]} and {drops[1]}: one dropout stands for both here")
    if "auto_map" in config:
        notes.append("auto_map names code that comes with the model: it was neither run nor read")
    return notes
