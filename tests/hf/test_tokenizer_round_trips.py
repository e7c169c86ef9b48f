"""Tokenizers of other makers through ours and out again: ids with special tokens and without, templates, bos, eos."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hf.made_checkpoint import library_code
from hf.tiny_families import make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron.config.errors import CheckpointError, ConfigError, DataError, ProofError
from megatron.hf.checkpoint_source import open_source
from megatron.hf.export import export_checkpoint
from megatron.hf.import_folder import import_folder
from megatron.hf.special_token_ids import read_token_ids, token_ids
from megatron.hf.tiktoken_bpe import byte_letters, convert_tiktoken, in_oniguruma
from megatron.hf.tokenizer_check import (
    check_as_imported,
    check_equal,
    held_out_documents,
    random_texts,
    sample_texts,
)
from megatron.hf.tokenizer_files import write_tokenizer
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer
from megatron.tokenizers.tiktoken_patterns import KNOWN

LLAMA3 = KNOWN["llama3"].pattern
CHAT = "{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}"


def byte_level(pattern: str | None, specials: list[str], nfc: bool = False, prefix: bool = False) -> Any:
    """A trained byte-level BPE; pattern None: GPT-2's own."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pattern is not None))
    split = [] if pattern is None else [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    made.normalizer = normalizers.NFC() if nfc else None
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(library_code(3), trainer)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return made


def llama3(folder: Path) -> None:
    made = byte_level(LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(f"{begin[0]} $A", None, [begin])]
    )
    write(folder, made, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=CHAT)


def qwen(folder: Path) -> None:
    made = byte_level(KNOWN["qwen2"].pattern, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)
    write(
        folder,
        made,
        tokenizer_class="Qwen2Tokenizer",
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        add_prefix_space=False,
        errors="replace",
    )
    (folder / "chat_template.jinja").write_text(CHAT)


def gpt2(folder: Path) -> None:
    made = byte_level(None, ["<|endoftext|>"])
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write(folder, made, tokenizer_class="GPT2Tokenizer", add_prefix_space=False, model_max_length=1024, **named)


STYLES = {"llama 3": llama3, "qwen": qwen, "gpt-2": gpt2}


