"""`stagemix COMMAND`: names, nearest names, laziness, and the twins in tools/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.commands.cli import COMMANDS, command_named, main
from megatron.config.errors import ConfigError
from megatron.config.version import VERSION


def test_overview_lists_every_command_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        assert sum(line.split()[:1] == [name] for line in lines) == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stagemix {VERSION}\n"


def test_dashes_stand_for_underscores() -> None:
    assert command_named("export-hf") == "export_hf"


@pytest.mark.parametrize("word, nearest", [("trian", "train"), ("exprot_hf", "export_hf"), ("plna", "plan")])
def test_B1_an_unknown_command_names_the_nearest(word: str, nearest: str, stagemix_command: list[str]) -> None:
    done = subprocess.run([*stagemix_command, word], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: unknown command {word!r}: did you mean {nearest!r}?\n"


def test_B1_a_word_near_nothing_lists_the_commands() -> None:
    with pytest.raises(ConfigError, match="train_tokenizer, preprocess_data, merge_data, plan"):
        command_named("xyzzy")


def test_each_command_has_its_tool_and_its_module(repository: Path) -> None:
    tools = {path.stem for path in (repository / "tools").glob("*.py")}
    modules = (repository / "megatron" / "commands").glob("*.py")
    commands = {path.stem for path in modules if "\ndef main(" in path.read_text(encoding="utf-8")}
    assert tools == set(COMMANDS)
    assert commands - {"cli"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_tools_explain_themselves_from_any_folder(name: str, repository: Path, tmp_path: Path) -> None:
    """From a source tree that is not installed: nothing but the tool's own place leads to the packages."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(repository / "tools" / f"{name}.py"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"stagemix {name}" in done.stdout
    assert "example" in done.stdout.lower(), "the help shows no example that a stranger can follow"


def test_a_tool_does_not_hide_packages_from_libraries(repository: Path) -> None:
    """tools/evaluate.py must not be what a library finds that imports `evaluate`."""
    program = (
        "import runpy, sys, importlib.util\n"
        f"sys.path[0] = {str(repository / 'tools')!r}\n"
        f"runpy.run_path({str(repository / 'tools' / 'plan.py')!r}, run_name='imported')\n"
        "found = importlib.util.find_spec('evaluate')\n"
        "sys.exit(str(found) if found and '/tools/' in str(found.origin) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_one_command_imports_no_other(stagemix_command: list[str]) -> None:
    program = (
        "import sys\nfrom megatron.commands.cli import main\n"
        "try: main(['plan', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name in ('torch', 'megatron.commands.train')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
