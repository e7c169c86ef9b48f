"""The commands as a user gives them: what they print, write, refuse and end with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign.laid_by_hand import GPT2, LLAMA, lay_megatron, shape_of, weights_of
from foreign.neox_by_hand import neox_config, neox_layers, save_neox

from megatron.checkpoint.manager import open_checkpoint
from megatron.commands import export_megatron, import_megatron
from megatron.commands.frame import run_command
from megatron.config.errors import EXIT_CHECKPOINT, EXIT_DATA, EXIT_DONE, EXIT_IO, EXIT_USAGE
from megatron.config.load import load_config
from megatron.config.model_shape import ModelShape, resolve_model


def run_import(*words: object) -> int:
    return run_command(import_megatron.main, list(map(str, words)))


def test_import_writes_a_checkpoint_to_train_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of(LLAMA, 257)
    weights = weights_of(shape)
    lay_megatron(tmp_path / "m", weights, shape, 2, 2)
    output = tmp_path / "o"
    words = ("--input", tmp_path / "m", "--output", output, "--tokenizer", "bytes", "--allow-pickle")
    assert run_import(*words) == EXIT_DONE
    said = capsys.readouterr().out
    for part in (
        "2 tensor x 2 pipeline ranks",
        "left behind: optimizer, hidden_dropout = 0.1",
        "257 words (31 rows of",
    ):
        assert part in said
    opened = open_checkpoint(output)
    assert ModelShape.from_json(opened.state["model"]) == shape
    found = opened.model().all()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert opened.state["imported"]["kind"] == "megatron_lm" and opened.state["imported"]["step"] == 7
    config = load_config(output / "config.toml")
    assert resolve_model(config.model, 257, 48) == shape
    assert config.stages[0].take.weights == str(output)
    # and back again, at other sizes
    back = ("--input", output, "--output", tmp_path / "x", "--tensor", 4, "--make-vocab-size-divisible-by", 8)
    assert run_command(export_megatron.main, list(map(str, back))) == EXIT_DONE
    assert "--norm-epsilon 1e-06" in capsys.readouterr().out
    again = tmp_path / "again"
    assert (
        run_import("--input", tmp_path / "x", "--output", again, "--tokenizer", "bytes", "--allow-pickle") == EXIT_DONE
    )
    found = open_checkpoint(again).model().all()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_import_of_gpt_neox(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of(LLAMA)
    weights = weights_of(shape)
    save_neox(tmp_path / "n", neox_layers(weights, shape, 2), neox_config(shape))
    words = ("--input", tmp_path / "n", "--output", tmp_path / "o", "--no-tokenizer", "--vocab-size", 90)
    assert run_import(*words, "--allow-pickle", "--dtype", "float16") == EXIT_DONE
    assert "GPT-NeoX, step 7" in capsys.readouterr().out
    found = open_checkpoint(tmp_path / "o").model().all()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in weights.items())
    assert json.loads((tmp_path / "o" / "state.json").read_text())["imported"]["kind"] == "gpt_neox"


def test_refusals_have_their_codes_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of(GPT2)
    folder = lay_megatron(tmp_path / "m", weights_of(shape), shape, 2, 1)
    output = tmp_path / "o"
    plain = ("--input", folder, "--output", output)
    allowed = (*plain, "--no-tokenizer", "--allow-pickle")
    for words, code, said in (
        ((*plain, "--no-tokenizer"), EXIT_USAGE, "--allow-pickle"),
        ((*plain, "--allow-pickle"), EXIT_USAGE, "--tokenizer"),
        (
            (*plain, "--tokenizer", "bytes", "--allow-pickle"),
            EXIT_DATA,
            "gives ids up to 256, and the embedding has 96",
        ),
        ((*allowed, "--vocab-size", 200), EXIT_USAGE, "--vocab-size 200: the embedding has 96 rows"),
        ((*allowed, "--iteration", 9), EXIT_CHECKPOINT, "no iteration 9"),
        ((*allowed, "--config", "x.yml"), EXIT_USAGE, "--config is for GPT-NeoX"),
        ((*allowed, "--set", "squared_relu=True"), EXIT_USAGE, "args.squared_relu = True"),
        ((*allowed, "--set", "hidden_size=64"), EXIT_CHECKPOINT, "word_embeddings.weight: is [48, 32]"),
    ):
        assert run_import(*words) == code, words
        assert said in capsys.readouterr().err
        assert not output.exists()
    file = folder / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert run_import(*allowed) == EXIT_CHECKPOINT
    assert "expected CRC-32" in capsys.readouterr().err
    file.write_bytes(raw[: len(raw) // 2])
    assert run_import(*allowed) == EXIT_CHECKPOINT
    assert "mp_rank_01" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def run_export(*words: object) -> int:
    return run_command(export_megatron.main, list(map(str, words)))


def test_real_words_are_not_cut_off_as_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,003 words padded to 1,024: 257 ids of another tokenizer would leave 767 rows, and padding is at most 127."""
    shape = shape_of(LLAMA, 1003)
    folder = lay_megatron(tmp_path / "m", weights_of(shape), shape, 1, 1, divisible_by=128)
    words = ("--input", folder, "--allow-pickle", "--output")
    assert run_import(*words, tmp_path / "o", "--tokenizer", "bytes") == EXIT_DATA
    said = capsys.readouterr().err
    for part in ("257 ids", "1,024 rows", "767 would be left out", "at most 127", "--vocab-size"):
        assert part in said
    assert not (tmp_path / "o").exists()
    # said by name it is taken, and what speaks against it is told
    assert run_import(*words, tmp_path / "said", "--tokenizer", "bytes", "--vocab-size", 300) == EXIT_DONE
    assert "724 rows are left out" in capsys.readouterr().out
    for number, count in ((1, 1003), (2, 950), (3, 1024)):  # padding of one row over and over, real words, none
        assert run_import(*words, tmp_path / str(number), "--no-tokenizer", "--vocab-size", count) == EXIT_DONE
        assert ("rows left out differ from each other" in capsys.readouterr().out) == (count == 950)