def write(folder: Path, made: Any, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def auto(folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def texts(size: int = 60_000) -> list[str]:
    return list(sample_texts(size))


@pytest.mark.parametrize("style", STYLES)
def test_an_untouched_import_keeps_its_habits(style: str, tmp_path: Path) -> None:
    STYLES[style](tmp_path / "in")
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(tmp_path / "in")
    write_tokenizer(tmp_path / "out", tokenizer, 512, as_imported=True)
    original, exported = auto(tmp_path / "in"), auto(tmp_path / "out")
    assert check_as_imported(exported, tokenizer, texts()) > 60_000
    for text in ("", "a <|endoftext|><|im_end|> b<|begin_of_text|>", "def f(x):\n    return x\n", " e\u0301"):
        for added in (True, False):
            wanted = original(text, add_special_tokens=added)["input_ids"]
            assert exported(text, add_special_tokens=added)["input_ids"] == wanted, text
        assert exported.decode(wanted) == original.decode(wanted)
    assert (exported.bos_token, exported.eos_token) == (original.bos_token, original.eos_token)
    assert exported.chat_template == original.chat_template
    if original.chat_template:
        said = [{"role": "user", "content": "hi"}]
        assert exported.apply_chat_template(said) == original.apply_chat_template(said)


@pytest.mark.parametrize("style", STYLES)
def test_after_training_text_is_only_text_and_names_are_kept(style: str, tmp_path: Path) -> None:
    """Training put nothing before a text and read no special token out of one; nor does the export."""
    STYLES[style](tmp_path / "in")
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(tmp_path / "in")
    write_tokenizer(tmp_path / "out", tokenizer, 512)
    original, exported = auto(tmp_path / "in"), auto(tmp_path / "out")
    assert check_equal(exported, tokenizer, texts()) > 60_000
    assert exported.eos_token == original.eos_token and exported.chat_template == original.chat_template
    assert exported.bos_token == original.bos_token
    named = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert named["eos_token"] == original.eos_token


def test_a_template_that_is_lost_is_found(tmp_path: Path) -> None:
    llama3(tmp_path / "in")
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(tmp_path / "in")
    write_tokenizer(tmp_path / "out", tokenizer, 512)
    with pytest.raises(ProofError, match="differs from the imported tokenizer"):
        check_as_imported(auto(tmp_path / "out"), tokenizer, ["x"])


def test_import_and_export_keep_bos_and_eos(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model", vocab_size=520)
    llama3(folder)
    tokenizer = load_tokenizer(folder)
    bos, end, turn = (tokenizer.special_ids[f"<|{n}|>"] for n in ("begin_of_text", "end_of_text", "eot_id"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": bos, "eos_token_id": [end, turn]}))
    said = {"bos_token_id": bos, "eos_token_id": [end, turn], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(said | {"transformers_version": "4.40.0"}))
    import_folder(folder, tmp_path / "checkpoint")
    exported = export_checkpoint(open_source(tmp_path / "checkpoint"), tmp_path / "out")
    assert exported.proof is not None and exported.tokenizer_bytes_compared > 1_000_000
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, [end, turn])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said
    fast = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert fast("a")["input_ids"][0] == bos and fast.eos_token == "<|eot_id|>" and fast.chat_template == CHAT


def test_C3_a_class_that_ignores_the_file_is_named(tmp_path: Path) -> None:
    """transformers 5 makes a Qwen2Tokenizer of every qwen2 model's tokenizer: right for Qwen's own, for no other."""
    for style, equal in ((qwen, True), (gpt2, False)):
        style(tmp_path / style.__name__)
        out = tmp_path / f"{style.__name__}-out"
        out.mkdir()
        tokenizer = load_tokenizer(tmp_path / style.__name__)
        write_tokenizer(out, tokenizer, 512)
        (out / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
        fast = AutoTokenizer.from_pretrained(out, local_files_only=True)
        if equal:
            assert check_equal(fast, tokenizer, texts(20_000)) > 20_000
        else:
            with pytest.raises(ProofError, match=r"makes a Qwen2Tokenizer .* of every Qwen2 model"):
                check_equal(fast, tokenizer, texts(20_000))


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model", vocab_size=99)
    llama3(folder)
    with pytest.raises(DataError, match=r"ids up to 502, and the embedding has 99 rows"):
        import_folder(folder, tmp_path / "checkpoint")


def test_a_trained_model_ends_at_its_own_end_of_document_too(tmp_path: Path) -> None:
    qwen(tmp_path / "in")
    tokenizer = load_tokenizer(tmp_path / "in")
    ids = token_ids(tokenizer, None)
    turn, end = tokenizer.special_ids["<|im_end|>"], tokenizer.special_ids["<|endoftext|>"]
    assert tokenizer.eod_id == end
    assert ids.config == {"bos_token_id": None, "eos_token_id": turn}
    assert ids.generation["eos_token_id"] == [turn, end] and ids.generation["pad_token_id"] == end
    plain = token_ids(load_tokenizer("bytes"), None)
    assert plain.config == {"bos_token_id": 256, "eos_token_id": 256}
    assert plain.generation == {"_from_model_config": True, **plain.config, "pad_token_id": 256}


@pytest.mark.parametrize("content", ["[1]", "{", '{"eos_token_id": "2"}', '{"bos_token_id": [1, true]}'])
def test_B1_ids_that_are_none_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_token_ids(tmp_path)


@pytest.fixture(scope="module")
def rank_lines() -> list[str]:
    made = byte_level(None, [])
    back = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = sorted(made.get_vocab().items(), key=lambda item: item[1])
    return [f"{base64.b64encode(bytes(back[c] for c in text)).decode()} {rank}" for text, rank in tokens]


@pytest.fixture(scope="module")
def tiktoken_pairs(rank_lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Tokenizer]]:
    folder = tmp_path_factory.mktemp("ranks")
    pairs = {}
    for name in KNOWN:
        (folder / f"{name}.tiktoken").write_text("\n".join(rank_lines) + "\n")
        tokenizer = load_tokenizer(folder / f"{name}.tiktoken")
        (folder / name).mkdir()
        write_tokenizer(folder / name, tokenizer, 512)
        pairs[name] = auto(folder / name), tokenizer
    return pairs


@pytest.mark.parametrize("name", KNOWN)
def test_tiktoken_files_are_equal(name: str, tiktoken_pairs: dict[str, tuple[Any, Tokenizer]]) -> None:
    fast, tokenizer = tiktoken_pairs[name]
    assert check_equal(fast, tokenizer, texts(100_000)) > 100_000
    assert len(fast) == tokenizer.vocab_size and fast.eos_token_id == tokenizer.eod_id
    assert all(fast.convert_tokens_to_ids(token) == id for token, id in tokenizer.special_ids.items())


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "llama3"])
@settings(deadline=None, max_examples=150)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\r\t'sST09ab.")), max_size=80))
def test_tiktoken_is_equal_on_any_text(name: str, tiktoken_pairs: dict[str, tuple[Any, Tokenizer]], text: str) -> None:
    fast, tokenizer = tiktoken_pairs[name]
    assert fast(text)["input_ids"] == tokenizer.encode(text)


def test_patterns_are_written_as_the_other_library_reads_them() -> None:
    assert in_oniguruma(r"\p{N}{1,3}+|\s++$") == r"(?>\p{N}{1,3})|\s++\z"
    assert in_oniguruma(r"[$x]{2}+a\$") == r"(?>[$x]{2})a\$"
    assert in_oniguruma(r"a{1,3}b+") == r"a{1,3}b+"
    with pytest.raises(ConfigError, match="repetition of a group"):
        in_oniguruma("(?:ab){1,2}+")


def test_B1_ranks_with_gaps_are_refused(rank_lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "gpt2.tiktoken"
    path.write_text("\n".join([*rank_lines[:-1], rank_lines[-1].split()[0] + " 700"]) + "\n")
    with pytest.raises(ConfigError, match="without gaps"):
        convert_tiktoken(load_tokenizer(path))  # type: ignore[arg-type]


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    lines = [line for text in library_code(8) for line in text.splitlines() if line]
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=content,
        minloglevel=2,
        **{"vocab_size": 700, "model_type": "unigram", "normalization_rule_name": "identity"} | options,
    )
    path = folder / "t.model"
    path.write_bytes(content.getvalue())
    return path


UNIGRAMS = {
    "as text is": {"byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "dummy prefix": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "spaces dropped": {"byte_fallback": True},
    "no bytes": {},
    "no bytes, as text is": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "matched symbols": {
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<|im_end|>", "return"],
        "required_chars": "|",
    },
}


@pytest.mark.parametrize("options", UNIGRAMS.values(), ids=UNIGRAMS)
def test_unigram_models_are_equal(options: dict[str, Any], tmp_path: Path) -> None:
    """On lines: in long texts the float32 sums of SentencePiece fall either way where two cuts score the same."""
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path, **options))
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer, 512)
    lines = [line for text in library_code(2) for line in text.splitlines()[:400]]
    fast = auto(tmp_path / "out")
    ids = [(tokenizer.encode(text), fast(text)["input_ids"]) for text in [*random_texts(), *lines]]
    assert len(ids) > 500 and all(ours == theirs for ours, theirs in ids)
    names = "before <s> </s> <unk> <0x0A> after <s>"
    assert fast(names)["input_ids"] == tokenizer.encode(names)


