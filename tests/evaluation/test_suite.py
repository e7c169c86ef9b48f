"""Suites as declared, and their data: every complaint names file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.evaluation.suite import Suite, SuiteTask, read_suite, suite_names
from megatron.evaluation.suite_data import check_fetched, fields_of, find_file, missing_words, read_data
from megatron.evaluation.suite_tasks import filled, inverted

CODE_VS_TEXT, STAGE_STUDY = read_suite("code-vs-text"), read_suite("stage-study")


def task_named(name: str) -> SuiteTask:
    return next(task for task in (*CODE_VS_TEXT.tasks, *STAGE_STUDY.tasks) if task.name == name)


def test_the_suites_are_those_of_the_papers() -> None:
    assert suite_names() == ["code-vs-text", "stage-study"]
    groups = {
        group: [t for t in CODE_VS_TEXT.tasks if t.group == group] for group in ("reasoning", "knowledge", "code")
    }
    assert [len(tasks) for tasks in groups.values()] == [11, 2, 2]
    assert all(task.shots == 0 for task in (*groups["reasoning"], *groups["knowledge"]))
    assert {task.metric for task in groups["knowledge"]} == {"exact_match"}
    assert {task.metric for task in groups["code"]} == {"pass@1"}
    assert len(STAGE_STUDY.tasks) == 6 and len({task.group for task in STAGE_STUDY.tasks}) == 5
    assert [task.name for task in STAGE_STUDY.tasks if task.kind == "choice-in-prompt"] == [
        "logic", "jec_qa", "science_qa", "e_kar", "cosqa",
    ]  # fmt: skip
    assert not any(task.runs_programs for task in STAGE_STUDY.tasks)
    for task in (*CODE_VS_TEXT.tasks, *STAGE_STUDY.tasks):
        assert task.licence and task.source and fields_of(task)


def test_the_examples_hold_data_for_every_task(repository: Path) -> None:
    for task in (*CODE_VS_TEXT.tasks, *STAGE_STUDY.tasks):
        path = find_file(task, repository / "examples" / "evaluation" / "data")
        assert path is not None and read_data(task, path).rows


def test_tasks_are_chosen_by_name_or_group_and_typing_errors_named() -> None:
    chosen = CODE_VS_TEXT.select(["knowledge", "boolq"])
    assert [task.name for task in chosen.tasks] == ["boolq", "triviaqa", "nq_open"]
    assert CODE_VS_TEXT.select([]).tasks == CODE_VS_TEXT.tasks
    with pytest.raises(ConfigError, match="'bolq'.*did you mean.*boolq"):
        CODE_VS_TEXT.select(["bolq"])
    with pytest.raises(ConfigError, match="'stage-stdy'.*did you mean stage-study"):
        read_suite("stage-stdy")


def test_the_choice_stands_in_the_prompt_and_the_scored_text_is_fixed() -> None:
    row = {
        "question": "Which {choice}?",
        "choices": ["a {x}", "b"],
        "answer": 1,
        "lecture": "L {question}",
        "solution": "S",
    }
    made = inverted(task_named("science_qa"), row)
    assert [row["choices"][n] in text for n, text in enumerate(made["contexts"])] == [True, True]
    assert len(set(made["contexts"])) == 2 and made["answer"] == 1
    assert made["scored"] == "\nWhich {choice}?" and "L {question}" in made["contexts"][0]
    code = inverted(task_named("cosqa"), {"doc": "sum of a list", "code": "sum(x)", "label": 1})
    assert "right" in code["contexts"][code["answer"]] and code["scored"] == "\nsum(x)"
    with pytest.raises(KeyError):
        filled("{none}", row)


WRONG_ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a field is missing": ("boolq", {"question": "q", "label": 1}, "field passage is missing"),
    "a text is a number": ("boolq", {"passage": 3, "question": "q", "label": 1}, "field passage is 3, and a text"),
    "a text is empty": ("boolq", {"passage": " ", "question": "q", "label": 1}, "field passage is empty"),
    "a label is none of its values": ("boolq", {"passage": "p", "question": "q", "label": 2}, "may be 0 or 1"),
    "a label is a truth value": ("boolq", {"passage": "p", "question": "q", "label": True}, "field label is true"),
    "a label is a text": ("cb", {"premise": "p", "hypothesis": "h", "label": "1"}, 'field label is "1"'),
    "a gap is missing": (
        "winogrande",
        {"sentence": "s", "option1": "a", "option2": "b", "answer": "1"},
        "exactly one _",
    ),
    "an index is too large": (
        "logic",
        {"question": "q", "choices": ["a"], "answer": 1},
        "answer is 1, and there are 1",
    ),
    "an index is negative": ("logic", {"question": "q", "choices": ["a"], "answer": -1}, "answer is -1"),
    "an index is a text": ("logic", {"question": "q", "choices": ["a"], "answer": "0"}, "a whole number"),
    "choices are a text": ("logic", {"question": "q", "choices": "ab", "answer": 0}, "a list of texts"),
    "a choice is empty": ("logic", {"question": "q", "choices": ["a", ""], "answer": 0}, "none of them empty"),
    "no choices": ("logic", {"question": "q", "choices": [], "answer": 0}, "a list of texts"),
    "labels and texts differ": (
        "arc_easy",
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"},
        "2 texts and 1",
    ),
    "a key is no label": (
        "arc_easy",
        {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
        'answerKey "B"',
    ),
    "aliases are missing": ("triviaqa", {"question": "q", "answer": "a"}, r"field answer\.aliases is null"),
    "a problem has no number": ("mbpp", {"text": "t", "code": "c", "test_list": ["assert 1"]}, "field task_id is null"),
    "a problem has no words": (
        "mbpp",
        {"task_id": 11, "code": "c", "test_list": ["assert 1"]},
        "field text is missing",
    ),
}


@pytest.mark.parametrize("name, row, words", WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
def test_B1_wrong_fields_are_named_with_file_and_line(
    name: str, row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    task = task_named(name)
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"data\.jsonl, line 3: .*{words}"):
        read_data(task, path)
    with pytest.raises(DataError, match=rf"hub, row 1: .*{words}"):
        check_fetched(task, [row], "hub")


def test_B1_broken_files_are_named(tmp_path: Path) -> None:
    task = task_named("logic")
    good = json.dumps({"question": "q", "choices": ["a"], "answer": 0}).encode() + b"\n"
    for content, words in (
        (b"", "no items"),
        (b"\n  \n", "no items"),
        (good + b"{", "line 2: not JSON"),
        (good + b"[1]", "line 2: list, and an object"),
        (good + b'{"question": "\xff"}', "line 2: not UTF-8"),
        (good.decode().encode("utf-16"), "line 1: not UTF-8"),
    ):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_data(task, tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(DataError, match="not a gzip file"):
        read_data(task, tmp_path / "x.jsonl.gz")


def test_compressed_files_are_read_and_items_left_out_are_counted(tmp_path: Path) -> None:
    task = task_named("science_qa")
    row = {"question": "q", "choices": ["a", "b"], "answer": 0, "lecture": "l", "solution": "s"}
    lines = [json.dumps({**row, **change}) for change in ({}, {"lecture": ""}, {"solution": ""}, {})]
    (tmp_path / "science_qa.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    path = find_file(task, tmp_path)
    assert path is not None
    data = read_data(task, path)
    assert (len(data.rows), data.left_out) == (2, 2)
    (tmp_path / "science_qa.jsonl").write_text(lines[1])
    with pytest.raises(DataError, match="none of its 1 items has lecture and solution"):
        read_data(task, tmp_path / "science_qa.jsonl")


def test_missing_data_are_said_task_by_task() -> None:
    words = missing_words("stage-study", STAGE_STUDY.tasks, Path("bench"))
    for task in STAGE_STUDY.tasks:
        assert f"{task.name}: put bench/{task.data_file} there" in words and task.source in words
    assert "--online" in words and "--skip-missing" in words


def test_B1_a_wrong_suite_file_is_named_with_its_key(tmp_path: Path) -> None:
    good = read_suite_text("stage-study")
    for old, new, words in (
        ('kind = "choice-in-prompt"', 'kind = "choice"', r"tasks\.0\.kind"),
        ('metric = "acc_perplexity"', 'metrik = "acc"', r"tasks\.0\.metric"),
        ('answer = "index of choices"', 'answer = "number"', "one of text"),
        ('name = "logic"', 'name = "cosqa"', "cosqa are there more than once"),
        ('metric = "bleu"', 'metric = "rouge"', "pass@1 or bleu"),
        ('file = "mbpp.jsonl"', 'file = "../mbpp.jsonl"', "without folders"),
        ("[[tasks]]", "[[tasks", "not a TOML file"),
    ):
        (tmp_path / "own.toml").write_text(good.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"own\.toml: .*{words}"):
            read_suite(str(tmp_path / "own.toml"))
    (tmp_path / "own.toml").write_text(good, encoding="utf-8")
    assert read_suite(str(tmp_path / "own.toml")) == STAGE_STUDY
    (tmp_path / "own.toml").write_text('name = "x"\ntitle = "y"\ntasks = []', encoding="utf-8")
    with pytest.raises(ConfigError, match="no tasks"):
        read_suite(str(tmp_path / "own.toml"))


def read_suite_text(name: str) -> str:
    import megatron.evaluation.suite as module

    return (Path(module.__file__).with_name("suites") / f"{name}.toml").read_text(encoding="utf-8")


def test_a_suite_is_plain_data() -> None:
    assert isinstance(STAGE_STUDY, Suite) and hash(STAGE_STUDY.tasks[0].name)
