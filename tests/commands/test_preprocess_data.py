"""The data commands, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.commands import merge_data, preprocess_data, train_tokenizer
from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.tokenizers.load import load_tokenizer

TEXT = "def add(left, right):\n    return left + right\n\n# The sum of two numbers, as a child would write it.\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * (i + 1)}) + "\n" for i in range(20)))
    return path


def test_tokenizer_then_data(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prefix = tmp_path / "out" / "tokenizer.model", tmp_path / "out" / "code"
    assert train_tokenizer.main(["--input", str(corpus), "--output", str(model), "--vocab-size", "380"]) == 0
    arguments = ["--input", str(corpus), "--output-prefix", str(prefix), "--tokenizer", str(model), "--workers", "2"]
    assert preprocess_data.main(arguments) == 0
    said = capsys.readouterr().out
    assert "380 pieces" in said and "20 documents" in said and "MB/s" in said
    data, tokenizer = IndexedDataset(prefix), load_tokenizer(model)
    assert tokenizer.decode(data.tokens(3)) == TEXT * 4
    assert data.manifest is not None and data.manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    with pytest.raises(ConfigError, match="--overwrite"):
        preprocess_data.main(arguments)
    assert preprocess_data.main([*arguments, "--overwrite"]) == 0
    with pytest.raises(ConfigError, match="--overwrite"):
        train_tokenizer.main(["--input", str(corpus), "--output", str(model)])


def test_B1_bad_numbers_and_inputs_are_named(tmp_path: Path, corpus: Path) -> None:
    output = str(tmp_path / "t.model")
    with pytest.raises(ConfigError, match="--vocab-size"):
        train_tokenizer.main(["--input", str(corpus), "--output", output, "--vocab-size", "many"])
    with pytest.raises(DataError, match="nowhere"):
        train_tokenizer.main(["--input", str(tmp_path / "nowhere"), "--output", output])
    with pytest.raises(DataError, match="nowhere"):
        preprocess_data.main(["--input", str(tmp_path / "nowhere"), "--output-prefix", output, "--tokenizer", "bytes"])


@pytest.mark.parametrize("command", [preprocess_data, merge_data, train_tokenizer])
def test_help_shows_an_example(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert "example:\n  stagemix " in capsys.readouterr().out


def test_shards_and_merge(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["--input", str(corpus), "--tokenizer", "bytes", "--workers", "1", "--exact-duplicates"]
    assert preprocess_data.main([*words, "--output-prefix", str(one)]) == 0
    assert preprocess_data.main([*words, "--output-prefix", str(two), "--shard", "2/2"]) == 0
    with pytest.raises(DataError, match=r"1 of 2 shards are not complete: 1\. Run preprocess_data --shard 1/2"):
        merge_data.main(["--output-prefix", str(two)])
    assert preprocess_data.main([*words, "--output-prefix", str(two), "--shard", "1/2"]) == 0
    assert "stagemix merge_data --output-prefix" in capsys.readouterr().out
    assert merge_data.main(["--output-prefix", str(two)]) == 0
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{two}{suffix}").read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        merge_data.main(["--output-prefix", str(two)])


def test_reading_options_and_quarantine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, prefix = tmp_path / "c.jsonl", tmp_path / "p"
    rows = [{"body": "a", "lang": "Go"}, {"body": "b", "lang": "Python"}, {"text": "c"}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", str(corpus), "--output-prefix", str(prefix), "--tokenizer", "bytes", "--workers", "1"]
    words += ["--text-field", "body", "--language-field", "lang", "--language", "Go"]
    with pytest.raises(DataError, match=r"c.jsonl: line 3: .*'body' is missing"):
        preprocess_data.main(words)
    assert preprocess_data.main([*words, "--on-error", "quarantine"]) == 0
    assert IndexedDataset(prefix).tokens(0).tolist() == [97, 256]
    said = capsys.readouterr().out
    assert "skipped: language not asked for: 1" in said and "p.quarantine.jsonl: field 'body' is missing: 1" in said
    row = json.loads((tmp_path / "p.quarantine.jsonl").read_text())
    assert row["line"] == 3 and json.loads(row["text"]) == {"text": "c"}


def test_B1_no_input_and_bad_shards_are_usage_errors(tmp_path: Path) -> None:
    words = ["--output-prefix", str(tmp_path / "p"), "--tokenizer", "bytes"]
    with pytest.raises(SystemExit) as stopped:
        preprocess_data.main(words)
    assert stopped.value.code == 2
    with pytest.raises(ConfigError, match="shard 3/2"):
        preprocess_data.main([*words, "--input", str(tmp_path), "--shard", "3/2"])