@pytest.mark.parametrize("options", [{"byte_fallback": True}, {"byte_fallback": True, "model_type": "bpe"}])
def test_bpe_and_unigram_models_that_drop_spaces(options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path, **options))
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer, 512)
    fast = auto(tmp_path / "out")
    for text in ("", " ", "  a  b\n  c   ", "a\n", "\n a", " \n "):
        assert fast(text)["input_ids"] == tokenizer.encode(text), text


def test_B1_a_unigram_that_would_choose_otherwise_is_refused(tmp_path: Path) -> None:
    """A byte's name is text that `tokenizers` would find, where its characters are no pieces that score better."""
    lines = ["abab abba ab ba " * 5] * 50
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=content,
        minloglevel=2,
        vocab_size=270,
        hard_vocab_limit=False,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
    )
    (tmp_path / "t.model").write_bytes(content.getvalue())
    with pytest.raises(ConfigError, match="is no piece itself"):
        write_tokenizer(tmp_path, load_tokenizer(tmp_path / "t.model"), 512)


def test_held_out_tokens_are_given_back_as_documents() -> None:
    tokenizer = load_tokenizer("bytes")
    tokens = {"code": [*b"abc", 256, 256, *b"de", 256], "text": [*b"f"], "none": []}
    assert list(held_out_documents(tokens, tokenizer)) == ["abc", "de", "f"]


def test_C3_another_text_of_the_same_ids_is_found(tmp_path: Path) -> None:
    gpt2(tmp_path / "in")
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(tmp_path / "in")
    write_tokenizer(tmp_path / "out", tokenizer, 512)
    described = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    described["decoder"] = {"type": "Fuse"}
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ProofError, match="another text of the same ids"):
        check_equal(auto(tmp_path / "out"), tokenizer, ["a b"])
    shutil.rmtree(tmp_path / "out")


def test_random_texts_are_the_same_again_and_of_all_kinds() -> None:
    found = list(random_texts(50))
    assert found == list(random_texts(50)) and found != list(random_texts(50, seed=1))
    joined = "".join(random_texts())
    assert len(set(joined)) > 3000 and not any("\ud800" <= c <= "\udfff" for c in joined)
