"""Instructions for paper A's toy, from Python that is written here."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron.config.errors import DataError

SOURCE = '''
class Cache:
    """Keeps answers for as long as they may be used again.

    An answer is forgotten when it is older than the limit. The limit is given in seconds, and zero keeps nothing.
    """

    def get(self, key, default=None):
        """Return the answer that is kept under the key, or the default where there is none."""
        answer = self._kept.get(key)
        if answer is None or answer.is_old():
            return default
        return answer.value


@functools.lru_cache
async def load(path, *, limit: int = 3):
    """Read a file and return its lines, without those that are empty or hold a comment."""
    lines = await read_lines(path, limit)
    return [line for line in lines if line.strip() and not line.startswith("#")]


def short(value):
    """Too few words."""
    return value + 1 if value else value - 1 if value is None else compute_something_else(value)


def undocumented(value):
    return value
'''


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "studies"))
    yield importlib.import_module("gather_instructions")
    sys.path[:] = before


def records(program: ModuleType) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(of code, of text) that the source above gives."""
    code, text = [], []
    for definition, docstring in program._documented(SOURCE):
        record = program._code_record(definition, docstring)
        code += [record] if record is not None else []
        text += program._text_records(definition, docstring)
    return code, text


def test_code_answers_are_the_functions_without_their_docstrings(program: ModuleType) -> None:
    """Oracle: Python's parser. Calls and names of the answer are those of the source."""
    code, _ = records(program)
    there = {node.name: node for node in ast.walk(ast.parse(SOURCE)) if hasattr(node, "decorator_list")}
    assert {record["input"].split("(")[0] for record in code} == {"def get", "def load"}
    for record in code:
        (answer,) = ast.parse(record["output"]).body
        original = there[answer.name]
        assert ast.get_docstring(answer) is None and not answer.decorator_list
        assert [ast.dump(one) for one in answer.body] == [ast.dump(one) for one in original.body[1:]]
        signature, wanted = record["input"].split("\n")
        assert wanted == ast.get_docstring(original)
        names = [one.arg for one in [*original.args.args, *original.args.kwonlyargs]]
        assert signature == f"def {answer.name}({', '.join(names)})"


def test_text_answers_are_what_the_docstring_says(program: ModuleType) -> None:
    _, text = records(program)
    asked = {(record["instruction"], record["input"]): record["output"] for record in text}
    assert asked["Explain what this class does.", "class Cache"].startswith("Keeps answers for as long as")
    ahead = "An answer is forgotten when it is older than the limit."
    assert asked["Continue the paragraph.", ahead] == "The limit is given in seconds, and zero keeps nothing."
    assert not [place for place in asked if "short" in place[1] or "undocumented" in place[1]]


def test_each_question_and_each_answer_stands_once(program: ModuleType, tmp_path: Path) -> None:
    """And no package fills more than its share, however much it has."""
    made = program.Instructions("code_instructions", 40)
    for number in range(100):
        name = "".join(chr(97 + int(digit)) for digit in f"{number:02}")
        record = {"instruction": "Write.", "input": f"def {name}()", "output": f"return {name}" + " + value" * 30}
        made.offer("large", record)
        made.offer("large", record)
        made.offer("other", {**record, "instruction": "Please write."})  # the same answer
        made.offer("small", {**record, "output": "x"})  # too short
        made.offer("small", {**record, "output": "x = 1\n" * 400})  # too long
    assert len(made.records) == made.by_package.total() == made.by_package["large"] + made.by_package["other"]
    assert 6 <= made.by_package["large"] <= 7 and 6 <= made.by_package["other"] <= 7
    made.write(tmp_path)
    lines = (tmp_path / "code_instructions.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert found == made.records
    assert len({one["output"] for one in found}) == len({one["input"] for one in found}) == len(found)
    with pytest.raises(DataError, match="no text_instructions were found"):
        program.Instructions("text_instructions", 3).write(tmp_path)


def test_files_that_the_corpora_took_give_no_instruction(program: ModuleType, tmp_path: Path) -> None:
    def of(taken: set[str]) -> set[str]:
        program.gather(tmp_path, taken, 30)
        return set((tmp_path / "code_instructions.jsonl").read_text(encoding="utf-8").splitlines())

    files = [file.id for file in program.find_files() if file.kind == "python"]
    first = of(set())
    assert len(first) == 30
    # the files in whose order the first were found
    assert not first & of(set(files[:400]))