def test_real_words_of_gpt_neox_are_not_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of(LLAMA, 1003)
    layers = neox_layers(weights_of(shape), shape, 2)
    rows = sum(len(rank["word_embeddings.weight"]) for rank in layers[0])
    config = neox_config(shape) | {"make_vocab_size_divisible_by": 8}
    save_neox(tmp_path / "n", layers, config)
    words = ("--input", tmp_path / "n", "--output", tmp_path / "o", "--tokenizer", "bytes", "--allow-pickle")
    assert run_import(*words) == EXIT_DATA
    assert f"{rows - 257} would be left out" in (said := capsys.readouterr().err) and "at most 15" in said
    assert run_import(*words, "--set", "make-vocab-size-divisible-by=1024") == EXIT_DONE
    assert "--set make_vocab_size_divisible_by: 1024 instead of 8" in capsys.readouterr().out


def test_an_argument_that_nothing_reads_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of(LLAMA)
    lay_megatron(tmp_path / "m", weights_of(shape), shape, 1, 1)
    save_neox(tmp_path / "n", neox_layers(weights_of(shape), shape, 1), neox_config(shape))
    for folder, said, near in (
        ("m", "foo=3", "no argument of this name is read"),
        ("m", "rotary_bsae=5", "did you mean rotary_base?"),
        ("n", "rotary_emb_bas=5", "did you mean rotary_emb_base?"),
    ):
        words = ("--input", tmp_path / folder, "--output", tmp_path / "o", "--no-tokenizer", "--allow-pickle")
        assert run_import(*words, "--set", said) == EXIT_USAGE
        assert near in capsys.readouterr().err


def test_no_command_writes_into_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = shape_of(LLAMA)
    lay_megatron(tmp_path / "m", weights_of(shape), shape, 1, 1)
    words = ("--no-tokenizer", "--allow-pickle", "--vocab-size", 90)
    assert run_import("--input", tmp_path / "m", "--output", tmp_path / "o", *words) == EXIT_DONE
    for run, folder, more in ((run_import, "m", words), (run_export, "o", ())):
        before = sorted(tmp_path.rglob("*"))
        for output in (tmp_path / folder / "inside", tmp_path / folder, tmp_path):
            assert run("--input", tmp_path / folder, "--output", output, "--overwrite", *more) == EXIT_USAGE
            assert "--output" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    open_checkpoint(tmp_path / "o")


def test_export_looks_at_sizes_and_room_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(LLAMA)
    lay_megatron(tmp_path / "m", weights_of(shape), shape, 1, 1)
    words = ("--no-tokenizer", "--allow-pickle", "--vocab-size", 90)
    assert run_import("--input", tmp_path / "m", "--output", tmp_path / "o", *words) == EXIT_DONE
    plain = ("--input", tmp_path / "o", "--output", tmp_path / "x")
    for more, said in (
        (("--make-vocab-size-divisible-by", 100_000_000), "pads 90 words to 100,000,000, more padding than words"),
        (("--pipeline", 0), "--pipeline 0 is not at least 1"),
        (("--tensor", -1), "--tensor -1 is not at least 1"),
    ):
        assert run_export(*plain, *more) == EXIT_USAGE
        assert said in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000_000))
    assert run_export(*plain) == EXIT_IO
    assert "0.02 GB are free" in capsys.readouterr().err
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "o"]
    assert run_export(*plain) == EXIT_DONE
    assert "90 words padded to 128" in capsys.readouterr().out
