"""`stagemix generate` as a user types it, on a real tiny checkpoint and on its exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf.made_checkpoint import make_checkpoint

from megatron.commands.frame import run_command
from megatron.commands.generate import main

WORDS = ("--dtype", "float32", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    make_checkpoint(folder)
    return folder / "run"


def rows(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    assert run_command(main, ["--model", str(run), "--jsonl", *WORDS, *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_a_checkpoint_and_an_exported_folder_say_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last by transformers too, whose own cache and greedy choice are the oracle."""
    transformers = pytest.importorskip("transformers")
    from megatron.commands.export_hf import main as export

    assert run_command(export, ["--input", str(run), "--output", str(tmp_path / "model"), "--no-prove"]) == 0
    capsys.readouterr()
    prompts = ("--prompt", "def f(x):", "--prompt", "The committee", "--greedy")
    newest = rows(run, capsys, *prompts)
    assert newest == rows(run / "checkpoints" / "step-000000008", capsys, *prompts)
    assert newest == rows(tmp_path / "model", capsys, *prompts)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for row in newest:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        whole = model.generate(ids, do_sample=False, max_new_tokens=6)[0].tolist()
        tokens = row["tokens"]
        assert isinstance(tokens, list) and whole[ids.shape[1] :][: len(tokens)] == tokens


def test_answers_depend_on_the_seed_and_not_on_the_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt", "import os", "--prompt", "A", "--samples", "3")
    together = rows(run, capsys, *words)
    assert [(row["prompt"], row["sample"]) for row in together] == [
        (p, n) for p in ("import os", "A") for n in range(3)
    ]
    for one, other in zip(together, rows(run, capsys, *words, "--batch-size", "2"), strict=True):
        assert one == other | {"log_probability": pytest.approx(other["log_probability"], rel=1e-5)}
    texts = [row["text"] for row in together]
    assert texts != [row["text"] for row in rows(run, capsys, *words, "--seed", "1")]


def test_a_stop_text_cuts_the_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = rows(run, capsys, "--prompt", "import os", "--greedy")
    text = str(whole["text"])
    middle = next(at for at in range(1, len(text)) if text[at].isascii() and text[at] not in text[:at])
    (row,) = rows(run, capsys, "--prompt", "import os", "--greedy", "--stop", text[middle])
    assert row["text"] == text[:middle] and row["end"] == "stop"


def test_prompts_come_from_files_and_standard_output_is_readable(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    words = ["--model", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--greedy", *WORDS]
    assert run_command(main, words) == 0
    shown = capsys.readouterr()
    assert "── prompt 1: 6 tokens, cut\none" in shown.out and "── prompt 2:" in shown.out
    assert "the likeliest token each time" in shown.err and "tokens/s" in shown.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "no prompt: say --prompt"),
        (("--prompt", ""), 2, "prompt 1 is empty"),
        (("--prompt", "x", "--max-new-tokens", "0"), 2, "--max-new-tokens 0: it must be at least 1"),
        (("--prompt", "x", "--top-p", "2"), 2, "top-p 2.0: it must be above 0"),
        (("--prompt", "x", "--tensor", "2"), 2, "--tensor 2 x --pipeline 1 are 2 ranks, and 1 were started"),
        (("--prompt", "x", "--begin-with", "<bos>"), 2, "not a special token of tokenizer.model"),
        (("--prompt", "x " * 200), 2, "tokens, and the model has 160 positions"),
        (("--prompt", "x", "--stop", ""), 2, "ends every answer"),
        (("--prompt", "caf\udce9"), 2, "prompt 1 is not UTF-8 on the command line"),
        (("--prompts", "BAD.jsonl"), 3, 'BAD.jsonl, line 2: {"prompt": TEXT} is needed'),
        (("--prompts", "EMPTY.txt"), 3, "EMPTY.txt: holds no prompt"),
        (("--prompts", "NONE.txt"), 3, "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("BAD.jsonl").write_text('{"prompt": "a"}\n["b"]\n', encoding="utf-8")
    Path("EMPTY.txt").write_text("\n \n", encoding="utf-8")
    assert run_command(main, ["--model", str(run), *words]) == code
    assert message in capsys.readouterr().err


def test_where_positions_end_before_the_answer_it_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(run), "--dtype", "float32", "--greedy", "--prompt", "x", "--max-new-tokens", "1000"]
    assert run_command(main, words) == 0
    assert "the model has 160 positions: behind the longest prompt there is room for 159" in capsys.readouterr().err


def test_no_model_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--model", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert run_command(main, ["--model", str(tmp_path), "--prompt", "x"]) == 4
