"""Whether a Hugging Face folder's config.json means the model that its weights are to be taken into.

Sizes are seen from the tensors. What is not (how many heads a matrix is, the angles of positions, the activation) would
train another function without a word.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.config.rope_scaling import RopeScaling
from megatron.hf.architecture import CONFIG, family_of, read_config, shape_from_config
from megatron.hf.families.family import FREE, Family, same_value
from megatron.hf.families.windows import layers_within

_NO_FUNCTION = FREE | {"initializer_range", "max_position_embeddings"}
"""Fields in which a model may differ from the folder's: they change no logit. Learned positions show in the tensors."""


def check_config(folder: Path, shape: ModelShape) -> Family:
    """The folder's family.

    Raises CheckpointError where the file cannot be read, or that names each key, its value there and ours; ConfigError
    for what no ModelShape expresses.
    """
    path = Path(folder) / CONFIG
    config = read_config(path)
    family = family_of(config, str(path))
    theirs = layers_within(shape_from_config(config, str(path)), shape.max_position_embeddings)
    shape = layers_within(shape, shape.max_position_embeddings)
    names = [item.name for item in fields(ModelShape) if item.name not in _NO_FUNCTION]
    different = [
        f"{family.key_of(name) or name} is {_shown(there)}, the model has {_shown(ours)}"
        for name in names
        if not same_value(there := getattr(theirs, name), ours := getattr(shape, name))
    ]
    if different:
        raise CheckpointError(
            f"{path}: {'; '.join(different)}: its weights would mean another function; set [model] as the folder says, "
            "or take another folder"
        )
    return family


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, RopeScaling):
        return ", ".join(f"{key} {word}" for key, word in value.to_json().items())
    return repr(value)
