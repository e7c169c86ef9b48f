"""The sentinels of every published family are found in tokenizers of the kind that its models have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron.config.errors import DataError
from megatron.tokenizers.fim_tokens import FimTokens, fim_tokens
from megatron.tokenizers.load import load_tokenizer
from tests.tokenizers.made_tokenizers import write_byte_level, write_ranks, write_sentencepiece

# As the models' own repositories write them: prefix, middle, suffix, pad.
PUBLISHED = {
    "StarCoder, StarCoder2, Granite": ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
    "StarCoder without pad": ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", None),
    "SantaCoder": ("<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"),
    "Qwen2.5-Coder": ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    "CodeGemma": ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", None),
    "CodeLlama": ("▁<PRE>", "▁<MID>", "▁<SUF>", None),
    "DeepSeek": ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>", None),
    "Codestral": ("[PREFIX]", "[MIDDLE]", "[SUFFIX]", None),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", PUBLISHED)
def test_in_a_tokenizer_json(tmp_path: Path, family: str, special: bool) -> None:
    names = [name for name in PUBLISHED[family] if name]
    path = write_byte_level(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False) for name in names[::-1]])
    library.save(str(path))
    tokenizer = load_tokenizer(path)
    found = fim_tokens(tokenizer)
    assert found == FimTokens(*[None if name is None else library.token_to_id(name) for name in PUBLISHED[family]])
    for name in names:
        assert library.token_to_id(name) not in tokenizer.encode(f"a {name} b{name}")
        assert tokenizer.decode([library.token_to_id(name)]) == ""


@pytest.mark.parametrize("kind", ["control_symbols", "user_defined_symbols"])
@pytest.mark.parametrize("family", ["StarCoder without pad", "CodeLlama", "Codestral"])
def test_in_a_sentencepiece_model(tmp_path: Path, family: str, kind: str) -> None:
    names = [name for name in PUBLISHED[family] if name]
    path = write_sentencepiece(tmp_path / "t.model", **{kind: names})
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    assert fim_tokens(tokenizer) == FimTokens(*[library.piece_to_id(name) for name in names], None)
    for name in names:
        text = f"a {name.removeprefix('▁')} b"
        assert library.piece_to_id(name) not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_code_llamas_sentinels_among_ordinary_pieces(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "t.model", user_defined_symbols=["▁<PRE>", "▁<MID>", "▁<SUF>"])
    content = path.read_bytes()
    for name in ("▁<PRE>", "▁<MID>", "▁<SUF>"):
        at = content.index(name.encode()) + len(name.encode()) + 5  # behind the text the score, behind it the kind
        assert content[at : at + 2] == b"\x18\x04"
        content = content[: at + 1] + b"\x01" + content[at + 2 :]
    path.write_bytes(content)
    tokenizer = load_tokenizer(path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    wanted = FimTokens(*[library.piece_to_id(name) for name in ("▁<PRE>", "▁<MID>", "▁<SUF>")], None)
    assert fim_tokens(tokenizer) == wanted


def test_in_rank_files(tmp_path: Path) -> None:
    cl100k = load_tokenizer(write_ranks(tmp_path / "cl100k_base.tiktoken"))
    found = fim_tokens(cl100k)
    end = cl100k.eod_id
    assert found == FimTokens(end + 1, end + 2, end + 3, None)
    assert fim_tokens(load_tokenizer(write_ranks(tmp_path / "gpt2.tiktoken"))) is None


def test_none_without_all_three(tmp_path: Path) -> None:
    assert fim_tokens(load_tokenizer("bytes")) is None
    path = write_byte_level(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens(["<fim_prefix>", "<fim_middle>", "[SUFFIX]"])
    library.save(str(path))
    assert fim_tokens(load_tokenizer(path)) is None


def test_text_that_merely_names_them_is_not_enough(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path / "tokenizer.json")
    described = json.loads(path.read_text())
    described["model"]["vocab"] |= {"<fim_prefix>": 400, "<fim_middle>": 401, "<fim_suffix>": 402}
    path.write_text(json.dumps(described))
    assert fim_tokens(load_tokenizer(path)) is None


def test_B1_two_sentinels_of_one_id(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "own.tiktoken")
    special = {"<|endoftext|>": 900, "<fim_prefix>": 901, "<fim_middle>": 902, "<fim_suffix>": 902}
    (tmp_path / "own.tiktoken.json").write_text(json.dumps({"pattern": "gpt2", "special_tokens": special}))
    with pytest.raises(DataError, match="one id"):
        fim_tokens(load_tokenizer(path))
