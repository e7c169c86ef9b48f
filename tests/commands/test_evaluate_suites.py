"""`stagemix evaluate --suite`, `compare` and `win_rate` from outside, on the example data, offline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from evaluation.made_model import make_model
from hf.made_checkpoint import make_checkpoint

from megatron.commands import evaluated_model
from megatron.commands.compare import main as compare
from megatron.commands.evaluate import main as evaluate
from megatron.commands.evaluated_model import model_folder
from megatron.commands.frame import run_command
from megatron.commands.win_rate import main as win_rate

FAST = ["--dtype", "float32", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [f"one={make_model(folder / 'one', 1)}", f"other={make_model(folder / 'other', 2)}"]


@pytest.fixture(scope="module")
def examples(repository: Path) -> Path:
    return repository / "examples" / "evaluation"


def both(models: list[str]) -> list[str]:
    return ["--model", models[0], "--model", models[1]]


def test_a_suite_of_two_models_then_their_comparison(
    models: list[str], examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "e.json"
    options = ["--suite", "stage-study", "--data", str(examples / "data"), "--output", str(file), *FAST]
    assert run_command(evaluate, [*both(models), *options, "--compare", "one", "other"]) == 0
    said = capsys.readouterr().out
    assert "other minus one, paired by item" in said and "science_qa: items left out, as the suite says: 1." in said
    record = json.loads(file.read_text())
    assert record["format"] == 2 and record["missing"] == []
    assert [list(model["results"]) for model in record["models"]] == [list(record["tasks"])] * 2
    assert run_command(compare, [str(file), "--baseline", "other", "--output", str(tmp_path / "c.json")]) == 0
    table = json.loads((tmp_path / "c.json").read_text())["comparisons"][0]
    assert (table["baseline"], table["model"]) == ("other", "one") and len(table["rows"]) == 6
    assert set(table["rows"][0]["found"]) == {"value", "low", "high", "p"}
    capsys.readouterr()
    for words, message in (
        (["--baseline", "oter"], "did you mean"),
        (["--baseline", "one", "--model", "one"], "compared with itself"),
        (["--resamples", "5"], "at least 100"),
    ):
        assert run_command(compare, [str(file), *words]) == 2
        assert message in capsys.readouterr().err


def test_code_is_run_only_when_allowed_and_missing_tasks_are_said(
    models: list[str], examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("HumanEval.jsonl", "copa.jsonl"):
        (data / name).write_bytes((examples / "data" / name).read_bytes())
    common = ["--model", models[0], "--suite", "code-vs-text", "--data", str(data), *FAST]
    assert run_command(evaluate, [*common, "--output", str(tmp_path / "e.json")]) == 2
    assert "--allow-code-execution" in capsys.readouterr().err
    allowed = [*common, "--allow-code-execution", "--output", str(tmp_path / "e.json")]
    assert run_command(evaluate, allowed) == 3
    assert "no data for 13 tasks" in capsys.readouterr().err
    sampled = ["--samples", "2", "--pass-at", "1,2", "--temperature", "0.8", "--jobs", "2"]
    assert run_command(evaluate, [*allowed, "--skip-missing", *sampled]) == 0
    said = capsys.readouterr().out
    assert "NOT RUN, for want of data: boolq, piqa" in said and "mean of 1 of 11" in said
    record = json.loads((tmp_path / "e.json").read_text())
    assert len(record["missing"]) == 13 and "seccomp" in record["programs"]["walls"]
    assert set(record["models"][0]["results"]["humaneval"]["metrics"]) == {"pass@1", "pass@2", "bleu"}
    samples = (tmp_path / "e-samples" / "one" / "humaneval.jsonl").read_text().splitlines()
    assert len(samples) == 4


def test_a_suites_tasks_are_listed(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(evaluate, ["--tasks-of", "code-vs-text", "--data", str(examples)]) == 0
    said = capsys.readouterr().out
    assert "winogrande" in said and "chosen: ours" in said and "HumanEval.jsonl (not there)" in said


def test_B1_wrong_options_of_suites_exit_with_2(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = ["--suite", "code-vs-text"]
    for options, words in (
        (["--suite", "code-vs-txt"], "did you mean code-vs-text"),
        ([*suite, "--tasks", "bolq"], "boolq"),
        ([*suite, "--include-path", str(tmp_path)], "--include-path is for"),
        (["--tasks", "a", "--data", str(tmp_path)], "--data holds"),
        ([*suite, "--data", str(tmp_path / "gone")], "no such folder"),
        ([*suite, "--samples", "3"], "--temperature"),
        ([*suite, "--pass-at", "2"], "--samples"),
        ([*suite, "--pass-at", "x"], "whole numbers"),
        ([*suite, "--jobs", "0"], "at least 1"),
        ([*suite, "--compare", "one", "two"], "--compare two"),
        (["--tasks", " , "], "names no task"),
    ):
        assert run_command(evaluate, ["--model", models[0], *options, "--output", str(tmp_path / "e.json")]) == 2
        assert words in capsys.readouterr().err, options
    assert run_command(evaluate, ["--output", "x", *suite]) == 2 and run_command(evaluate, ["--model", models[0]]) == 2


def test_a_checkpoints_export_is_kept_and_found_again_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path)
    cache = tmp_path / "cache"
    exports: list[Path] = []
    real = evaluated_model.export_checkpoint

    def counted(source: object, output: Path) -> object:
        exports.append(output)
        return real(source, output, proven=False)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluated_model, "export_checkpoint", counted)
    with model_folder(tmp_path / "run", cache) as folder:
        first = (folder, sorted(path.name for path in folder.iterdir()))
    with model_folder(tmp_path / "run" / "checkpoints" / "step-000000008", cache) as folder:
        assert (folder, sorted(path.name for path in folder.iterdir())) == first
    assert len(exports) == 1 and first[0].parent == cache and "reused" in capsys.readouterr().out
    manifest = tmp_path / "run" / "checkpoints" / "step-000000008" / "manifest.json"
    with model_folder(tmp_path / "run", None) as folder:
        assert folder.is_dir()
    assert not folder.exists() and manifest.is_file()


def test_a_task_of_ones_own_from_the_examples(
    models: list[str], examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(examples.parent.parent)
    file = tmp_path / "o.json"
    options = ["--tasks", "opposites", "--include-path", str(examples / "tasks"), "--output", str(file)]
    assert run_command(evaluate, ["--model", models[0], *options, "--dtype", "float32"]) == 0
    assert json.loads(file.read_text())["models"][0]["results"]["opposites"]["items"] == 4


def test_win_rate_of_two_models_under_a_third(
    models: list[str], examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.json"
    prompts = ["--prompts", str(examples / "prompts.jsonl"), "--max-new-tokens", "8", "--dtype", "float32"]
    judge = ["--judge-model", models[0].partition("=")[2], "--output", str(file)]
    assert run_command(win_rate, [*both(models), *prompts, *judge]) == 0
    record = json.loads(file.read_text())
    assert record["models"] == ["one", "other"] and record["pairs"] == 4 and 0 <= record["rate"] <= 1
    assert record["first"] == 0.5 and record["by_place"] == 0  # likelihood has no favourite place
    assert "one against other: win rate" in capsys.readouterr().out
    answers = []
    for name, side in (("one", "a"), ("other", "b")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": i["prompt"], "answer": i[side]}) + "\n" for i in record["items"]))
        answers += ["--answers", f"{name}={path}"]
    again = tmp_path / "again.json"
    judge[-1] = str(again)
    assert run_command(win_rate, [*answers, *judge, "--dtype", "float32"]) == 0
    assert json.loads(again.read_text()) == record
    (tmp_path / "other.jsonl").write_text('{"prompt": "p", "answer": "x"}\n')
    assert run_command(win_rate, [*answers, *judge]) == 3
    assert "not the 4 of the others" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text('{"prompt": "p"}\n')
    assert run_command(win_rate, [*answers, *judge]) == 3
    assert "other.jsonl, line 1: no field answer" in capsys.readouterr().err
    for options in (answers[:2], [*answers, "--judge", "x"], [*both(models)], [*both(models)[:2], *both(models)[:2]]):
        assert run_command(win_rate, [*options, *judge]) == 2


def test_a_model_that_is_too_short_loses_no_other_models_results(
    models: list[str], examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = f"short={make_model(tmp_path / 'short', 3, positions=64)}"
    file = tmp_path / "e.json"
    options = ["--suite", "stage-study", "--tasks", "logic,mbpp_bleu", "--data", str(examples / "data"), *FAST]
    assert run_command(evaluate, ["--model", models[0], "--model", short, *options, "--output", str(file)]) == 3
    said = capsys.readouterr()
    assert "task mbpp_bleu: a prompt of" in said.err and "--tasks logic" in said.err
    assert f"short failed; written to {file}: one only" in said.out
    assert [model["name"] for model in json.loads(file.read_text())["models"]] == ["one"]
    assert run_command(compare, [str(file), "--baseline", "zz"]) == 2
    assert "'zz' is in none of the files: they have one" in capsys.readouterr().err
    assert run_command(compare, [str(file)]) == 2
    assert "NAME=FILE.json" in capsys.readouterr().err
    again = tmp_path / "again.json"
    again.write_text(file.read_text().replace('"float32"', '"bfloat16"'))
    assert run_command(compare, [f"first={file}", f"second={again}"]) == 0
    said = capsys.readouterr()
    assert "second minus first" in said.out and "warning: few items" in said.out
    assert "unlike dtypes, first in float32, second in bfloat16" in said.out


def test_no_dtype_is_chosen_where_no_model_is_asked(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answer": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "answer": "longer"}\n')
    answers = ["--answers", f"a={tmp_path / 'a.jsonl'}", "--answers", f"b={tmp_path / 'b.jsonl'}"]
    judge = ["--judge", f"{sys.executable} {examples / 'longest_wins.py'}", "--output", str(tmp_path / "w.json")]
    assert run_command(win_rate, [*answers, *judge]) == 0
    said = capsys.readouterr().out
    assert "computing in" not in said and "warning: 1 pair(s) are few" in said
    assert "interval [0.000, 0.975], p = 1.0000" in said
