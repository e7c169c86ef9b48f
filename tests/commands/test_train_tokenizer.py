"""train_tokenizer as a user types it. Oracles: the libraries that read its files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import zstandard
from transformers import AutoTokenizer

from megatron.commands import train_tokenizer
from megatron.commands.frame import run_command
from megatron.config.errors import ConfigError
from megatron.tokenizers.fim_tokens import fim_tokens
from megatron.tokenizers.load import load_tokenizer

CODE = "def add{0}(left, right):\n    return left + right + {0}\n\n\nclass Thing{0}:\n\tsize = 12345\n"
PROSE = "It was the {0}th bright cold day in April, and the clocks don't strike café number {0}.\n"
TEXT = "def add(left):\n\t\treturn '<fim_prefix> naïve 🙂 12345'  \r\n\n   \u2581 <|endoftext|>\x00 end"


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    folder = tmp_path / "corpora"
    (folder / "python").mkdir(parents=True)
    for number in range(60):
        (folder / "python" / f"f{number}.py").write_text(CODE.format(number) * 4)
    rows = [json.dumps({"text": PROSE.format(number) * 3}) + "\n" for number in range(240)]
    (folder / "web-0.jsonl.gz").write_bytes(gzip.compress("".join(rows[:120]).encode()))
    (folder / "web-1.jsonl.zst").write_bytes(zstandard.compress("".join(rows[120:]).encode()))
    (folder / "few.jsonl").write_text(json.dumps({"text": "only this"}) + "\n")
    return folder


def arguments(corpora: Path, output: Path, kind: str, *more: str) -> list[str]:
    sources = ["--source", f"python=3:{corpora / 'python'}", "--source", f"web=1:{corpora}/web-*"]
    return [*sources, "--output", str(output), "--kind", kind, "--vocab-size", "320", "--sample-bytes", "20K", *more]


KINDS = {
    "sentencepiece-bpe": "tokenizer.model",
    "sentencepiece-unigram": "tokenizer.model",
    "byte-level-bpe": "tokenizer.json",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", ["first", "random"])
def test_every_kind_from_weighted_sources(
    corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, sample: str
) -> None:
    one, two = tmp_path / "one" / KINDS[kind], tmp_path / "two" / KINDS[kind]
    more = ("--sample", sample, "--fim", "--special", "<repo_name>")
    assert train_tokenizer.main(arguments(corpora, one, kind, *more)) == 0
    said = capsys.readouterr().out
    assert "320 pieces" in said and "share of the sample" in said and "bytes a token" in said
    assert train_tokenizer.main(arguments(corpora, two, kind, *more)) == 0
    assert {p.name: p.read_bytes() for p in one.parent.iterdir()} == {
        p.name: p.read_bytes() for p in two.parent.iterdir()
    }

    tokenizer = load_tokenizer(one)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert set(tokenizer.special_ids) == {"<|endoftext|>", *train_tokenizer.STARCODER.required, "<repo_name>"}
    assert fim_tokens(tokenizer) is not None
    assert set(tokenizer.special_ids.values()).isdisjoint(tokenizer.encode(TEXT))
    report = json.loads(one.with_suffix(".training.json").read_text())
    assert (report["kind"], report["vocab_size"], report["sample"]) == (kind, tokenizer.vocab_size, sample)
    assert report["fingerprint"] == tokenizer.fingerprint
    assert [row["ran_dry"] for row in report["sources"].values()] == [False, False]
    assert report["sources"]["python"]["share"] == pytest.approx(0.75, abs=0.03)
    assert 1 < report["sources"]["python"]["bytes_per_token"] < 20
    if kind == "byte-level-bpe":
        library = tokenizers.Tokenizer.from_file(str(one))
        assert library.decode(library.encode(TEXT).ids, skip_special_tokens=False) == TEXT
        assert library.encode("12345").tokens == list("12345")
        theirs = AutoTokenizer.from_pretrained(str(one.parent))
        assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == tokenizer.eod_id
        assert theirs("x = 12\n    y")["input_ids"] == tokenizer.encode("x = 12\n    y")
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=str(one))
        assert model.encode("12345", out_type=str) == list("12345")
        assert model.encode("a <fim_prefix> b") == tokenizer.encode("a <fim_prefix> b")
        assert model.eos_id() == tokenizer.eod_id == 1


def test_the_compression_said_is_that_of_the_sample(corpora: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.model"
    argv = ["--input", str(corpora / "python"), "--output", str(output), "--vocab-size", "320"]
    assert train_tokenizer.main(argv) == 0
    row = json.loads((tmp_path / "t.training.json").read_text())["sources"][str(corpora / "python")]
    texts = [path.read_text() for path in (corpora / "python").iterdir()]
    assert row["bytes"] == sum(len(text.encode()) for text in texts) and row["documents"] == 60 and row["ran_dry"]
    model = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert row["bytes_per_token"] == round(row["bytes"] / sum(len(model.encode(text)) for text in texts), 4)


def test_a_source_that_runs_dry_is_named(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(corpora, tmp_path / "t.model", "sentencepiece-bpe", "--source", f"few=4:{corpora / 'few.jsonl'}")
    assert train_tokenizer.main(argv) == 0
    assert "ran dry: few: the other sources took the rest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--source", "a:b"], 2, "NAME=WEIGHT:PATH"),
        (["--source", "a=0:b"], 2, "a number above 0"),
        (["--source", "a=1:b,,c"], 2, "NAME=WEIGHT:PATH"),
        (["--source", "a=1:x", "--source", "a=2:y"], 2, "source 'a' is given twice"),
        (["--source", "a=1:x", "--input", "y"], 2, "the one or the other"),
        ([], 2, "the one or the other"),
        (["--source", "a=1:/nowhere/x"], 3, "/nowhere/x: no such file"),
        (["--input", "{few}", "--special", "word"], 2, "special name 'word'"),
        (["--input", "{few}", "--special", "<a>", "<a>"], 2, "has it already"),
        (["--input", "{few}", "--threads", "0"], 2, "--threads 0"),
        (["--input", "{few}", "--vocab-size", "10"], 2, "too small"),
        (
            ["--input", "{few}", "--kind", "byte-level-bpe", "--vocab-size", "5000"],
            3,
            "too few for a vocabulary of 5000",
        ),
        (["--input", "{few}", "--kind", "sentencepiece-bpe", "--output", "x.json"], 2, "is a .model file: name it so"),
    ],
)
def test_B1_what_is_wrong_is_named(
    corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, said: str
) -> None:
    more = [word.replace("{few}", str(corpora / "few.jsonl")) for word in more]
    suffix = "json" if "byte-level-bpe" in more else "model"
    assert run_command(train_tokenizer.main, ["--output", str(tmp_path / "o" / f"t.{suffix}"), *more]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_nothing_is_replaced_unasked(corpora: Path, tmp_path: Path) -> None:
    argv = arguments(corpora, tmp_path / "tokenizer.json", "byte-level-bpe")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: exists already.*--overwrite"):
        train_tokenizer.main(argv)
    assert train_tokenizer.main([*argv, "--overwrite"]) == 0
    with pytest.raises(ConfigError, match="tokenizer.json: exists already"):
        train_tokenizer.main(argv)
