"""The program behind `make study-toy`, its puzzles and its other kinds of code. Nothing is trained here."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import importlib.util
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron.config.errors import DataError
from megatron.evaluation.suite import read_suite

STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"
PUZZLES = STUDIES / "paper-b" / "puzzles"


def loaded(path: Path) -> ModuleType:
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(f"toy_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy() -> Iterator[ModuleType]:
    before = list(sys.path)
    yield loaded(STUDIES / "run_toy.py")
    sys.path[:] = before
    sys.modules.pop("run", None)


@pytest.fixture(scope="module")
def variants() -> Iterator[ModuleType]:
    before = list(sys.path)
    yield loaded(STUDIES / "gather_variants.py")
    sys.path[:] = before


@pytest.mark.parametrize(
    ("listing", "precision"),
    [
        ("flags\t\t: fpu sse avx512f avx512_bf16 avx512_vnni\n", "bf16"),
        ("processor : 0\nflags : fpu amx_bf16 amx_tile\n", "bf16"),
        ("Features\t: fp asimd sve bf16 i8mm\n", "bf16"),
        ("flags\t\t: fpu sse avx2 avx512f\n", "fp32"),
        ("bugs : bf16\n", "fp32"),
    ],
)
def test_precision_is_what_the_processor_lists(toy: ModuleType, tmp_path: Path, listing: str, precision: str) -> None:
    (tmp_path / "cpuinfo").write_text(listing, encoding="utf-8")
    assert toy.precision_here(tmp_path / "cpuinfo") == precision
    assert toy.precision_here(tmp_path / "nothing") == "fp32"


def test_the_usual_study_is_the_file_in_examples(toy: ModuleType) -> None:
    for study in toy.STUDIES.values():
        assert toy.study_of(study, toy.SCALES["full"], "bf16") == (study.path, None)


def test_a_study_in_fp32_differs_in_that_alone(toy: ModuleType) -> None:
    for study in toy.STUDIES.values():
        path, content = toy.study_of(study, toy.SCALES["full"], "fp32")
        assert path == Path("study-toy") / f"{study.output}.toml"
        here, there = tomllib.loads(content), tomllib.loads(study.path.read_text(encoding="utf-8"))
        assert here["base"]["train"].pop("precision") == "fp32" and there["base"]["train"].pop("precision") == "bf16"
        (puzzles,) = [one for one in here["results"]["suites"] if one["name"] == "puzzles"]
        # the file lies elsewhere, and the puzzles where they were
        assert Path(puzzles["suite"]) == STUDIES / "paper-b" / "puzzles.toml" and Path(puzzles["data"]) == PUZZLES
        here.pop("results"), there.pop("results")
        assert here == there


def test_every_change_of_a_scale_finds_its_words(toy: ModuleType) -> None:
    scale = toy.SCALES["tiny"]
    text = "".join(study.path.read_text(encoding="utf-8") for study in toy.STUDIES.values())
    assert [old for old, _ in scale.changes if old not in text] == []
    _, content = toy.study_of(toy.STUDIES["stages"], scale, "fp32")
    study = tomllib.loads(content)
    assert study["study"]["output"] == "study-toy-tiny/study" and "study-toy/" not in content
    assert study["stages"]["init-text"]["lr"]["horizon"] == 2 * study["stages"]["init-text"]["tokens"]


def test_the_usual_arms_have_no_cooldown_of_text_alone(toy: ModuleType) -> None:
    study = toy.STUDIES["stages"]
    arms = tomllib.loads(study.path.read_text(encoding="utf-8"))["arms"]
    chosen = {name for name in arms for pattern in study.arms if fnmatch.fnmatchcase(name, pattern)}
    assert set(arms) - chosen == {name for name in arms if name.endswith("-cooldown-text")} | {"share"}
    assert "share-*" in study.arms  # its axis makes share-0 and others of it


def test_flags_become_words_of_the_study_commands(toy: ModuleType) -> None:
    parse = toy.command_line().parse_args
    assert toy.arms_of(parse(["--all-arms", "--seeds", "1,2"])) == []
    assert toy.arms_of(parse(["--arm", "text*"])) == ["--arm", "text*"]
    assert toy.arms_of(parse(["--study", "quality"])) == []
    assert toy.arms_of(parse([])).count("--arm") == len(toy.STUDIES["stages"].arms)
    with pytest.raises(SystemExit):
        parse(["--all-arms", "--arm", "text"])


def test_shares_have_a_report_of_their_own_where_they_are_run(toy: ModuleType) -> None:
    """They are half as long as the study's baseline, so that it is none for them."""

    def reports(name: str, *flags: str) -> list[list[str]]:
        args = toy.command_line().parse_args(list(flags))
        seeds = ["--seeds", "1,2"]
        step = toy.steps_of(toy.STUDIES[name], toy.SCALES["full"], Path("x.toml"), toy.arms_of(args), seeds)[-1]
        assert step.name == "report" and step.always
        return [command[command.index("report") :] for command in step.commands()]

    for flags in ((), ("--all-arms",)):
        whole, share = reports("stages", *flags)
        assert whole[-2:] == share[-2:] == ["--seeds", "1,2"]
        assert share[2:8] == ["--arm", "share-*", "--baseline", "share-0", "--output", "study-toy/study/report-share"]
    assert len(reports("stages", "--arm", "text*")) == len(reports("quality", "--study", "quality")) == 1


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """Not even --fresh deletes a folder that the toy did not make."""
    (tmp_path / "study-toy").mkdir()
    (tmp_path / "study-toy" / "thesis.tex").write_text("ten years", encoding="utf-8")
    command = [sys.executable, str(STUDIES / "run_toy.py"), "--fresh"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "study-toy exists and was not made by" in done.stderr
    assert (tmp_path / "study-toy" / "thesis.tex").read_text(encoding="utf-8") == "ten years"


# -- puzzles -----------------------------------------------------------------------------------------------------------


def items(task: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (PUZZLES / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def unknown_names(source: str) -> set[str]:
    """Names that a function reads and nobody gives it."""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    given = {argument.arg for argument in function.args.args}
    given |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return {name.id for name in names if isinstance(name.ctx, ast.Load)} - given


def test_the_puzzles_are_what_their_program_makes() -> None:
    program = loaded(STUDIES / "paper-b" / "puzzles.py")
    suite = read_suite(str(STUDIES / "paper-b" / "puzzles.toml"))
    assert {task.name for task in suite.tasks} == set(program.KINDS) == {path.stem for path in PUZZLES.iterdir()}
    for kind in program.KINDS:
        assert (PUZZLES / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines() == program.lines_of(kind)


@pytest.mark.parametrize("task", ["recall_code", "recall_text", "brackets"])
def test_each_puzzle_has_one_answer_that_python_or_a_reader_finds(task: str) -> None:
    """Oracles: brackets that Python's parser closes, names that one head alone binds, a name in one sentence."""
    right = {
        "brackets": lambda choice, rest: compiles(f"{choice}\n{rest}"),
        "recall_code": lambda choice, rest: not unknown_names(f"{choice}\n{rest}"),
        "recall_text": lambda choice, rest: set(names_of(choice)) <= set(names_of(rest)),
    }[task]
    found = items(task)
    assert len(found) == len({json.dumps(item) for item in found}) == 200
    for item in found:
        fits = [number for number, choice in enumerate(item["choices"]) if right(choice, item["rest"])]
        assert fits == [item["answer"]] and len(set(item["choices"])) == 4
    # no place is the better guess: 50 each, with a standard deviation of 6.1
    assert all(30 <= count <= 70 for count in Counter(item["answer"] for item in found).values())


def names_of(sentence: str) -> list[str]:
    """Words with a capital that do not begin the sentence."""
    words = sentence.strip(".").split()
    return [word.strip(".,") for word in words[1:] if word[0].isupper()]


# -- other kinds of code -----------------------------------------------------------------------------------------------


def test_documents_are_taken_once_and_no_folder_fills_a_corpus(variants: ModuleType, tmp_path: Path) -> None:
    def documents() -> Iterator[tuple[str, str, str]]:
        for number in range(100):
            yield "large", f"large/{number}", f"// {number}\n" + "int x;\n" * 140
            yield "large", f"large/{number}-again", f"//   {number}\n" + "int  x;\n" * 140
            yield "small", f"small/{number}", f"// small {number}\n" + "int y;\n" * 140

    count, size = variants.write(tmp_path / "headers.jsonl", documents(), 40_000)
    rows = [json.loads(line) for line in (tmp_path / "headers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert count == len(rows) and size == sum(len(row["text"]) for row in rows)
    assert 40_000 <= size < 41_500
    assert not [row for row in rows if row["id"].endswith("-again")]
    by_folder = Counter(row["id"].split("/")[0] for row in rows)
    assert abs(by_folder["large"] - by_folder["small"]) <= 2
    with pytest.raises(DataError, match="no headers was found"):
        variants.write(tmp_path / "headers.jsonl", iter(()), 1000)
    assert len(rows) == len((tmp_path / "headers.jsonl").read_text(encoding="utf-8").splitlines())


def test_what_the_corpora_have_is_not_taken_again(variants: ModuleType, tmp_path: Path) -> None:
    found = [name for (_, name, _), _ in zip(variants.documented(set()), range(5), strict=False)]
    others = [name for (_, name, _), _ in zip(variants.documented(set(found)), range(5), strict=False)]
    assert len(found) == len(others) == 5 and not set(found) & set(others)
    with pytest.raises(DataError, match=r"code\.jsonl: cannot be read: .*gather\.py first"):
        variants.ids_of([tmp_path / "code.jsonl"])


@pytest.mark.parametrize("top", ["/* Licence\n * of it */\n\n", "// Licence\n// of it\n\n", "\n/* a // b */ ", ""])
def test_headers_lose_the_comment_at_their_top(variants: ModuleType, top: str) -> None:
    code = "#pragma once\n/* what it does */\nint x; // one\n"
    assert variants.without_top_comment(top + code) == code
    (folder, name, text), *_ = variants.headers()
    assert name.startswith(folder) and "\x00" not in text
