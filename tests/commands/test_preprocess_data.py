"""The two data commands, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.commands import preprocess_data, train_tokenizer
from megatron.config.errors import ConfigError, DataError
from megatron.data.corpus import ReadOptions
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


@pytest.mark.parametrize("command", [preprocess_data, train_tokenizer])
def test_help_shows_an_example(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert "example:\n  stagemix " in capsys.readouterr().out


def test_a_sample_is_shared_out_among_the_inputs(tmp_path: Path) -> None:
    for name, text, count in (("a", "a" * 100, 50), ("b", "b" * 10, 30)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * count)
    texts = list(train_tokenizer.shared_out([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ReadOptions()))
    assert len(texts) == 80
    first = "".join(texts[:33])
    assert first.count("a") == 300 and first.count("b") == 300
