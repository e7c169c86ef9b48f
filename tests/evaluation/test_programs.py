"""HumanEval and MBPP: prompts, where answers end, and figures from prompt to pass@k with known answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.config.errors import DataError
from megatron.evaluation.harness import Sampling
from megatron.evaluation.pass_at_k import pass_at_k
from megatron.evaluation.program_tasks import (
    ProgramSettings,
    ask_programs,
    bleu_metric,
    judge_programs,
    program_result,
    sample_rows,
)
from megatron.evaluation.programs import Problem, answer_of, problems_of
from megatron.evaluation.suite import read_suite

TASKS = {task.name: task for task in (*read_suite("code-vs-text").tasks, *read_suite("stage-study").tasks)}


@pytest.fixture(scope="module")
def rows(repository: Path) -> dict[str, list[dict[str, Any]]]:
    folder = repository / "examples" / "evaluation" / "data"
    return {
        name: [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]
        for name, file in (("humaneval", "HumanEval.jsonl"), ("mbpp", "mbpp.jsonl"))
    }


def test_a_humaneval_prompt_is_the_heads_own_text(rows: dict[str, Any]) -> None:
    problem = problems_of(TASKS["humaneval"], rows["humaneval"], "f")[0]
    assert problem.prompt == problem.program == rows["humaneval"][0]["prompt"]
    assert problem.tests.endswith("check(second_largest)\n")


def test_mbpp_shows_three_solved_problems_and_asks_the_fourth(rows: dict[str, Any]) -> None:
    problems = problems_of(TASKS["mbpp"], rows["mbpp"], "f")
    assert [problem.name for problem in problems] == ["11", "12", "13"]
    for number in (2, 3, 4):
        solved = next(row for row in rows["mbpp"] if row["task_id"] == number)
        assert solved["code"] in problems[0].prompt and solved["test_list"][0] in problems[0].prompt
    assert rows["mbpp"][3]["code"] not in problems[0].prompt
    assert problems[0].prompt.endswith('assert double_all([]) == []\n"""\n')
    bare = problems_of(TASKS["mbpp_bleu"], rows["mbpp"], "f")[0]
    assert bare.prompt.startswith('"""\nWrite a function to double') and bare.program == ""
    renamed = [{**row, "prompt": row["text"]} for row in rows["mbpp"]]
    for row in renamed:
        del row["text"]
    assert problems_of(TASKS["mbpp"], renamed, "f") == problems


def test_B1_shots_and_problems_that_are_missing_are_named(rows: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="problems 2, 3, 4 are missing"):
        problems_of(TASKS["mbpp"], rows["mbpp"][3:], "mbpp.jsonl")
    with pytest.raises(DataError, match="no problem from 11 to 510"):
        problems_of(TASKS["mbpp"], rows["mbpp"][:3], "mbpp.jsonl")
    with pytest.raises(DataError, match="task_id Example/0 is there more than once"):
        problems_of(TASKS["humaneval"], [rows["humaneval"][0]] * 2, "HumanEval.jsonl")


def test_an_answer_ends_where_something_new_begins() -> None:
    problem = Problem("p", "", ("\ndef ", "\n#"), "", "", "")
    assert answer_of(problem, "  return 1\n\n# next\ndef g(): pass") == "  return 1\n"
    assert answer_of(problem, "  return 1\n  # in it\n") == "  return 1\n  # in it\n"


def test_the_authors_solutions_pass_and_others_fail(rows: dict[str, Any]) -> None:
    problems = [
        *problems_of(TASKS["humaneval"], rows["humaneval"], "f"),
        *problems_of(TASKS["mbpp"], rows["mbpp"], "f"),
    ]
    good = judge_programs(problems, [[problem.reference] for problem in problems], ProgramSettings())
    assert [outcome.passed for row in good for outcome in row] == [True] * 5
    bad = judge_programs(problems, [["    return None\n"] for _ in problems], ProgramSettings(jobs=2))
    assert not any(outcome.passed for row in bad for outcome in row)


def test_figures_from_a_model_that_is_right_now_and_then(rows: dict[str, Any], tmp_path: Path) -> None:
    """pass@k by hand: of four samples two solve the first problem and none the second."""
    problems = problems_of(TASKS["humaneval"], rows["humaneval"], "f")
    right = problems[0].reference
    asked: list[tuple[Sequence[str], Sampling]] = []

    def generate(prompts: Sequence[str], sampling: Sampling) -> list[str]:
        asked.append((prompts, sampling))
        return [right + "\nprint('more')", "    return 0", right, "    retur", *["    return []"] * 4]

    settings = ProgramSettings(samples=4, at=(1, 2, 4), temperature=0.8, seed=5)
    answers = ask_programs(problems, generate, 99, settings)
    assert asked[0][0] == [problem.prompt for problem in problems for _ in range(4)]
    assert asked[0][1] == Sampling(99, 0.8, 0.95, problems[0].stops, 5)
    outcomes = judge_programs(problems, answers, settings)
    result = program_result(problems, answers, outcomes, settings)
    for k in (1, 2, 4):
        assert result["metrics"][f"pass@{k}"]["value"] == pytest.approx((pass_at_k(4, 2, k) + 0) / 2)
    assert result["records"]["passed"] == [[4, 2], [4, 0]]
    samples = sample_rows(problems, answers, outcomes)
    assert [row["passed"] for row in samples] == [True, False, True, False, *[False] * 4]
    assert samples[0]["result"] == "passed" and samples[3]["result"].startswith("NameError")
    unexecuted = program_result(problems, answers, None, settings)
    assert set(unexecuted["metrics"]) == {"bleu"}
    assert unexecuted["records"]["digest"] == result["records"]["digest"]


def test_bleu_has_a_standard_error_over_items() -> None:
    rows = [[5, 4, 3, 2, 6, 5, 4, 3, 6, 6], [1, 0, 0, 0, 6, 5, 4, 3, 6, 6]] * 20
    found = bleu_metric(rows, 1)
    assert found["value"] is not None and found["stderr"] is not None
    assert 0 < found["stderr"] < found["value"] < 1 and bleu_metric(rows[:1], 1)["stderr"] is None
