"""The demo's corpora. Oracles: Python's own ast and tokenize for code, sentences written here for prose."""

from __future__ import annotations

import ast
import importlib
import io
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def demo() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(DEMO))
    yield {name: importlib.import_module(name) for name in ("gather", "prose", "python_source", "machine_files")}
    sys.path.remove(str(DEMO))


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def without_docstrings(source: str) -> str:
    """The tree without docstrings, nor the `...` that stand where one was the only or an inline statement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body.pop(0)
            rest = [n for n in node.body if not (isinstance(n, ast.Expr) and is_ellipsis(n.value))]
            node.body = rest or ([] if isinstance(node, ast.Module) else [ast.Expr(ast.Constant(...))])
    return ast.dump(tree)


HARD = [
    "x = 1  # one\ny = '# no comment' # yes\n",
    'def f():\n    """Doc."""\n',
    'def f(): """Doc."""\n',
    'def f(): """Doc."""; return 1\n',
    "class A:\n    'é doc'; x = 1  # é\n",
    '"""Module."""\n# coding\nfrom __future__ import annotations\n\n\n\n\n\nx = """a\n\n\n\n\nb # c"""\n',
    "if True:\n    # only a comment\n    pass\n    # the end",
    "x = [  # open\n    1,\n    # middle\n    2,\n]\n",
    "def f():\n    r'''Doc \\d'''\n    return '\\\\'  # c\n",
    'async def f():\n    "a" "b"\n    return f"{1:#x}"  # hash\n',
    "class A:\n    '''Doc.'''  # why\n    def f(self):\n        '''Doc.'''  # why\n",
]


def test_code_keeps_its_meaning_and_loses_its_remarks(demo: dict[str, ModuleType]) -> None:
    standard = Path(sysconfig.get_path("stdlib"))
    files = [standard / name for name in ("argparse.py", "typing.py", "ast.py", "inspect.py", "json/decoder.py")]
    for source in [*HARD, *(file.read_text(encoding="utf-8") for file in files)]:
        code = demo["python_source"].stripped(source)
        compile(code, "code", "exec", dont_inherit=True)
        assert without_docstrings(code) == without_docstrings(source)
        kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(code).readline)}
        assert tokenize.COMMENT not in kinds


def test_a_file_that_does_not_parse_is_not_usable(demo: dict[str, ModuleType]) -> None:
    for source in ("def f(:\n", "print 'two'\n", "x = 1\x00\n"):
        with pytest.raises(demo["python_source"].NotUsable):
            demo["python_source"].stripped(source)


PROSE = "This is a sentence about the weather, and it is long enough to be read as one."


def test_prose_is_kept_and_the_rest_is_not(demo: dict[str, ModuleType]) -> None:
    source = f'''# Copyright 2020 The Authors. All rights reserved, and this is a long sentence of the licence.
"""{PROSE}

>>> f(1)
The output of this example is not to be taken for prose, even when it is a sentence.

Parameters
----------
x : int, optional
    The number of the days that are left in the week, from which the rest is computed.
"""
x = 1
# This comment runs over two lines, of which the first is
# joined to the second, and `code` in it loses its ``marks``.
# type: ignore
y = "A string that is not a comment # and that has the words of a sentence in it."
'''
    paragraphs = [p for r in demo["python_source"].remarks_of(source) for p in demo["prose"].paragraphs_of(r)]
    assert paragraphs == [
        PROSE,
        "The number of the days that are left in the week, from which the rest is computed.",
        "This comment runs over two lines, of which the first is joined to the second, and code in it loses its marks.",
    ]


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("See :class:`~a.b.C` and [this](http://x.y/z), which is said by **all** of the people who are here.",
         "See a.b.C and this, which is said by all of the people who are here."),
        ("- It is an item of a list, and so it begins with a mark that is not a part of the text.",
         "It is an item of a list, and so it begins with a mark that is not a part of the text."),
        (":param x: The value that is to be used when there is no other value to be had from the file.",
         "The value that is to be used when there is no other value to be had from the file."),
        ("The value (see a) of it) is as it was before it was cut, which is what this is about.",
         "The value (see a) of it) is as it was before it was cut, which is what this is about."),
    ],
)  # fmt: skip
def test_markup_is_removed(demo: dict[str, ModuleType], marked: str, plain: str) -> None:
    assert demo["prose"].paragraphs_of(marked) == [plain]


@pytest.mark.parametrize("text", [
    "x = 1", "TODO", "if self.a == self.b: return self.c(d, e, f, g)", "for i in range(10): print(i, a[i], b[i], c[i])",
    "* [x] a_b c_d e_f g_h i_j k_l m_n o_p q_r s_t u_v.", "a" * 30_000, "(" * 5000 + "a" * 5000, "a, " * 5000 + ":",
])  # fmt: skip
def test_what_is_not_prose_is_refused_and_quickly(demo: dict[str, ModuleType], text: str) -> None:
    assert demo["prose"].paragraphs_of(text) == []


def test_gathering_is_the_same_at_any_worker_count(demo: dict[str, ModuleType], tmp_path: Path) -> None:
    for workers in (1, 2):
        demo["gather"].gather(tmp_path / str(workers), 150_000, 100_000, workers)
    for name in ("code", "text"):
        content = (tmp_path / "1" / f"{name}.jsonl").read_bytes()
        assert content == (tmp_path / "2" / f"{name}.jsonl").read_bytes()
        texts = [json.loads(line)["text"] for line in content.splitlines()]
        assert len(set(texts)) == len(texts)
    summary = json.loads((tmp_path / "1" / "summary.json").read_text())
    assert summary["code"]["bytes"] >= 150_000 and summary["text"]["bytes"] >= 100_000
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["code.jsonl", "summary.json", "text.jsonl"]
