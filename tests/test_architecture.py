"""The house keeps its rules, and the checker reports each kind of violation when one is planted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from architecture import BRINGS_TORCH, ROW, RULES, Tree, complaints, pickles, torch_free_sources

Plant = Callable[[dict[str, str]], list[str]]


@pytest.fixture(scope="module")
def house(repository: Path) -> Tree:
    """The real tree, each of its files parsed once."""
    return Tree(repository)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[Tree], object], house: Tree) -> None:
    broken = list(rule(house))  # type: ignore[call-overload]
    assert not broken, "\n".join(broken)


def test_torch_free_modules_import_without_torch(house: Tree, repository: Path) -> None:
    """The static check once more by the interpreter itself: one process imports every torch-free module."""
    modules = [source.module for source in torch_free_sources(house)]
    assert "megatron.commands.cli" in modules
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"sys.exit(', '.join(sorted({BRINGS_TORCH!r} & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Writes files into an otherwise clean small tree and gives the checker's complaints about it."""

    def write(files: dict[str, str]) -> list[str]:
        clean = {f"megatron/{package}/__init__.py": '"""A room."""\n' for package in ROW}
        clean["megatron/data/mixture.py"] = "from megatron.config import schema\n"
        clean["megatron/config/schema.py"] = "VALUE = 1\n"
        clean["megatron/kernels/norm_triton.py"] = "import triton\n"
        clean["tools/train.py"] = "from megatron.commands.train import main\n"
        for path, text in {**clean, **files}.items():
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        return complaints(tmp_path)

    return write


def test_a_clean_tree_has_no_complaints(plant: Plant) -> None:
    assert plant({}) == []


LONG_FUNCTION = "def long():\n" + "    x = 1\n" * 60
PLANTED = {
    "upward import": ({"megatron/data/a.py": "import megatron.trainer.loop\n"}, "megatron/data/a.py:1: imports upward"),
    "upward, lazily": (
        {"megatron/data/a.py": "def f():\n    from megatron.trainer import loop\n    return loop\n"},
        "megatron/data/a.py:2: imports upward",
    ),
    "upward, relative": ({"megatron/data/a.py": "from ..models import decoder\n"}, "imports upward: data -> megatron"),
    "upward, by name": (
        {"megatron/data/a.py": "import importlib\nm = importlib.import_module('megatron.models.decoder')\n"},
        "megatron/data/a.py:2: imports upward",
    ),
    "upward, for types": (
        {"megatron/data/a.py": "import typing\nif typing.TYPE_CHECKING:\n    from megatron.engines import base\n"},
        "megatron/data/a.py:3: imports upward",
    ),
    "into tools": ({"megatron/commands/a.py": "import tools.train\n"}, "megatron/commands/a.py:1: imports upward"),
    "sideways import": ({"megatron/optim/a.py": "import megatron.checkpoint.manager\n"}, "imports sideways: optim"),
    "tool past commands": ({"tools/x.py": "import megatron.data.mixture\n"}, "tools/x.py:1: a tool imports only"),
    "unknown package": ({"megatron/magic/a.py": "x = 1\n"}, "package 'magic' has no row"),
    "file beside packages": ({"megatron/a.py": "x = 1\n"}, "megatron/a.py:1: a file beside packages"),
    "cycle": (
        {"megatron/data/a.py": "from megatron.data import b\n", "megatron/data/b.py": "import megatron.data.a\n"},
        "import cycle: megatron.data.a -> megatron.data.b -> megatron.data.a",
    ),
    "lazy cycle": (
        {
            "megatron/data/a.py": "import megatron.data.b\n",
            "megatron/data/b.py": "import megatron.data.c\n",
            "megatron/data/c.py": "def f():\n    import megatron.data.a\n",
        },
        "megatron.data.a -> megatron.data.b -> megatron.data.c -> megatron.data.a",
    ),
    "utils.py": ({"megatron/data/utils.py": "x = 1\n"}, "megatron/data/utils.py:1: 'utils' says nothing"),
    "misc folder": ({"megatron/data/misc/a.py": "x = 1\n"}, "megatron/data/misc:1: 'misc' says nothing"),
    "401 lines": ({"megatron/data/a.py": "x = 1\n" * 401}, "401 lines, a file has at most 400"),
    "401 lines of C++": ({"csrc/a.cpp": "int x;\n" * 401}, "csrc/a.cpp:401: 401 lines"),
    "61-line function": ({"megatron/data/a.py": LONG_FUNCTION}, "long has 61 lines, a function at most 60"),
    "environment": ({"megatron/data/a.py": "import os\nx = os.environ['HOME']\n"}, "megatron/data/a.py:2: os.environ"),
    "environment by name": ({"megatron/data/a.py": "from os import getenv\n"}, "megatron/data/a.py:1: os.getenv"),
    "lazy triton": ({"megatron/kernels/norm.py": "def f():\n    import triton.language\n"}, "norm.py:2: triton"),
    "transformers outside its door": ({"megatron/hf/export.py": "import transformers\n"}, "export.py:1: transformers"),
    "torch in config": ({"megatron/config/a.py": "import torch.nn\n"}, "megatron/config/a.py:1: imports torch.nn"),
    "torch behind the planner": (
        {
            "megatron/planner/a.py": "def f():\n    import megatron.optim.b\n",
            "megatron/optim/b.py": "import torch\n",
        },
        "torch-free: megatron/planner/a.py -> megatron/optim/b.py",
    ),
    "engine by name": (
        {"megatron/trainer/a.py": "def f(engine):\n    return engine == 'deepspeed'\n"},
        "megatron/trainer/a.py:2: the engine's name",
    ),
    "root __init__": ({"megatron/__init__.py": ""}, "megatron/__init__.py:1: megatron is a namespace package"),
    "code in __init__": ({"megatron/data/__init__.py": '"""Doc."""\nx = 1\n'}, "megatron/data/__init__.py:2: code in"),
    "pickle": ({"megatron/data/a.py": "import pickle\n"}, "imports pickle: no pickle is ever read (law C2)"),
    "torch.load": ({"megatron/checkpoint/a.py": "import torch\nx = torch.load('f')\n"}, "a.py:2: torch.load"),
    "global state": ({"megatron/data/a.py": "def f():\n    global x\n    x = 1\n"}, "a.py:2: global x"),
}


@pytest.mark.parametrize("files, expected", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_reported(files: dict[str, str], expected: str, plant: Plant) -> None:
    found = plant(files)
    assert any(expected in complaint for complaint in found), found


def test_limits_are_met_exactly(plant: Plant) -> None:
    """400 lines and 60 are allowed, and so is a kernel of 120."""
    kernel = "def kernel():\n" + "    x = 1\n" * 119
    sixty = "def function():\n" + "    x = 1\n" * 59
    files = {"megatron/data/a.py": "x = 1\n" * 400, "megatron/data/b.py": sixty, "megatron/kernels/c.py": kernel}
    assert plant(files) == []


def test_C2_no_pickle_is_read_by_any_module(house: Tree) -> None:
    assert not list(pickles(house))
