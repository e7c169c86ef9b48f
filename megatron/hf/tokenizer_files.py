"""The exported folder's tokenizer: a fast tokenizer.json and tokenizer_config.json, equal to what training used.

Equality is checked, never assumed (tokenizer_check). `split_special_tokens` is set in tokenizer_config.json, so that
"</s>" inside a text stays text, as in training, and nothing is put around a text. Readers who want such strings to
become control tokens load with split_special_tokens=False; chat templates are kept, and need it.

The tokenizer of an imported model that was not trained on is another matter: its folder's users know its habits, so it
is written as it came, with what it puts around a text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.hf.sentencepiece_fast import convert_sentencepiece
from megatron.hf.special_token_ids import stated_config, stated_id
from megatron.hf.tiktoken_bpe import convert_tiktoken
from megatron.tokenizers.base import Tokenizer, looks_like_marker
from megatron.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

TEMPLATE = "chat_template.jinja"
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_KEPT = (
    *("additional_special_tokens", "extra_special_tokens", "chat_template", "padding_side", "truncation_side"),
    *("add_prefix_space", "legacy", "model_input_names"),
)
"""Keys of an imported tokenizer_config.json that go on holding whatever class reads the file."""
_KEPT_AS_IMPORTED = (
    "clean_up_tokenization_spaces",
    "model_max_length",
    "split_special_tokens",
    "spaces_between_special_tokens",
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, model_max_length: int, *, as_imported: bool = False) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and a chat template where there is one, and
    a copy of a SentencePiece model, into `folder`.

    as_imported: of an imported model that was not trained on. Raises ConfigError for a tokenizer that cannot be
    translated.
    """
    files = tokenizer.files()
    as_imported = keeps_its_habits(tokenizer) and as_imported
    unknown = None
    if not files:
        fast = _from_bytes(tokenizer)
    elif isinstance(tokenizer, TiktokenTokenizer):
        fast = convert_tiktoken(tokenizer)
    elif _is_json(files[0]):
        fast = _from_json(files[0], as_imported)
    else:
        fast, unknown = convert_sentencepiece(files[0])
        shutil.copyfile(files[0], folder / "tokenizer.model")
    fast.save(str(folder / "tokenizer.json"))
    config = _config(tokenizer, fast.id_to_token(tokenizer.eod_id), unknown, model_max_length, as_imported)
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", {name: config[name] for name in _NAMED if config.get(name)})
    for path in files[1:]:
        if path.name == TEMPLATE:
            shutil.copyfile(path, folder / TEMPLATE)


def keeps_its_habits(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has a tokenizer.json of its own, so that it can be written as it came."""
    files = tokenizer.files()
    return bool(files) and not isinstance(tokenizer, TiktokenTokenizer) and _is_json(files[0])


def _config(
    tokenizer: Tokenizer, end: str, unknown: str | None, model_max_length: int, as_imported: bool
) -> dict[str, Any]:
    """tokenizer_config.json. PreTrainedTokenizerFast reads tokenizer.json as it is: other classes of transformers 5
    make a tokenizer of their own from its vocabulary."""
    stated = stated_config(tokenizer)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if any(stated_id(tokenizer, name) is not None for name in _NAMED[:3]):
        config |= {name: stated[name] for name in _NAMED if stated.get(name)}
        config.setdefault("eos_token", end)
        config.setdefault("pad_token", end)
    else:
        config |= {"bos_token": end, "eos_token": end, "pad_token": end}
    if unknown is not None:
        config["unk_token"] = unknown
    config |= {key: stated[key] for key in _KEPT if key in stated}
    if as_imported:
        return (
            {"model_max_length": model_max_length}
            | config
            | {key: stated[key] for key in _KEPT_AS_IMPORTED if key in stated}
        )
    return config | {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "split_special_tokens": True,
    }


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def _from_json(path: Path, as_imported: bool) -> Any:
    """The file itself. Of a model of ours: without a template that would add tokens that training did not, and markers
    count as special."""
    from tokenizers import Tokenizer as FastTokenizer

    described = json.loads(path.read_text(encoding="utf-8"))
    if not as_imported:
        for token in described.get("added_tokens") or []:
            token["special"] = token["special"] or looks_like_marker(token["content"])
    fast = FastTokenizer.from_str(json.dumps(described))
    if not as_imported and fast.encode("", add_special_tokens=True).ids:
        fast.post_processor = None
    fast.no_truncation()
    fast.no_padding()
    return fast


def _from_bytes(tokenizer: Tokenizer) -> Any:
    """The byte tokenizer: no pieces at all, so that every character falls back to its bytes."""
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    end = "<|endoftext|>"
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {end: tokenizer.eod_id}
    fast = FastTokenizer(BPE(vocab=vocab, merges=[], unk_token=end, byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    return fast


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
