"""Gathers instructions for paper A's toy from this machine's documented Python: records as Stanford Alpaca has them.

code_instructions.jsonl: a signature and what the function does; the answer is the function.
text_instructions.jsonl: a signature; the answer is what the function or class does, in its own words. And the beginning
of a paragraph; the answer is the rest of it.
Only files that gave nothing to the corpora of examples/demo/gather.py are taken: no answer was trained on before.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

from gather_variants import ids_of, read_text
from machine_files import find_files
from prose import is_prose, paragraphs_of, sameness_key

from megatron.commands.frame import run_command
from megatron.config.errors import ConfigError, DataError
from megatron.config.quantities import parse_count

_SHORTEST, _LONGEST = 60, 600  # characters of an answer
_LONGEST_QUESTION = 300
_LARGEST_SHARE = 0.15  # of a file, that one package may have
_SENTENCE = re.compile(r"(?<=[a-z)][.!?])\s+(?=[A-Z])")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Record = dict[str, str]


@dataclass
class Instructions:
    """One output file: records, each question and each answer once, until there are enough."""

    name: str
    limit: int
    records: list[Record] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    by_package: Counter[str] = field(default_factory=Counter)

    def offer(self, package: str, record: Record) -> None:
        """Take the record, if it is new, short enough, and its package has not had its share."""
        question, answer = record["instruction"] + record["input"], record["output"]
        if len(self.records) >= self.limit or self.by_package[package] >= _LARGEST_SHARE * self.limit:
            return
        if not _SHORTEST <= len(answer) <= _LONGEST or len(question) > _LONGEST_QUESTION:
            return
        keys = {f"question {question}", f"answer {sameness_key(answer) or answer}"}
        if keys & self.seen:
            return
        self.seen |= keys
        self.by_package[package] += 1
        self.records.append(record)

    def write(self, folder: Path) -> None:
        """Write the file whole, or raise DataError where nothing was found."""
        path = folder / f"{self.name}.jsonl"
        if not self.records:
            raise DataError(f"no {self.name} were found among the packages of {sys.prefix}")
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as stream:
            for record in self.records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(partial, path)
        size = sum(len(record["output"].encode()) for record in self.records)
        print(f"{path}: {len(self.records):,} records, {size / 1e6:.1f} MB of answers")


def gather(folder: Path, taken: set[str], limit: int) -> None:
    """Write both files. taken: ids of files that are left out."""
    code, text = Instructions("code_instructions", limit), Instructions("text_instructions", limit)
    for file in find_files():
        if len(code.records) >= limit and len(text.records) >= limit:
            break
        if file.kind != "python" or file.id in taken or (source := read_text(Path(file.path))) is None:
            continue
        for definition, docstring in _documented(source):
            if (record := _code_record(definition, docstring)) is not None:
                code.offer(file.package, record)
            for record in _text_records(definition, docstring):
                text.offer(file.package, record)
    code.write(folder)
    text.write(folder)


def _documented(source: str) -> Iterator[tuple[Definition, str]]:
    """Functions, methods and classes of a file that have a docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, Definition) and (docstring := ast.get_docstring(node)):
            yield node, docstring


def _code_record(definition: Definition, docstring: str) -> Record | None:
    """Write the function that does this: its code without the docstring."""
    if isinstance(definition, ast.ClassDef) or len(definition.body) < 2:
        return None
    wanted = " ".join(docstring.split("\n\n", 1)[0].split())
    if len(wanted.split()) < 4:
        return None
    bare = type(definition)(**{name: getattr(definition, name) for name in definition._fields})
    bare.body, bare.decorator_list = definition.body[1:], []
    try:
        code = ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, definition)))
    except (ValueError, RecursionError):
        return None
    return {"instruction": "Write a Python function.", "input": f"{_signature(definition)}\n{wanted}", "output": code}


def _text_records(definition: Definition, docstring: str) -> Iterator[Record]:
    """Say what this does; go on with this paragraph."""
    paragraphs = paragraphs_of(docstring)
    # what it does is said first; a docstring whose first words are no sentence may say later what it does not do
    if paragraphs and " ".join(docstring.split()).startswith(paragraphs[0][:24]):
        kind = "class" if isinstance(definition, ast.ClassDef) else "function"
        yield {
            "instruction": f"Explain what this {kind} does.",
            "input": _signature(definition),
            "output": paragraphs[0],
        }
    for paragraph in paragraphs[1:]:
        first, *rest = _SENTENCE.split(paragraph)
        if rest and is_prose(rest[0]):
            yield {"instruction": "Continue the paragraph.", "input": first, "output": " ".join(rest)}


def _signature(definition: Definition) -> str:
    if isinstance(definition, ast.ClassDef):
        return f"class {definition.name}"
    return f"def {definition.name}({', '.join(argument.arg for argument in _arguments(definition))})"


def _arguments(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    said = definition.args
    return [*said.posonlyargs, *said.args, *said.kwonlyargs]


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, gather, and say what was found."""
    parser = argparse.ArgumentParser(
        prog="gather_instructions.py",
        description="Gather instructions of text and of code from the documented Python of this machine.",
        epilog="example:\n  python examples/studies/gather_instructions.py --output study-toy/corpora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="has code.jsonl and text.jsonl")
    parser.add_argument("--records", default="8K", metavar="N", help="of each at most (default: 8K)")
    args = parser.parse_args(argv)
    try:
        limit = parse_count(args.records)
    except ValueError as error:
        raise ConfigError(f"--records: {error}") from None
    gather(args.output, ids_of([args.output / "code.jsonl", args.output / "text.jsonl"]), limit)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
