"""The exported tokenizer gives the ids of training's, on code, prose, and whatever hypothesis thinks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hf.made_checkpoint import library_code, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron.config.errors import ConfigError, ProofError
from megatron.hf.tokenizer_check import TRICKY, check_equal, sample_texts
from megatron.hf.tokenizer_files import write_tokenizer
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer


def written(folder: Path, tokenizer: Tokenizer) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    write_tokenizer(folder, tokenizer, 512)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    folder = tmp_path_factory.mktemp("sp")
    tokenizer = load_tokenizer(make_tokenizer(folder, 1500))
    return written(folder / "out", tokenizer), tokenizer


def test_sentencepiece_is_equal_on_a_megabyte(pair: tuple[Any, Tokenizer]) -> None:
    fast, tokenizer = pair
    assert check_equal(fast, tokenizer, sample_texts()) > 1_000_000


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\u2581=_ae<>/s|")), max_size=300))
def test_sentencepiece_is_equal_on_any_text(pair: tuple[Any, Tokenizer], text: str) -> None:
    fast, tokenizer = pair
    assert fast(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("text", TRICKY)
def test_decoding_gives_the_text_back(pair: tuple[Any, Tokenizer], text: str) -> None:
    fast, _ = pair
    assert fast.decode(fast(text)["input_ids"]) == text


def test_bytes_and_foreign_json_are_equal(pair: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    assert check_equal(written(tmp_path / "bytes", tokenizer), tokenizer, sample_texts(50_000)) > 50_000
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(library_code(5), vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>"])
    bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    foreign = load_tokenizer(tmp_path / "tokenizer.json")
    assert check_equal(written(tmp_path / "json", foreign), foreign, sample_texts(50_000)) > 50_000


def test_C3_a_tokenizer_that_differs_is_found(pair: tuple[Any, Tokenizer]) -> None:
    fast, _ = pair
    with pytest.raises(ProofError, match="differs from the tokenizer used in training"):
        check_equal(fast, load_tokenizer("bytes"), ["def f(x): return x"])


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("normalises text", {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True}),
        ("byte pieces", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
        ("neither BPE nor unigram", {"model_type": "char", "normalization_rule_name": "identity"}),
        ("spaces behind words", {"treat_whitespace_as_suffix": True, "normalization_rule_name": "identity"}),
    ],
)
def test_B1_models_that_cannot_be_translated_are_refused(said: str, options: dict[str, Any], tmp_path: Path) -> None:
    lines = [line for text in library_code(10) for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "t"),
        vocab_size=700,
        minloglevel=2,
        **{"model_type": "bpe"} | options,
    )
    with pytest.raises(ConfigError, match=said):
        write_tokenizer(tmp_path, load_tokenizer(tmp_path / "t.model"), 512)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True, "user_defined_symbols": ["<|im_end|>"]},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<|im_end|>", "return", "    "]},
    ],
    ids=["dummy prefix", "matched symbols"],
)
def test_foreign_models_are_equal_too(options: dict[str, Any], tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(library_code(10)),
        model_prefix=str(tmp_path / "t"),
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1_000_000,
        minloglevel=2,
        **options,
    )
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert check_equal(written(tmp_path / "out", tokenizer), tokenizer, sample_texts(200_000)) > 200_000
