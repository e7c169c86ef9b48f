"""The fast encoder gives the reference libraries' ids or is not used. Oracles: sentencepiece, tokenizers, tiktoken."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.tokenizers import gigatoken_encoder
from megatron.tokenizers.encoder import EncoderMismatch, ReferenceEncoder, check_sample, open_encoder
from megatron.tokenizers.gigatoken_encoder import GigatokenEncoder
from megatron.tokenizers.load import load_tokenizer
from megatron.tokenizers.tiktoken_patterns import KNOWN
from tests.tokenizers.made_tokenizers import CORPUS, made_ranks, write_byte_level, write_ranks, write_sentencepiece

Ids = Callable[[str], list[int]]


def added(name: str, number: int, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": name, **plain, **flags}


EOD = added("<|endoftext|>", 0, special=True)


def json_ids(path: Path) -> Ids:
    """The tokenizers library with no special token in the file at all: then text cannot become one."""
    described = json.loads(path.read_text())
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["special"]]
    library = tokenizers.Tokenizer.from_str(json.dumps(described))
    return lambda text: library.encode(text, add_special_tokens=False).ids


def model_ids(path: Path) -> Ids:
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda text: library.encode(text)


def rank_ids(name: str) -> Ids:
    library = tiktoken.Encoding(name, pat_str=KNOWN[name].pattern, mergeable_ranks=made_ranks(), special_tokens={})
    return library.encode_ordinary


FAST = ["llama3", "gpt2", "spaces", "nfc", "bpe", "prefix", "nfkc", "cl100k_base", "llama3 ranks", "o200k_base"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Ids]]:
    root = tmp_path_factory.mktemp("made")
    found: dict[str, tuple[Path, Ids]] = {}
    for name, pattern, changes in (
        ("llama3", write_byte_level.__defaults__[0], {}),  # type: ignore[index]
        ("gpt2", None, {}),
        ("spaces", None, {"added_tokens": [EOD, added("    ", 400), added("\n\n\n", 401, normalized=True)]}),
        ("nfc", write_byte_level.__defaults__[0], {"normalizer": {"type": "NFC"}}),  # type: ignore[index]
    ):
        path = write_byte_level(root / name / "tokenizer.json", pattern, **changes)
        found[name] = path, json_ids(path)
    for name, options in (
        ("bpe", {}),
        ("prefix", {"add_dummy_prefix": True}),
        ("nfkc", {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True, "remove_extra_whitespaces": True}),
    ):
        path = write_sentencepiece(root / f"{name}.model", **options)
        found[name] = path, model_ids(path)
    for name in ("cl100k_base", "o200k_base"):
        found[name] = write_ranks(root / f"{name}.tiktoken"), rank_ids(name)
    found["llama3 ranks"] = write_ranks(root / "llama3.tiktoken"), rank_ids("llama3")
    return found


def of_documents(texts: Sequence[str], ids: Ids, eod: int) -> tuple[list[int], list[int]]:
    lists = [[*ids(text), eod] for text in texts]
    return [i for one in lists for i in one], [len(one) for one in lists]


# U+2581 means a space to sentencepiece and three bytes to us, so the library alone is no oracle for it.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
documents = st.lists(
    st.one_of(
        st.text(characters, max_size=40),
        st.lists(
            st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "e\u0301", "don't", "12", "你", "🙂\u200d🔥", "    a"])
        ).map("".join),
        st.sampled_from([*CORPUS[:3], "<|endoftext|>", "a<|endoftext|>b", "</s>"]),
    ),
    max_size=6,
)


@pytest.mark.parametrize("name", FAST)
def test_fast_ids_are_the_librarys(made: dict[str, tuple[Path, Ids]], name: str) -> None:
    path, ids = made[name]
    tokenizer = load_tokenizer(path)
    encoder = open_encoder(tokenizer, np.uint16, "fast")
    assert encoder.backend == "gigatoken 0.10.0" and encoder.note == ""

    @settings(max_examples=120, deadline=None)
    @given(texts=documents)
    def same(texts: list[str]) -> None:
        found, lengths = encoder.encode_documents(texts)
        wanted, wanted_lengths = of_documents(texts, ids, tokenizer.eod_id)
        assert found.dtype == np.uint16 and lengths.dtype == np.int64
        assert (found.tolist(), lengths.tolist()) == (wanted, wanted_lengths)

    same()


@pytest.mark.parametrize("name", FAST)
def test_fast_ids_are_the_librarys_on_the_standard_library(made: dict[str, tuple[Path, Ids]], name: str) -> None:
    path, ids = made[name]
    tokenizer = load_tokenizer(path)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text() for file in random.Random(1).sample(files, 12)]
    found, lengths = open_encoder(tokenizer, np.int32, "fast").encode_documents(texts)
    assert (found.tolist(), lengths.tolist()) == of_documents(texts, ids, tokenizer.eod_id)


def test_the_reference_encoder_is_the_tokenizer(made: dict[str, tuple[Path, Ids]]) -> None:
    for path, ids in made.values():
        tokenizer = load_tokenizer(path)
        encoder = open_encoder(tokenizer, np.int32, "reference")
        assert encoder.backend == tokenizer.library and "." in encoder.backend and encoder.note == ""
        found, lengths = encoder.encode_documents([*CORPUS[:3], "", "a"])
        assert (found.tolist(), lengths.tolist()) == of_documents([*CORPUS[:3], "", "a"], ids, tokenizer.eod_id)
        assert [len(part) for part in encoder.encode_documents([])] == [0, 0]


def test_a_space_mark_in_a_text_is_text_for_both(made: dict[str, tuple[Path, Ids]]) -> None:
    tokenizer = load_tokenizer(made["bpe"][0])
    fast = open_encoder(tokenizer, np.uint16, "fast")
    texts = ["a\u2581b", "\u2581", " \u2581 "]
    check_sample(fast, tokenizer, texts)
    ids, _ = fast.encode_documents(texts)
    assert tokenizer.decode(ids.tolist()) == "".join(texts)


def test_B1_a_lone_surrogate_is_named(made: dict[str, tuple[Path, Ids]]) -> None:
    for path, _ in made.values():
        for backend in ("fast", "reference"):
            encoder = open_encoder(load_tokenizer(path), np.int32, backend)  # type: ignore[arg-type]
            with pytest.raises(DataError, match=r"surrogate U\+D83D at character 2"):
                encoder.encode_documents(["fine", "ab\ud83d"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"normalizer": {"type": "NFC"}, "added_tokens": [EOD, added("    ", 400)]}, "NFC and the added token"),
        ({"added_tokens": [EOD, added("import", 400, single_word=True)]}, "'import' is matched by more than"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "gigatoken cannot read it"),
    ],
)
def test_T3_a_json_that_is_not_plain_bpe_is_left_to_the_reference(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "tokenizer.json", **changes))
    encoder = open_encoder(tokenizer, np.uint16)
    assert isinstance(encoder, ReferenceEncoder) and reason in encoder.note
    with pytest.raises(UnavailableError, match="fast encoder is not available.*"):
        open_encoder(tokenizer, np.uint16, "fast")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 330}, "unigram"),
        ({"byte_fallback": False, "vocab_size": 120}, "byte fallback"),
        ({"user_defined_symbols": ["return"]}, "user-defined piece, 'return'"),
        ({"treat_whitespace_as_suffix": True}, "spaces"),
    ],
)
def test_T3_a_model_that_is_not_plain_bpe_is_left_to_the_reference(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    path = write_sentencepiece(tmp_path / "t.model", **options)
    encoder = open_encoder(load_tokenizer(path), np.uint16)
    assert isinstance(encoder, ReferenceEncoder) and reason in encoder.note
    found, lengths = encoder.encode_documents(CORPUS)
    wanted = of_documents(CORPUS, model_ids(path), load_tokenizer(path).eod_id)
    assert (found.tolist(), lengths.tolist()) == wanted


def test_T3_ranks_with_an_unknown_pattern_are_left_to_the_reference(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "own.tiktoken")
    Path(f"{path}.json").write_text(json.dumps({"pattern": r"\s+|\S+"}))
    assert "its pattern is none of" in open_encoder(load_tokenizer(path), np.int32).note


def test_the_start_up_proof_finds_a_library_that_differs(
    made: dict[str, tuple[Path, Ids]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def encode(self, text: str) -> Any:
            ids = self._engine.encode(text)
            return ids[::-1] if "\U0001f600" in text else ids

    right = gigatoken_encoder._engine
    monkeypatch.setattr(gigatoken_encoder, "_engine", lambda plain: Wrong(right(plain)))
    tokenizer = load_tokenizer(made["gpt2"][0])
    encoder = open_encoder(tokenizer, np.uint16)
    assert isinstance(encoder, ReferenceEncoder)
    assert "fails the start-up proof: document" in encoder.note and "id number 0" in encoder.note
    with pytest.raises(UnavailableError, match="start-up proof"):
        open_encoder(tokenizer, np.uint16, "fast")


def test_T3_without_the_library_auto_says_so(
    made: dict[str, tuple[Path, Ids]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(made["gpt2"][0])
    monkeypatch.setattr(gigatoken_encoder, "version", lambda _: "9.9.9")
    assert "gigatoken 9.9.9 is installed" in open_encoder(tokenizer, np.uint16).note

    def missing(_: str) -> str:
        raise gigatoken_encoder.PackageNotFoundError

    monkeypatch.setattr(gigatoken_encoder, "version", missing)
    with pytest.raises(UnavailableError, match=r"not installed: pip install gigatoken==0\.10\.0"):
        open_encoder(tokenizer, np.uint16, "fast")


def test_check_sample_names_the_first_difference(made: dict[str, tuple[Path, Ids]]) -> None:
    tokenizer = load_tokenizer(made["gpt2"][0])

    class Shorter(ReferenceEncoder):
        def encode_documents(self, texts: Sequence[str]) -> Any:
            return super().encode_documents([text.removesuffix("zz") for text in texts])

    encoder = Shorter(tokenizer, np.int32)
    check_sample(encoder, tokenizer, ["abc", ""])
    with pytest.raises(EncoderMismatch, match="document 1 of the sample: id number 3 is 0, and .* 90") as caught:
        check_sample(encoder, tokenizer, ["abc", "q qzz"])
    assert (caught.value.document, caught.value.position) == (1, len(tokenizer.encode("q q")))
    assert (caught.value.encoded, caught.value.expected) == (tokenizer.eod_id, tokenizer.encode("z")[0])


def test_ids_that_do_not_fit_are_refused(made: dict[str, tuple[Path, Ids]]) -> None:
    with pytest.raises(ConfigError, match="do not fit uint8"):
        open_encoder(load_tokenizer(made["gpt2"][0]), np.uint8)
    with pytest.raises(ConfigError, match="do not fit float32"):
        open_encoder(load_tokenizer(made["gpt2"][0]), np.float32)


def test_special_ids_that_the_library_gives_go_to_the_reference(tmp_path: Path) -> None:
    """A vocabulary whose merges lead to a special token's very text."""
    path = write_byte_level(tmp_path / "tokenizer.json", None)
    described = json.loads(path.read_text())
    vocab = described["model"]["vocab"]
    vocab.update({"<|": 400, "<|>": 401})
    described["model"]["merges"] += [["<", "|"], ["<|", ">"]]
    described["added_tokens"].append(added("<|>", 401, special=True))
    described["pre_tokenizer"] = json.loads(write_byte_level(tmp_path / "l" / "t.json").read_text())["pre_tokenizer"]
    described["model"]["ignore_merges"] = True
    path.write_text(json.dumps(described))
    tokenizer = load_tokenizer(path)
    encoder = GigatokenEncoder(tokenizer, np.int32)
    ids, _ = encoder.encode_documents(["a <|> b", "<|>"])
    assert 401 in gigatoken.Tokenizer.from_json(tokenizer.plain_bpe().description).encode("<|>")
    assert 401 not in ids
    check_sample(encoder, tokenizer, ["a <|> b", "<|>", "<|><|>"])


