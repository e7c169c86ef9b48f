"""Questions from held-out documents: fair, distinct, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf.made_checkpoint import library_code, library_prose

from megatron.config.errors import DataError
from megatron.evaluation.multiple_choice import CHOICES, make_questions
from megatron.evaluation.task_files import write_held_out_tasks


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    code = library_code()
    return {"code": code, "text": library_prose(code)}


@pytest.mark.parametrize("source", ["code", "text"])
def test_the_truth_follows_its_context_and_no_distractor_does(source: str, texts: dict[str, list[str]]) -> None:
    questions = make_questions(source, texts[source], 150)
    assert len(questions) == 150
    for question in questions:
        document = texts[source][question.document]
        for number, choice in enumerate(question.choices):
            assert (question.context + choice in document) == (number == question.answer)


def test_kind_and_length_do_not_give_the_answer_away(texts: dict[str, list[str]]) -> None:
    questions = make_questions("code", texts["code"], 150)
    for question in questions:
        assert 120 <= len(question.context) <= 300 and question.context == question.context.rstrip()
        assert len({choice[0] == "\n" for choice in question.choices}) == 1
        assert max(map(len, question.choices)) - min(map(len, question.choices)) <= 40
    longest = sum(max(range(CHOICES), key=lambda n, q=q: len(q.choices[n])) == q.answer for q in questions)  # type: ignore[misc]
    assert longest < 0.4 * len(questions)
    assert all(20 <= sum(q.answer == place for q in questions) <= 56 for place in range(CHOICES))


def test_nothing_is_asked_twice_and_the_seed_decides(texts: dict[str, list[str]]) -> None:
    questions = make_questions("text", texts["text"], 100, seed=4)
    contexts = [question.context for question in questions]
    choices = [choice.strip() for question in questions for choice in question.choices]
    assert len(set(contexts)) == len(contexts) and len(set(choices)) == len(choices)
    assert questions == make_questions("text", texts["text"], 100, seed=4)
    assert questions != make_questions("text", texts["text"], 100, seed=5)


def test_B1_too_few_documents_are_named() -> None:
    with pytest.raises(DataError, match=r"source web: 1 held-out documents.*validation\.fraction"):
        make_questions("web", ["word " * 500, "short"], 10)
    with pytest.raises(DataError, match="only 0 of 10 questions"):
        make_questions("web", ["0 1 2 3 " * 500] * 6, 10)


def test_sources_that_cannot_be_asked_about_are_left_out_and_named(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    given = {**texts, "chat": ["short"] * 9}
    left_out: dict[str, str] = {}
    tasks = write_held_out_tasks(tmp_path, given, 20, 4000, left_out=left_out)
    assert {task.source for task in tasks} == set(texts) and list(left_out) == ["chat"]
    assert "0 held-out documents of at least 440 characters, among 9" in left_out["chat"]
    assert not list(tmp_path.glob("*chat*"))
    with pytest.raises(DataError, match="source chat"):  # where it was named
        write_held_out_tasks(tmp_path, given, 20, 4000)
    with pytest.raises(DataError, match="nothing can be asked"):
        write_held_out_tasks(tmp_path, {"chat": ["short"] * 9}, 20, 4000, left_out=left_out)


def test_tasks_are_written_for_every_source(texts: dict[str, list[str]], tmp_path: Path) -> None:
    named = {"code": texts["code"], "web/pages!": texts["text"]}
    tasks = write_held_out_tasks(tmp_path, named, 20, 4000)
    assert [task.name for task in tasks] == [
        "heldout_code",
        "heldout_code_loss",
        "heldout_web_pages",
        "heldout_web_pages_loss",
    ]
    for task in tasks:
        rows = [json.loads(line) for line in (tmp_path / f"{task.name}.jsonl").read_text().splitlines()]
        assert len(rows) == task.items
        assert json.loads((tmp_path / f"{task.name}.yaml").read_text())["task"] == task.name
    passages = [json.loads(line)["text"] for line in (tmp_path / "heldout_code_loss.jsonl").read_text().splitlines()]
    assert sum(map(len, passages)) <= 4000 and all(any(t.startswith(p) for t in texts["code"]) for p in passages)
