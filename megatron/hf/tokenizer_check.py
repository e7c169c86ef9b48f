"""Whether an exported tokenizer gives what the tokenizer of training, or of the imported model, gives: text by text."""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron.config.errors import ProofError
from megatron.hf.special_token_ids import stated_config
from megatron.tokenizers.base import Tokenizer

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
_SHOWN, _SHORT = 8, 1000
_READ_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers 4 and 5 that take a tokenizer.json as it is."""


def check_equal(fast: Any, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Compares the ids of `fast` (from AutoTokenizer) with training's, text by text, and the text that both make of
    them again; gives the bytes compared.

    Raises ProofError that shows the first difference.
    """
    compared = 0
    for text in texts:
        ours, theirs = tokenizer.encode(text), fast(text)["input_ids"]
        if ours != theirs:
            words = _difference("the tokenizer used in training", "training", tokenizer, ours, theirs)
            raise ProofError(words + _why(fast))
        if (wanted := tokenizer.decode(ours)) != (found := fast.decode(ours)):
            at = _first(wanted, found)
            raise ProofError(
                "the exported tokenizer makes another text of the same ids than the tokenizer used in training: at "
                f"character {at}, {found[at : at + _SHOWN]!r} instead of {wanted[at : at + _SHOWN]!r}"
            )
        compared += len(text.encode("utf-8", "surrogatepass"))
    return compared


def check_as_imported(fast: Any, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Compares the ids of `fast` (from AutoTokenizer) with those of the imported tokenizer.json as it was: with special
    tokens in a text, and with and, of short texts, without those that it puts around. Gives the bytes compared.

    Names of special tokens in a text are text where the imported tokenizer_config.json says split_special_tokens, as
    AutoTokenizer reads it; else they are the tokens.
    Raises ProofError that shows the first difference.
    """
    from tokenizers import Tokenizer as FastTokenizer

    original = FastTokenizer.from_file(str(tokenizer.files()[0]))
    original.no_truncation()
    original.no_padding()
    original.encode_special_tokens = stated_config(tokenizer).get("split_special_tokens") is True
    compared = 0
    names = " ".join(tokenizer.special_ids)
    for text in (*texts, names, f"before {names} after"):
        for added in (True, False) if len(text) < _SHORT else (True,):
            wanted = original.encode(text, add_special_tokens=added).ids
            found = fast(text, add_special_tokens=added)["input_ids"]
            if wanted != found:
                kind = f"the imported tokenizer (add_special_tokens={added})"
                words = _difference(kind, "the original", tokenizer, wanted, found)
                raise ProofError(words + (_why(fast) or _remedy(tokenizer)))
        compared += len(text.encode("utf-8", "surrogatepass"))
    return compared


def _difference(kind: str, who: str, tokenizer: Tokenizer, wanted: Sequence[int], found: Sequence[int]) -> str:
    at = _first(wanted, found)
    near = tokenizer.decode(wanted[max(0, at - 4) : at + 8])
    return (
        f"the exported tokenizer differs from {kind}: at token {at}, near {near!r}: {who} gives {wanted[at : at + 6]}, "
        f"the export {found[at : at + 6]}"
    )


def _remedy(tokenizer: Tokenizer) -> str:
    """What a user can do about an imported tokenizer that does not come out again."""
    return (
        f". The original is {tokenizer.files()[0]} with the tokenizer_config.json beside it: see that both are of one "
        "tokenizer and import the model again, name the right one with --tokenizer PATH, or export with --no-prove and "
        "copy the original's tokenizer files into the folder"
    )


def _why(fast: Any) -> str:
    """What is known to make a difference that is not the files' fault."""
    name = type(fast).__name__
    if name not in _READ_THE_FILE:
        return (
            f". transformers makes a {name} of the tokenizer of every {name.removesuffix('Tokenizer')} model, whatever "
            "tokenizer_config.json says, and that class cuts text in words its own way: give such a model its own "
            "tokenizer, or export with --no-prove and load it by PreTrainedTokenizerFast.from_pretrained"
        )
    if type(fast.backend_tokenizer.model).__name__ == "Unigram":
        return (
            ". Unigram models choose the cut that scores best, and SentencePiece sums scores in float32: in long texts "
            "cuts that score the same fall either way. Train the tokenizer with model_type=bpe (stagemix "
            "train_tokenizer does)"
        )
    return ""


def _first(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def held_out_documents(texts: Mapping[str, Sequence[int]], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of a run's held-out documents, given as tokens with an end-of-document token behind each."""
    for tokens in texts.values():
        document: list[int] = []
        for token in (*tokens, tokenizer.eod_id):
            if token != tokenizer.eod_id:
                document.append(token)
            elif document:
                yield tokenizer.decode(document)
                document = []


def sample_texts(minimum_bytes: int = 1_200_000) -> Iterator[str]:
    """Text for the comparison that every machine has: tricky strings, random ones, the standard library's code, and its
    prose."""
    yield from TRICKY
    yield from random_texts()
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


def random_texts(count: int = 400, seed: int = 0) -> Iterator[str]:
    """Short strings of characters that have nothing to do with each other, the same for the same seed.

    Of scripts, marks and controls that Unicode 3.2 knows, since libraries differ in the age of their tables for younger
    ones, and of pictures (emoji), which no table changes.
    """
    known = unicodedata.ucd_3_2_0
    old = [chr(n) for n in range(0x30000) if known.category(chr(n)) not in ("Cn", "Cs", "Co")]
    pictures = [chr(n) for n in range(0x1F300, 0x1F650)]
    ascii_only = [chr(n) for n in range(128)]
    generator = random.Random(seed)
    for _ in range(count):
        alphabets = generator.choices(
            (old, pictures, ascii_only, [" ", "\n"]), (6, 1, 5, 2), k=generator.randint(1, 40)
        )
        yield "".join(map(generator.choice, alphabets))


@cache  # a process that exports many models parses them once
def _docstrings(source: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return "\n\n".join(filter(None, found))