def test_the_librarys_cache_does_not_grow_without_end(
    made: dict[str, tuple[Path, Ids]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    right = gigatoken_encoder._engine

    def counted(plain: Any) -> Any:
        opened.append(1)
        return right(plain)

    monkeypatch.setattr(gigatoken_encoder, "_engine", counted)
    monkeypatch.setattr(gigatoken_encoder, "_SHORTEST_RUN", 1_000_000)
    tokenizer = load_tokenizer(made["gpt2"][0])
    encoder = GigatokenEncoder(tokenizer, np.int32, cache_bytes=8 << 20)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz   ", np.uint8)
    generator = np.random.default_rng(0)
    for _ in range(6):
        text = letters[generator.integers(0, len(letters), 1_500_000)].tobytes().decode()
        encoder.encode_documents([text])
    assert len(opened) > 1
    check_sample(encoder, tokenizer, CORPUS)
    monkeypatch.setattr(gigatoken_encoder, "_process_bytes", lambda: None)
    unknown = GigatokenEncoder(tokenizer, np.int32)
    before = len(opened)
    for _ in range(11):
        unknown.encode_documents(["word " * 200_000])
    assert len(opened) == before + 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
def test_encoding_starts_no_thread(made: dict[str, tuple[Path, Ids]]) -> None:
    encoders = [open_encoder(load_tokenizer(made[name][0]), np.int32, "fast") for name in ("gpt2", "bpe", "nfkc")]
    before = len(list(Path("/proc/self/task").iterdir()))
    for encoder in encoders:
        encoder.encode_documents(["".join(CORPUS) * 200] * 4)
    assert len(list(Path("/proc/self/task").iterdir())) == before


def test_the_librarys_own_reading_of_a_model_would_differ(made: dict[str, tuple[Path, Ids]]) -> None:
    """Why models go to the library in our words: its own reader matches the names of special tokens in a text."""
    path, ids = made["bpe"]
    own = gigatoken.Tokenizer.from_sentencepiece(path)
    assert own.encode("a</s>b").tolist() != ids("a</s>b")
    assert open_encoder(load_tokenizer(path), np.int32, "fast").encode_documents(["a</s>b"])[0].tolist()[:-1] == ids(
        "a</s>b"
    )
