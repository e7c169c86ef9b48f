"""Text goes in and comes out as it was, and text is only ever text. Oracles: the libraries themselves, and UTF-8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from megatron.config.errors import ConfigError, DataError
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer
from megatron.tokenizers.train import train_sentencepiece

CORPUS = [
    "def add(left, right):\n    # The sum of two numbers.\n    return left + right\n\n\nclass Thing:\n\tpass\n",
    "It was a bright cold day in April, and the clocks were striking thirteen; <|endoftext|> was in the file.\n",
    "if x == 12345:\n        print('naïve café, 你好')\n",
] * 8
MARKERS = ["<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<sep>", "<|im_end|>", "[MASK]", "<0x41>"]
DIFFICULT = [
    "",
    " ",
    "  a  ",
    "\n\n\t x\r\n",
    "▁",
    "a ▁ b",
    "\u2047",
    "\u2585",
    "\x00",
    "\ufeffa",
    "e\u0301 ﬁ Å",
    "🙂\u200d🔥",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def sentencepiece_path(folder: Path) -> Path:
    path = folder / "sp" / "tokenizer.model"
    train_sentencepiece(CORPUS, path, 450)
    return path


@pytest.fixture(scope="module")
def hugging_face_path(folder: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False), AddedToken("[MASK]"), AddedToken("    ")])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    (folder / "hf").mkdir()
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    return folder / "hf" / "tokenizer.json"


@pytest.fixture(scope="module", params=["sentencepiece", "hugging_face", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(request.getfixturevalue(f"{request.param}_path"))


texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from([*MARKERS, *DIFFICULT, *CORPUS[:3]]),
        st.text(" \n\t▁", max_size=8),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_every_text_comes_back_and_stays_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eod_id not in ids
    assert tokenizer.encode_batch([text, "a", text]) == [ids, tokenizer.encode("a"), ids]


@pytest.mark.parametrize("marker", MARKERS)
def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer, marker: str) -> None:
    ids = tokenizer.encode(f"a{marker}b {marker}")
    assert tokenizer.decode(ids) == f"a{marker}b {marker}"
    assert len(tokenizer.encode(marker)) > 1
    assert tokenizer.eod_id not in ids


def test_nothing_is_added_and_eod_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eod_id]) == "ab"


def test_B1_a_lone_surrogate_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"surrogate U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")


def test_sentencepiece_ids_are_the_librarys(sentencepiece_path: Path) -> None:
    ours, library = load_tokenizer(sentencepiece_path), sentencepiece.SentencePieceProcessor(str(sentencepiece_path))
    for text in [*CORPUS, *MARKERS]:
        assert ours.encode(text) == library.encode(text)
    assert (ours.vocab_size, ours.eod_id) == (library.vocab_size(), library.eos_id())
    assert library.id_to_piece(ours.eod_id) == "<|endoftext|>"


def test_hugging_face_ids_are_the_librarys_without_markers(hugging_face_path: Path) -> None:
    ours, library = load_tokenizer(hugging_face_path), tokenizers.Tokenizer.from_file(str(hugging_face_path))
    library.no_truncation()
    library.no_padding()
    for text in [CORPUS[0] * 3, CORPUS[2], "x    y"]:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert len(ours.encode("    ")) == 1  # an added token that is text, not a marker
    assert ours.vocab_size == library.get_vocab_size(with_added_tokens=True)


def test_user_defined_markers_of_a_sentencepiece_model_are_text(folder: Path) -> None:
    path = folder / "user.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path)[:-6], vocab_size=450, model_type="bpe", minloglevel=2,
        byte_fallback=True, user_defined_symbols=["<sep>", "<|im_end|>", "\n\n", "return"], control_symbols=["<cls>"],
    )  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(str(path))
    assert library.piece_to_id("<sep>") in library.encode("a<sep>b")  # the library alone does match it
    ours = load_tokenizer(path)
    for marker in ("<sep>", "<|im_end|>", "<cls>"):
        assert library.piece_to_id(marker) not in ours.encode(f"a{marker}b")
        assert ours.decode(ours.encode(f"a{marker}b")) == f"a{marker}b"
    assert ours.encode("a return b") == library.encode("a return b")
    assert library.piece_to_id("return") in ours.encode("return")
    assert ours.vocab_size == library.vocab_size()


def test_a_unigram_vocabulary_that_lists_its_special_token(folder: Path) -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "a</s>b")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, 0, False))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.encode_special_tokens = True
    assert 1 in tokenizer.encode("a</s>b").ids  # the library alone gives the special id
    path = folder / "unigram.json"
    tokenizer.save(str(path))
    ours = load_tokenizer(path)
    assert ours.eod_id == 1
    assert ours.encode("a</s>b</s></s>")[:6] == [2, 3, 4, 5, 6, 7]
    assert 1 not in ours.encode("a</s>b</s></s>")


def write_hugging_face(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_eod_is_found_by_name_or_said_in_the_config(tmp_path: Path) -> None:
    for number, (names, eod) in enumerate(
        [(["<x>", "<|endoftext|>"], 3), (["</s>", "<x>"], 2), (["<x>", "<|end_of_text|>"], 3)]
    ):
        assert load_tokenizer(write_hugging_face(tmp_path / str(number), names)).eod_id == eod
    path = write_hugging_face(tmp_path / "none", ["<x>", "<end>"])
    with pytest.raises(DataError, match="no end-of-document token.*tokenizer_config.json"):
        load_tokenizer(path)
    for value in ("<end>", {"content": "<end>"}):
        (path.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        assert load_tokenizer(path).eod_id == 3
    assert [p.name for p in load_tokenizer(path).files()] == ["tokenizer.json", "tokenizer_config.json"]
    (path.parent / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json: not JSON"):
        load_tokenizer(path)


def test_fingerprint_is_of_content_not_name(sentencepiece_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.model"
    copy.write_bytes(sentencepiece_path.read_bytes())
    assert load_tokenizer(copy).fingerprint == load_tokenizer(sentencepiece_path).fingerprint
    assert load_tokenizer(sentencepiece_path.parent).fingerprint == load_tokenizer(copy).fingerprint
    train_sentencepiece(CORPUS, copy, 449)
    assert load_tokenizer(copy).fingerprint != load_tokenizer(sentencepiece_path).fingerprint


def test_B1_a_damaged_file_is_named(sentencepiece_path: Path, hugging_face_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken"
    for source in (sentencepiece_path, hugging_face_path):
        whole = source.read_bytes()
        for length in (1, 10, len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match="broken"):
                load_tokenizer(path)
    for content, said in [
        (b"", "empty"),
        (b"hello world", "neither"),
        (b"{}", 'no "model"'),
        (b"\xff" * 99, "neither"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_tokenizer(path)
    with pytest.raises(DataError, match="no such file.*train_tokenizer"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="in this folder"):
        load_tokenizer(tmp_path / "folder")


def test_training_is_deterministic_and_keeps_indentation(sentencepiece_path: Path, tmp_path: Path) -> None:
    report = train_sentencepiece(iter(CORPUS), tmp_path / "again.model", 450)
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_path.read_bytes()
    assert report.documents == len(CORPUS) and report.sample_bytes == sum(len(t.encode()) for t in CORPUS)
    library = sentencepiece.SentencePieceProcessor(str(sentencepiece_path))
    assert "▁▁▁▁" in library.encode("x\n    y", out_type=str)
    assert library.encode("12345", out_type=str) == list("12345")
    assert list(tmp_path.iterdir()) == [tmp_path / "again.model"]


def test_training_takes_no_more_than_the_sample(tmp_path: Path) -> None:
    report = train_sentencepiece(["".join(CORPUS)] * 50, tmp_path / "t.model", 450, sample_bytes=9_000)
    assert 9_000 <= report.sample_bytes < 9_000 + 4 * 4096
    assert 2 <= report.documents < 50


def test_B1_training_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece([], tmp_path / "t.model", 400)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", ""], tmp_path / "t.model", 400)
    with pytest.raises(DataError, match="too few for a vocabulary of 8192"):
        train_sentencepiece(CORPUS, tmp_path / "t.model", 8192)
    many_characters = "".join(map(chr, range(0x4E00, 0x5E00)))
    with pytest.raises(DataError, match=r"400 is too small for the characters.*above \d+"):
        train_sentencepiece([many_characters], tmp_path / "t.model", 400)
    with pytest.raises(ConfigError, match="too small"):
        train_sentencepiece(CORPUS, tmp_path / "t.model", 100)
    assert list(tmp_path.iterdir()) == []
