"""Where chat templates stand beside a tokenizer, as transformers saves them, and the names of its special tokens."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError, DataError
from megatron.corpora.chat_builtin_templates import BUILTIN
from megatron.tokenizers.base import Tokenizer

TOOL_USE = "tool_use"  # the name under which tokenizers keep the template for conversations with tools
_FILE, _FOLDER, _CONFIG = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# for tokenizers whose folder does not say how a text begins
_BEGINNINGS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
_MARKER = re.compile(r"<[|\uff5c]?[^\s<>{}'\"%]+?>|\[/?[A-Z0-9_]+\]")


def found_templates(place: Path) -> dict[str, tuple[str, str]]:
    """Text and origin of each template by its name, the only or first one under "default"; {} where there is none.

    place: a Jinja file, a tokenizer_config.json, or a folder, in which chat_template.jinja goes before
    tokenizer_config.json. Raises ConfigError where there is no such place, DataError for a file that cannot be read.
    """
    if place.is_file():
        if place.suffix == ".json":
            return _in_config(place)
        return {"default": (_text(place), str(place))}
    if not place.is_dir():
        near = difflib.get_close_matches(str(place), BUILTIN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(BUILTIN)}"
        raise ConfigError(
            f"--chat-template {place}: no such file or folder, and no built-in template is called so: {hint}"
        )
    found = _in_config(place / _CONFIG) if (place / _CONFIG).is_file() else {}
    if (place / _FILE).is_file():
        found = {"default": (_text(place / _FILE), str(place / _FILE))}
    for path in sorted((place / _FOLDER).glob("*.jinja")):
        found[path.stem] = (_text(path), str(path))
    return found


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Names of special tokens as templates are given them ("bos_token": "<s>").

    What tokenizer_config.json or special_tokens_map.json beside the tokenizer say; else the end of a document as
    eos_token, and, of the usual names for the begin of a text, the one that the tokenizer has.
    """
    names: dict[str, str] = {}
    folder = next((path.parent for path in tokenizer.files()), None)
    stated = False
    for file in ("special_tokens_map.json", _CONFIG):
        if folder is None or not (folder / file).is_file():
            continue
        content = _json(folder / file)
        stated = stated or any(name in content for name in _NAMES)
        for name in _NAMES:
            value = content.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                names[name] = text
    if not stated and (begin := next((name for name in _BEGINNINGS if name in tokenizer.special_ids), None)):
        names["bos_token"] = begin
    if "eos_token" not in names:
        names["eos_token"] = next(name for name, token in tokenizer.special_ids.items() if token == tokenizer.eod_id)
    return names


def stated_names(template: str) -> list[str]:
    """What in a template's text looks like the name of a special token, in order, each once."""
    return list(dict.fromkeys(_MARKER.findall(template)))


def _in_config(path: Path) -> dict[str, tuple[str, str]]:
    value = _json(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (value, str(path))}
    named = isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in value
    )
    if not named:
        raise DataError(f'{path}: chat_template: a text is expected, or a list of {{"name": …, "template": …}}')
    return {item["name"]: (item["template"], f"{path} ({item['name']})") for item in value}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}): correct the file or remove it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: an object is expected")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the chat template is not UTF-8: byte {error.start}: {error.reason}") from None
