"""The distribution installs with and without a compiler, editable and not, beside another `megatron`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest

NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
BACKEND = "from megatron.data.native import backend_name; print(backend_name())"


@pytest.fixture
def source_tree(repository: Path, tmp_path: Path) -> Path:
    """A copy of what a build reads, without anything that was built."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in ("megatron", "csrc"):
        shutil.copytree(repository / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(repository / name, tree / name)
    return tree


def environment(**changes: str) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **changes}


def pip_install(*words: str, env: dict[str, str]) -> str:
    command = [sys.executable, "-m", "pip", "-v", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(program: str, cwd: Path, *path: Path) -> str:
    env = environment(PYTHONPATH=os.pathsep.join(map(str, path)))
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOCAL = ("install", "--no-index", "--no-deps", "--no-build-isolation")


def test_without_a_compiler_installation_succeeds_and_says_so(source_tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    log = pip_install(*LOCAL, "--target", str(site), str(source_tree), env=environment(**NO_COMPILER))
    assert "the C++ extension was NOT built, so the NumPy twins will be used" in log
    assert not list(site.rglob("_native*"))
    assert python(BACKEND, tmp_path, site).startswith("NumPy")
    assert not (site / "megatron" / "__init__.py").exists()


def test_a_compiler_that_fails_is_no_failure_either(source_tree: Path, tmp_path: Path) -> None:
    for path in (source_tree / "csrc").glob("*.cpp"):
        path.write_text("this is not C++\n", encoding="utf-8")
    site = tmp_path / "site"
    log = pip_install(*LOCAL, "--target", str(site), str(source_tree), env=environment())
    assert "Reason: " in log
    assert python(BACKEND, tmp_path, site).startswith("NumPy")


@pytest.mark.timeout(480)
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")
def test_with_a_compiler_the_extension_is_installed(source_tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip_install(*LOCAL, "--target", str(site), str(source_tree), env=environment())
    assert python(BACKEND, tmp_path, site) == "native (C++)"


def test_editable_installation_and_console_script(source_tree: Path, tmp_path: Path) -> None:
    """In a scratch environment that borrows this one's packages. An extension of older sources does not survive."""
    venv.create(tmp_path / "scratch", with_pip=False)
    interpreter = tmp_path / "scratch" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "scratch" / "lib" / version / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    stale = source_tree / "megatron" / "data" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"from older sources")

    command = ["--python", str(interpreter), *LOCAL, "-e", str(source_tree)]
    assert "was NOT built" in pip_install(*command, env=environment(**NO_COMPILER))
    assert not stale.exists()
    script = tmp_path / "scratch" / "bin" / "stagemix"
    done = subprocess.run([script, "pla"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: unknown command 'pla': did you mean 'plan'?\n")
    place = subprocess.run(
        [interpreter, "-c", "import megatron.config.version as v; print(v.__file__)"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert place.stdout.strip() == str(source_tree / "megatron" / "config" / "version.py"), place.stderr


def test_another_megatron_still_imports(repository: Path, tmp_path: Path) -> None:
    """megatron is a namespace: a distribution that holds megatron.core works on the same path, before or after."""
    other = tmp_path / "megatron" / "core"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("NAME = 'core'\n", encoding="utf-8")
    program = "import megatron.core, megatron.config.version as v; print(megatron.core.NAME, v.VERSION[0])"
    assert python(program, tmp_path, tmp_path, repository) == "core 0"
    assert python(program, tmp_path, repository, tmp_path) == "core 0"


def test_the_source_distribution_can_be_built_from(source_tree: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=source_tree, env=environment(), check=True, capture_output=True, timeout=120)
    (archive,) = (source_tree / "dist").glob("stagemix-*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    native = {f"csrc/{path.name}" for path in (source_tree / "csrc").iterdir()}
    assert native | {"setup.py", "pyproject.toml", "LICENSE", "megatron/commands/cli.py"} <= held


def test_everything_declared_is_pinned(repository: Path) -> None:
    """What pyproject.toml names, `make .venv` installs at one exact version that pyproject.toml allows."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    declared = [
        *project["dependencies"],
        *(word for extra in ("hf", "eval", "triton", "dev") for word in optional[extra]),
    ]
    pins: dict[str, str] = {}
    for path in sorted((repository / "requirements").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r ")):
                pin, _, where = line.partition("; ")
                assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z]+\])?==[0-9.]+", pin), f"{path.name}: {line}"
                assert where in ("", 'platform_system == "Linux"'), f"{path.name}: {line}"
                name, _, version = pin.partition("==")
                pins[name] = version
    for word in declared:
        name, _, least = word.partition(";")[0].strip().partition(">=")
        assert name in pins, f"{name} has no pin in requirements/"
        assert numbers(pins[name]) >= numbers(least)


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
