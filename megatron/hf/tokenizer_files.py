"""The exported folder's tokenizer: a fast tokenizer.json and tokenizer_config.json, equal to what training used.

Equality is checked, never assumed: `check_equal` compares ids with the tokenizer that training used, text by text.
`split_special_tokens` is set in tokenizer_config.json, so that "</s>" inside a text stays text, as in training. Readers
who want such strings to become control tokens (chat templates, say) load with split_special_tokens=False.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron.config.errors import ProofError
from megatron.hf.sentencepiece_bpe import convert_sentencepiece
from megatron.tokenizers.base import Tokenizer, looks_like_marker

TRICKY = (
    "",
    " ",
    "\n",
    "x",
    "def f(x):\n    if x:\n        return {'a': [1, 2]}\n\n\n\treturn None\r\n",
    "".join(" " * width + "x\n" for width in range(33)),
    "Grüße, señor – naïve “quotes” … 漢字かな交じり文 한국어 עברית العربية हिन्दी 🙂👩‍👩‍👧‍👦 \U0001f9ea\u0000\ufffd",
    "e\u0301 vs \u00e9; \ufb01 \u2460 \uff21; a\u00a0b\u2003c\u200bd\u2581e",
    "before <s> </s> <unk> <pad> <|endoftext|> <0x0A> [INST] after</s>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ababababababab -------------------- ==========\n",
    "0123456789 3.14159e-10 0xDEADBEEF 1_000_000",
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, model_max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and a copy of the tokenizer's own files into `folder`.

    Raises ConfigError for a tokenizer that cannot be translated.
    """
    files = tokenizer.files()
    unknown = None
    if not files:
        fast = _from_bytes(tokenizer)
    elif _is_json(files[0]):
        fast = _from_json(files[0])
    else:
        fast, unknown = convert_sentencepiece(files[0])
        shutil.copyfile(files[0], folder / "tokenizer.model")
    fast.save(str(folder / "tokenizer.json"))
    end = fast.id_to_token(tokenizer.eod_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "split_special_tokens": True,
    }
    if unknown is not None:
        config["unk_token"] = unknown
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def _from_json(path: Path) -> Any:
    """The file itself, without a template that would add tokens that training did not. Markers count as special."""
    from tokenizers import Tokenizer as FastTokenizer

    described = json.loads(path.read_text(encoding="utf-8"))
    for token in described.get("added_tokens") or []:
        token["special"] = token["special"] or looks_like_marker(token["content"])
    fast = FastTokenizer.from_str(json.dumps(described))
    if fast.encode("", add_special_tokens=True).ids:
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


def check_equal(fast: Any, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Compares the ids of `fast` (from AutoTokenizer) with training's, text by text; gives the bytes compared.

    Raises ProofError that shows the first difference.
    """
    compared = 0
    for text in texts:
        ours, theirs = tokenizer.encode(text), fast(text)["input_ids"]
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            near = tokenizer.decode(ours[max(0, at - 4) : at + 8])
            raise ProofError(
                f"the exported tokenizer differs from the tokenizer used in training: at token {at}, near {near!r}: "
                f"training gives {ours[at : at + 6]}, the export {theirs[at : at + 6]}"
            )
        compared += len(text.encode("utf-8", "surrogatepass"))
    return compared


def sample_texts(minimum_bytes: int = 1_200_000) -> Iterator[str]:
    """Text for the comparison that every machine has: tricky strings, the standard library's code, and its prose."""
    yield from TRICKY
    given = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if given >= minimum_bytes:
            return
        try:
            text = path.read_text(encoding="utf-8")
            prose = _docstrings(text)
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        for part in (text, prose):
            given += len(part)
            yield part
    if given < minimum_bytes:
        print(f"tokenizer check: only {given} bytes of text found on this machine", file=sys.stderr)


def _docstrings(source: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return "\n\n".join(filter(None, found))
