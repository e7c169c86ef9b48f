"""Takes a Python file apart: code without docstrings and comments, and the docstrings and comments by themselves."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator

_QUOTED = (
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'"
)
_STRING_OR_COMMENT = re.compile(rf"{_QUOTED}|(?P<comment>\#[^\n]*)", re.DOTALL)
_STRING_OR_GAP = re.compile(rf"{_QUOTED}|(?P<gap>\n(?:[ \t]*\n){{3,}})", re.DOTALL)
_DIRECTIVE = re.compile(
    r"#\s*(?:!|-\*-|type:|noqa|pylint|fmt:|isort:|mypy:|pragma|ruff|flake8|yapf|pyright|vim:|region)"
)


class NotUsable(Exception):
    """The file cannot be used; the message is the reason, short enough to be counted by."""


def stripped(source: str) -> str:
    """The source without docstrings and comments. It compiles; a body that was only a docstring becomes `...`.

    Raises NotUsable where the source does not parse, or where the rest would not compile.
    """
    edits = _docstring_edits(source) + _comment_edits(source)
    code = _without_gaps(_edited(source, edits))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "stripped", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotUsable("does not compile once stripped") from None
    return code


def remarks_of(source: str) -> list[str]:
    """Docstrings (triple-quoted strings that begin a line) and runs of whole-line comments, in the file's order."""
    remarks: list[str] = []
    run: list[str] = []
    run_end = -1
    for match in _STRING_OR_COMMENT.finditer(source):
        start, end = match.span()
        line_start = source.rfind("\n", 0, start) + 1
        before = source[line_start:start].strip()
        if match.group("comment") is None:
            if end - start > 40 and before in ("", "r", "R") and source.startswith(('"""', "'''"), start):
                remarks.append(source[start + 3 : end - 3])
            continue
        if before:
            continue
        if line_start != run_end:
            run = []
            remarks.append("")
        run_end = end + 1
        if not _DIRECTIVE.match(match.group()):
            run.append(match.group().lstrip("#!:").removeprefix(" ").rstrip("#"))
        remarks[-1] = "\n".join(run)
    return [remark for remark in remarks if remark.strip()]


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


def _docstring_edits(source: str) -> list[tuple[int, int, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotUsable("does not parse") from None
    starts = [0, *(match.end() for match in re.finditer("\n", source))]
    edits: list[tuple[int, int, str]] = []
    for node in _scopes(tree):
        first = node.body[0] if node.body else None
        if not isinstance(first, ast.Expr) or not isinstance(first.value, ast.Constant):
            continue
        if not isinstance(first.value.value, str):
            continue
        start = _offset(source, starts, first.lineno, first.col_offset)
        end = _offset(source, starts, first.end_lineno or first.lineno, first.end_col_offset or 0)
        line_start = starts[first.lineno - 1]
        line_end = source.find("\n", end) + 1 or len(source)
        alone = not source[line_start:start].strip() and re.fullmatch(r"\s*(?:#.*\s*)?", source[end:line_end])
        if not alone or (len(node.body) == 1 and not isinstance(node, ast.Module)):
            edits.append((start, end, "..."))
        else:
            edits.append((line_start, line_end, ""))
    return edits


def _offset(source: str, starts: list[int], line: int, column: int) -> int:
    """Character offset of ast's position, whose columns count UTF-8 bytes."""
    start = starts[line - 1]
    part = source[start : start + column]
    return start + (column if part.isascii() else len(source[start:].encode()[:column].decode(errors="ignore")))


def _comment_edits(source: str) -> list[tuple[int, int, str]]:
    edits: list[tuple[int, int, str]] = []
    for match in _STRING_OR_COMMENT.finditer(source):
        if match.group("comment") is None:
            continue
        start, end = match.span()
        line_start = source.rfind("\n", 0, start) + 1
        before = source[line_start:start].rstrip(" \t")
        edits.append((line_start + len(before), end, "") if before else (line_start, min(end + 1, len(source)), ""))
    return edits


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
