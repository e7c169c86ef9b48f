"""tiktoken rank files as published: the library's ids, the publishers' special tokens, errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer
from megatron.tokenizers.tiktoken_patterns import KNOWN
from tests.tokenizers.made_tokenizers import LLAMA3, made_ranks, write_ranks

RANKS = made_ranks()
NAMES = ["<|endoftext|>", "<|fim_prefix|>", "<|endofprompt|>", "<|begin_of_text|>", "<|im_end|>"]
texts = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(NAMES)), max_size=5
).map("".join)


@pytest.fixture(scope="module", params=["cl100k_base", "o200k_base", "r50k_base", "gpt2", "llama3", "qwen2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_ranks(tmp_path_factory.mktemp("ranks") / f"{request.param}.tiktoken"))


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_every_text_stays_text_and_has_the_librarys_ids(tokenizer: Tokenizer, text: str) -> None:
    known = tokenizer.name.removesuffix(".tiktoken")
    library = tiktoken.Encoding(known, pat_str=KNOWN[known].pattern, mergeable_ranks=RANKS, special_tokens={})
    ids = tokenizer.encode(text)
    if KNOWN[known].normalization == "":
        assert ids == library.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    assert set(tokenizer.special_ids.values()).isdisjoint(ids)
    assert tokenizer.encode_batch([text, "a", text]) == [ids, tokenizer.encode("a"), ids]


def test_qwen_normalises_as_its_publisher_does(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_ranks(tmp_path / "qwen2.tiktoken"))
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9") != list(b"cafe\xcc\x81")


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "r50k_base"])
def test_patterns_and_special_ids_are_openais(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against tiktoken's own definitions, with ranks of the published number in place of a download."""
    count = {"cl100k_base": 100256, "o200k_base": 199998, "r50k_base": 50256}[name]
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    published = getattr(tiktoken_ext.openai_public, name)()
    assert KNOWN[name].pattern == published["pat_str"]
    assert {token: count + offset for token, offset in KNOWN[name].special.items()} == published["special_tokens"]


def test_llama3_special_ids_are_metas(tmp_path: Path) -> None:
    assert KNOWN["llama3"].pattern == LLAMA3
    ids = {name: 128000 + offset for name, offset in KNOWN["llama3"].special.items()}
    assert len(ids) == 256 and sorted(ids.values()) == list(range(128000, 128256))
    stated = {"begin_of_text": 128000, "end_of_text": 128001, "start_header_id": 128006, "end_header_id": 128007}
    stated |= {"eot_id": 128009, "reserved_special_token_250": 128255}
    assert {name: ids[f"<|{name}|>"] for name in stated} == stated
    assert load_tokenizer(write_ranks(tmp_path / "llama3.tiktoken")).eod_id == len(RANKS) + 1


def test_a_file_by_another_name_says_its_pattern_beside_it(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match='cl100k_base.tiktoken.*tokenizer.model.json.*"llama3" for Llama 3'):
        load_tokenizer(path)
    beside = tmp_path / "tokenizer.model.json"
    beside.write_text(json.dumps({"pattern": "llama3"}))
    by_name = load_tokenizer(tmp_path)
    assert by_name.eod_id == by_name.special_ids["<|end_of_text|>"]
    assert [file.name for file in by_name.files()] == ["tokenizer.model", "tokenizer.model.json"]
    beside.write_text(json.dumps({"pattern": r"\w+|\W", "special_tokens": {"<|endoftext|>": 900, "<x>": 901}}))
    own = load_tokenizer(path)
    assert (own.eod_id, own.vocab_size) == (900, 902) and own.fingerprint != by_name.fingerprint
    library = tiktoken.Encoding("own", pat_str=r"\w+|\W", mergeable_ranks=RANKS, special_tokens={})
    assert own.encode("def the x, <x>") == library.encode_ordinary("def the x, <x>")
    assert own.decode([900, *own.encode("a <x>"), 901]) == "a <x>"


def test_a_folder_with_one_rank_file_opens(tmp_path: Path) -> None:
    write_ranks(tmp_path / "cl100k_base.tiktoken")
    assert load_tokenizer(tmp_path).library == f"tiktoken {tiktoken.__version__}"
    write_ranks(tmp_path / "gpt2.tiktoken")
    with pytest.raises(DataError, match="nor one .tiktoken file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("{", "not JSON"),
        ("[]", "an object is expected"),
        ('{"patern": "x"}', "field 'patern' is unknown"),
        ('{"pattern": 3}', "pattern 3 is no string"),
        ('{"pattern": "("}', "check the pattern"),
        ('{"pattern": "gpt2", "special_tokens": {"<x>": -1}}', "ids by name"),
        ('{"pattern": "gpt2", "special_tokens": {"<|endoftext|>": 7}}', "id 7 is the rank of a piece"),
        ('{"pattern": "gpt2", "special_tokens": {"<x>": 999}}', "no end-of-document token"),
        ('{"pattern": "gpt2", "normalization": "NFKC"}', "normalization 'NFKC'"),
    ],
)
def test_B1_a_wrong_file_beside_it_is_named(tmp_path: Path, beside: str, said: str) -> None:
    path = write_ranks(tmp_path / "own.tiktoken")
    (tmp_path / "own.tiktoken.json").write_text(beside)
    with pytest.raises(DataError, match=said):
        load_tokenizer(path)


def test_B1_a_damaged_rank_file_is_named(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "gpt2.tiktoken")
    whole = path.read_bytes()
    for content, said in [
        (whole[: len(whole) // 2], "no token for the byte|line"),
        (whole + b"%%% 9\n", "line 2[0-9]+: b'%%% 9'"),
        (whole + b"YWI= 5\n", "two tokens have one rank"),
        (whole + b"YWJ= 9999\nA 9\n", "line"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_tokenizer(path)
