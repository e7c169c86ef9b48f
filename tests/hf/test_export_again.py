"""An exported model comes back: exported, imported, exported and evaluated again; and what no export may replace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf.made_checkpoint import make_checkpoint
from hf.streamed import run
from hf.tiny_families import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.checkpoint.aside import check_apart
from megatron.commands import export_hf, import_hf
from megatron.commands.evaluated_model import model_folder
from megatron.config.errors import ConfigError
from megatron.hf.import_folder import import_folder

SPOKEN = "before <s> </s> <unk> <pad> <|endoftext|> after</s>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again")
    make_checkpoint(folder)
    assert export_hf.main(["--input", str(folder / "run"), "--output", str(folder / "first")]) == 0
    return folder


def test_what_was_exported_is_imported_exported_and_evaluated_again(base: Path, tmp_path: Path) -> None:
    first, imported, second = base / "first", tmp_path / "imported", tmp_path / "second"
    done = run("import_hf", "--input", first, "--output", imported)
    assert done.returncode == 0, done.stderr
    done = run("export_hf", "--input", imported, "--output", second)
    assert done.returncode == 0 and "proven" in done.stdout, done.stderr
    with model_folder(imported, None) as evaluated:
        tokenizers = [AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (first, second, evaluated)]
    ids = [tokenizer(SPOKEN)["input_ids"] for tokenizer in tokenizers]
    assert ids[0] == ids[1] == ids[2]
    assert [tokenizer.eos_token_id for tokenizer in tokenizers] == [tokenizers[0].eos_token_id] * 3
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_parameters_are_counted_without_padding(base: Path, tmp_path: Path) -> None:
    for name, folder in (("ours", base / "first"), ("tied", make_tiny("llama tied, biases", tmp_path / "tied"))):
        wanted = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).num_parameters()
        assert import_folder(folder, tmp_path / f"{name}-checkpoint", without_tokenizer=True).parameters == wanted


@pytest.mark.parametrize("way", ["same", "inside", "around", "by a link"])
def test_what_is_read_and_what_is_written_lie_apart(way: str, base: Path, tmp_path: Path) -> None:
    source = tmp_path / "outer" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    output = {
        "same": source,
        "inside": source / "a" / "b",
        "around": tmp_path / "outer",
        "by a link": tmp_path / "link" / "a",
    }[way]
    with pytest.raises(ConfigError, match="--output .* choose a folder beside it"):
        check_apart(source, output)
    words = ["--input", str(source), "--output", str(output), "--overwrite"]
    for command in (export_hf, import_hf):
        with pytest.raises(ConfigError, match="--output .* choose a folder beside it"):
            command.main(words)
    check_apart(source, tmp_path / "outer" / "source-hf")
    check_apart(tmp_path / "absent", source)


def test_only_an_export_of_ours_is_replaced(base: Path, tmp_path: Path) -> None:
    words = ["--input", str(base / "run"), "--output", str(tmp_path / "out"), "--no-prove"]
    assert export_hf.main(words) == 0
    (tmp_path / "out" / "thesis.txt").write_text("ten years")
    (tmp_path / "out" / "notes").mkdir()
    with pytest.raises(ConfigError, match=r"--overwrite would remove it: notes, thesis\.txt"):
        export_hf.main([*words, "--overwrite"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "ten years"
    (tmp_path / "out" / "thesis.txt").unlink()
    (tmp_path / "out" / "notes").rmdir()
    assert export_hf.main([*words, "--overwrite", "--max-shard-size", "60KB"]) == 0
    assert export_hf.main([*words, "--overwrite"]) == 0
    theirs = make_tiny("llama", tmp_path / "theirs")
    words[3] = str(theirs)
    ledgers: tuple[object, ...] = (None, [], {"run": "x"})
    for ledger in ledgers:
        if ledger is not None:
            (theirs / "training_ledger.json").write_text(json.dumps(ledger))
        with pytest.raises(ConfigError, match="is not a folder that export_hf made"):
            export_hf.main([*words, "--overwrite"])
    assert (theirs / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        *(("--tolerance", value, "give a number such as 0.0001") for value in ("nan", "-1", "inf")),
        ("--workers", "0", "give 1 or more"),
        ("--max-shard-size", "0", 'write a size such as "5GB"'),
    ],
)
def test_numbers_that_mean_nothing_are_refused_at_once(
    option: str, value: str, remedy: str, base: Path, tmp_path: Path
) -> None:
    words = ["--input", str(tmp_path / "absent"), "--output", str(tmp_path / "out"), f"{option}={value}"]
    with pytest.raises(ConfigError, match=f"{option} .*{remedy}"):
        export_hf.main(words)


def test_a_tokenizer_of_fewer_ids_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", str(base / "run"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes", "--no-prove"]
    assert export_hf.main(words) == 0
    assert "--tokenizer bytes has 257 ids and the model 600 words" in capsys.readouterr().err
