"""Which ids begin and end a text: an imported model's own, as its files say; else what its tokenizer says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import CheckpointError
from megatron.tokenizers.base import Tokenizer

KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_OF_THE_LIBRARY = ("transformers_version", "_from_model_config", "_commit_hash")


@dataclass(frozen=True)
class TokenIds:
    """What config.json says of special tokens, and generation_config.json as a whole."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For the record of an import."""
        return {"config": dict(self.config), "generation_config": dict(self.generation)}

    def beyond(self, words: int) -> list[str]:
        """Sentences on ids that a model of so many words does not have, with file, field and value."""
        found = []
        for name, content in ((_CONFIG, self.config), (_GENERATION, self.generation)):
            for key in KEYS:
                value = content.get(key)
                ids = value if isinstance(value, list) else [value]
                if any(id is not None and not 0 <= id < words for id in ids):
                    found.append(f"{name}: {key} = {value}, and the model has {words:,} words, 0 to {words - 1}")
        return found


def read_token_ids(folder: Path) -> TokenIds:
    """What a Hugging Face folder says. Raises CheckpointError where a file is no JSON object, or an id no number."""
    config, generation = _read(folder / _CONFIG), _read(folder / _GENERATION)
    kept = {key: value for key, value in generation.items() if key not in _OF_THE_LIBRARY}
    return TokenIds({key: config[key] for key in KEYS if key in config}, kept)


def token_ids(tokenizer: Tokenizer | None, imported: Mapping[str, Any] | None) -> TokenIds:
    """For an export. imported: what `TokenIds.to_json` recorded, where the weights are an import's and nothing else.

    A model of ours: the tokens that its tokenizer's files name, and the token that ended its documents in training,
    which stands for all that they leave open. Generation ends at either.
    """
    if imported is not None:
        return TokenIds(imported.get("config", {}), imported.get("generation_config", {}))
    if tokenizer is None:
        return TokenIds({}, {"_from_model_config": True})
    bos, eos, pad = (stated_id(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token"))
    end = tokenizer.eod_id
    said = any(id is not None for id in (bos, eos, pad))
    first = bos if said else end
    config = {"bos_token_id": first, "eos_token_id": end if eos is None else eos}
    ends = end if eos in (None, end) else [eos, end]
    pad = end if pad is None else pad
    return TokenIds(config, {"_from_model_config": True, **config, "eos_token_id": ends, "pad_token_id": pad})


def stated_id(tokenizer: Tokenizer, key: str) -> int | None:
    """The id of the token that the tokenizer's tokenizer_config.json names by `key`; None where it does not."""
    value = stated_config(tokenizer).get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return tokenizer.special_ids.get(value) if isinstance(value, str) else None


def stated_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json among the tokenizer's files; empty where there is none."""
    found = [path for path in tokenizer.files()[1:] if path.name == "tokenizer_config.json"]
    return _read(found[0]) if found else {}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}): correct the file or remove it") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no JSON object: correct the file or remove it")
    for key in KEYS:
        value = content.get(key)
        if not all(type(item) is int for item in (value if isinstance(value, list) else [value]) if item is not None):
            raise CheckpointError(f"{path}: {key} is {value!r}, which is neither an id nor a list of ids: correct it")
    return content
