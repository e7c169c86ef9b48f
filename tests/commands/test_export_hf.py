"""`stagemix export_hf` from outside: what it prints, what it leaves, how it exits."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf.made_checkpoint import make_checkpoint
from safetensors.torch import load_file, save_file

from megatron.commands.export_hf import main
from megatron.commands.frame import run_command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder)
    return folder / "run"


def test_C3_exports_proves_and_fails_with_7_when_tampered(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--input", str(run), "--output", str(out)]
    assert run_command(main, command) == 0
    said = capsys.readouterr().out
    assert "largest fp32 logit difference" in said and "held-out code" in said and "held-out text" in said
    assert run_command(main, [*command, "--check"]) == 0
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert run_command(main, [*command, "--check"]) == 7
    assert "parity proof failed" in capsys.readouterr().err


def test_B1_exit_codes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run_command(main, ["--input", str(tmp_path / "gone"), "--output", str(out)]) == 4
    (out / "x").mkdir(parents=True)
    assert run_command(main, ["--input", str(run), "--output", str(out)]) == 2
    assert run_command(main, ["--input", str(run)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_command(main, ["--help"]) == 0
    assert "examples:" in capsys.readouterr().out


def test_B1_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    ref = make_checkpoint(tmp_path, tokenizer="bytes")
    file = next((ref.path / "model").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    out = tmp_path / "out"
    assert run_command(main, ["--input", str(ref.path), "--output", str(out)]) == 4
    assert not out.exists()
