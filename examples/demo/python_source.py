"""Takes a Python file apart: code without docstrings and comments, and the docstrings and comments by themselves."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_QUOTED = (
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'"
)
_STRING_OR_COMMENT = re.compile(rf"{_QUOTED}|(?P<comment>\#[^\n]*)", re.DOTALL)
_STRING_OR_GAP = re.compile(rf"{_QUOTED}|(?P<gap>\n(?:[ \t]*\n){{3,}})", re.DOTALL)
_DIRECTIVE = re.compile(r"#\s*(?:!|-\*-|type:|noqa|pylint|fmt:|isort:|mypy:|pragma|ruff|flake8|yapf|pyright|vim:|region)")


class NotUsable(Exception):
    """The file cannot be used; the message is the reason, short enough to be counted by."""


@dataclass(frozen=True)
class Parts:
    """One file taken apart. `remarks` are docstrings and runs of whole-line comments, in the order of the file."""

    code: str
    remarks: list[str]


def take_apart(source: str) -> Parts:
    """Split a Python source. The code compiles; a body that was only a docstring becomes `...`.

    Raises NotUsable where the source does not parse, or where it cannot be split so that the rest still compiles.
    """
    tree = _parsed(source, "does not parse")
    starts = _line_starts(source)
    edits: list[tuple[int, int, str]] = []
    remarks: list[tuple[int, str]] = []
    for node in _scopes(tree):
        _take_docstring(source, starts, node, edits, remarks)
    _take_comments(source, edits, remarks)
    code = _without_gaps(_edited(source, edits))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "stripped", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotUsable("does not compile once stripped") from None
    return Parts(code, [text for _, text in sorted(remarks)])


_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _scopes(tree: ast.Module) -> Iterator[_Scope]:
    """All nodes that may have a docstring. Only statements are walked: a third of ast.walk's time."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Scope):
            yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            below = getattr(node, part, None)
            if isinstance(below, list):
                waiting += below


def _parsed(source: str, reason: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotUsable(reason) from None


def _line_starts(source: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer("\n", source))]


def _take_docstring(
    source: str,
    starts: list[int],
    node: _Scope,
    edits: list[tuple[int, int, str]],
    remarks: list[tuple[int, str]],
) -> None:
    if not node.body or not isinstance(first := node.body[0], ast.Expr):
        return
    value = first.value
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
        return
    start = _offset(source, starts, first.lineno, first.col_offset)
    end = _offset(source, starts, first.end_lineno or first.lineno, first.end_col_offset or 0)
    remarks.append((start, value.value))
    line_start = starts[first.lineno - 1]
    line_end = source.find("\n", end)
    line_end = len(source) if line_end < 0 else line_end + 1
    alone = not source[line_start:start].strip() and re.fullmatch(r"\s*(?:#.*\s*)?", source[end:line_end])
    if not alone or (len(node.body) == 1 and not isinstance(node, ast.Module)):
        edits.append((start, end, "..."))
    else:
        edits.append((line_start, line_end, ""))


def _offset(source: str, starts: list[int], line: int, column: int) -> int:
    """Character offset of ast's position, whose columns count UTF-8 bytes."""
    start = starts[line - 1]
    part = source[start : start + column]
    return start + (column if part.isascii() else len(source[start:].encode()[:column].decode(errors="ignore")))


def _take_comments(source: str, edits: list[tuple[int, int, str]], remarks: list[tuple[int, str]]) -> None:
    run: list[str] = []
    run_start = run_end = -1
    for match in _STRING_OR_COMMENT.finditer(source):
        if match.group("comment") is None:
            continue
        start, end = match.span()
        line_start = source.rfind("\n", 0, start) + 1
        if source[line_start:start].strip():
            edits.append((line_start + len(source[line_start:start].rstrip(" \t")), end, ""))
            continue
        edits.append((line_start, min(end + 1, len(source)), ""))
        if line_start != run_end:
            remarks.append((run_start, "\n".join(run)))
            run, run_start = [], line_start
        run_end = end + 1
        if not _DIRECTIVE.match(match.group()):
            run.append(match.group().lstrip("#!: ") if match.group().strip("# ") else "")
    remarks.append((run_start, "\n".join(run)))
    remarks[:] = [(at, text) for at, text in remarks if text.strip()]


def _edited(source: str, edits: list[tuple[int, int, str]]) -> str:
    parts: list[str] = []
    at = 0
    for start, end, replacement in sorted(edits):
        if start < at:  # a comment on a docstring's own line went with it
            continue
        parts += (source[at:start], replacement)
        at = end
    parts.append(source[at:])
    return "".join(parts)


def _without_gaps(code: str) -> str:
    """At most two empty lines together outside of strings, and none at the beginning."""
    return _STRING_OR_GAP.sub(lambda m: "\n\n\n" if m.group("gap") else m.group(), code).lstrip("\n").rstrip() + "\n"
