"""HumanEval and MBPP: what the model is asked, where its answer ends, and the program and tests that judge it.

HumanEval (Chen et al. 2021, "Evaluating Large Language Models Trained on Code"): the prompt is a function's head with
its docstring; the answer goes on from there, and ends where something new begins at the left margin.

MBPP (Austin et al. 2021, "Program Synthesis with Large Language Models"): the description and the tests stand in a
docstring, and the answer is all code that follows; solved problems, told in the same way, may stand before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import DataError
from megatron.evaluation.suite import SuiteTask

_HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nassert ", "\n```")
_MBPP_STOPS = ('\n"""', "\nclass Test", "\nif __name__", "\nprint(", "\nassert ", "\n#", "\n```")


@dataclass(frozen=True)
class Problem:
    """`program` is what an answer is put behind to make a module; `tests` are run in that module.

    reference: the author's solution, for BLEU; empty where there is none.
    """

    name: str
    prompt: str
    stops: tuple[str, ...]
    program: str
    tests: str
    reference: str


def problems_of(task: SuiteTask, rows: Sequence[Mapping[str, Any]], origin: str) -> list[Problem]:
    """The problems that are asked, in the file's order. Raises DataError where shots or problems are missing."""
    if task.format == "humaneval":
        found = [_humaneval(row) for row in rows]
    else:
        by_number = {int(row["task_id"]): row for row in rows}
        if gone := [str(number) for number in task.shots_from[: task.shots] if number not in by_number]:
            raise DataError(
                f"{origin}: the problems {', '.join(gone)} are missing, and task {task.name} shows them, solved, "
                "before each question: give the whole mbpp.jsonl"
            )
        if task.shots > len(task.shots_from):
            raise DataError(f"task {task.name}: {task.shots} shots, and shots_from names {len(task.shots_from)}")
        shots = "".join(_solved(by_number[number]) for number in task.shots_from[: task.shots])
        first, last = task.problems or (min(by_number, default=0), max(by_number, default=0))
        found = [_mbpp(row, shots) for number, row in by_number.items() if first <= number <= last]
        if not found:
            raise DataError(f"{origin}: it has no problem from {first} to {last}, which task {task.name} asks")
    names = [problem.name for problem in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{origin}: task_id {', '.join(repeated)} is there more than once")
    return found


def answer_of(problem: Problem, completion: str) -> str:
    """The completion up to the first of the problem's stops."""
    ends = [place for stop in problem.stops if (place := completion.find(stop)) >= 0]
    return completion[: min(ends)] if ends else completion


def _humaneval(row: Mapping[str, Any]) -> Problem:
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    reference = str(row.get("canonical_solution") or "")
    return Problem(str(row["task_id"]), row["prompt"], _HUMANEVAL_STOPS, row["prompt"], tests, reference)


def _mbpp(row: Mapping[str, Any], shots: str) -> Problem:
    setup = str(row.get("test_setup_code") or "")
    imports = "\n".join(row.get("test_imports") or [])
    tests = "\n".join([imports, *row["test_list"]]) + "\n"
    program = f"{setup}\n" if setup else ""
    return Problem(str(row["task_id"]), shots + _question(row), _MBPP_STOPS, program, tests, row["code"])


def _question(row: Mapping[str, Any]) -> str:
    description = str(row["text"] if "text" in row else row["prompt"]).strip()
    return '"""\n' + "\n".join([description, *row["test_list"]]) + '\n"""\n'


def _solved(row: Mapping[str, Any]) -> str:
    return f"{_question(row)}{row['code'].strip()}\n\n\n"
