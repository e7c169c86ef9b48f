"""The config.toml of an imported checkpoint: [model] as its weights are, and the rest of a run to be filled in.

It is a whole config, which `plan` reads: until there are corpora, its source is a size to plan with.
"""

from __future__ import annotations

import json
import re
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.load import config_from_tables, config_to_toml
from megatron.config.model_section import ModelSection
from megatron.config.model_shape import ModelShape, resolve_model

_LONGEST = 4096
_TEXT = """# Imported: {origin}.
# [model] is what the weights are. To train on from them: copy this file, give it your corpora and lengths (YOURS),
# then `stagemix plan FILE` and `stagemix train FILE`.

[run]
name = {name}
output = {run}    # YOURS

[tokenizer]
path = {tokenizer}{tokenizer_note}

{model}

[sources.mine]    # YOURS: as many sources as you have, each in a group
group = "text"
tokens = "1B"     # a size to plan with; instead of it, data = ["PREFIX"] of what `stagemix preprocess_data` wrote

[train]
global_batch_size = 64    # YOURS
micro_batch_size = 1

[[stages]]
name = "continued"
tokens = "1B"    # YOURS
mixture = {{ text = 1 }}
lr = {{ warmup = "1%", peak = 1e-5, shape = "cosine", final = 1e-6 }}    # YOURS: nothing here knows the right one
take = {{ weights = {weights} }}
"""


def continued_config(shape: ModelShape, name: str, origin: str, checkpoint: Path, tokenizer: Path | None) -> str:
    """The text. name: of the run to be. origin: of the weights, for people. checkpoint: the folder that it lies in.
    tokenizer: a path as [tokenizer] takes it; None where there is none.

    Raises ConfigError where [model] cannot say the shape.
    """
    words = {
        "origin": re.sub(r"[\x00-\x1f\x7f]+", " ", origin),
        "name": _quoted(name),
        "run": _quoted(f"runs/{name}"),
        "tokenizer": _quoted(str(tokenizer or "TOKENIZER")),
        "tokenizer_note": "" if tokenizer else "    # YOURS: none came with the weights that can be read",
        "weights": _quoted(str(checkpoint)),
    }
    text = _TEXT.format(model=_model_table(shape), **words)
    _check(text, shape)
    return text


def _model_table(shape: ModelShape) -> str:
    said = {key: value for key, value in shape.to_json().items() if key in ModelSection.model_fields}
    if shape.position_embedding == "learned":
        said = {key: value for key, value in said.items() if not key.startswith(("rope_", "partial_rotary_"))}
    else:
        del said["max_position_embeddings"]
    said = {key: value for key, value in said.items() if value not in (None, "")}
    said["seq_length"] = min(_LONGEST, shape.max_position_embeddings)
    tables: dict[str, Any] = {
        "run": {"name": "x", "output": "x"},
        "tokenizer": {"path": "x"},
        "model": said,
        "sources": {"x": {"tokens": 1}},
        "train": {"global_batch_size": 1},
        "stages": [{"name": "x", "tokens": 1, "mixture": {"x": 1}, "lr": {"peak": "0"}}],
    }
    written = config_to_toml(config_from_tables(tables))
    table = next(part for part in written.split("\n\n") if part.startswith("[model]"))
    note = f"    # the weights' folder says max_position_embeddings = {shape.max_position_embeddings}"
    return re.sub(r"^(seq_length = \d+)$", rf"\1{note}", table, flags=re.MULTILINE)


def _check(text: str, shape: ModelShape) -> None:

    config = config_from_tables(tomllib.loads(text, parse_float=Decimal))
    again = resolve_model(config.model, 1, shape.max_position_embeddings).to_json()
    wanted = shape.to_json()
    if different := [key for key in wanted if again.get(key) != wanted[key]]:
        values = ", ".join(f"{key} = {wanted[key]!r} becomes {again.get(key)!r}" for key in different)
        raise ConfigError(f"a [model] table cannot say this model: {values}")


def _quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=True)
