"""Where `gpu.py` runs: packages that must be there, wheels brought along, and the words that go with every figure.

Nothing but the standard library is imported at the top, so that a missing package is an error in words and not a
traceback, and so that Triton's interpreter can be switched on before anything imports a kernel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXIT_UNAVAILABLE = 6
"""As docs/exit-codes.md has it: this installation cannot do what was asked."""

NEEDED = ("numpy", "torch", "triton", "pydantic", "safetensors", "tqdm")
"""Imported by the parts of the program that are measured; transformers is not among them."""

NEEDED_BY_TESTS = ("pytest", "hypothesis", "pytest-timeout")


def missing_packages(parts: Collection[str]) -> list[str]:
    """Names of the packages that the parts need and this interpreter cannot find."""
    needed = NEEDED + (NEEDED_BY_TESTS if "f" in parts else ())
    return [name for name in needed if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    except (ImportError, ValueError):
        return False


def words_of_missing(missing: Sequence[str]) -> str:
    """The error about them, with the command that mends it, and the way where there is no network."""
    asked = " ".join(shlex.quote(_requirement(name)) for name in missing)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"{', '.join(missing)} cannot be imported by {sys.executable}: run\n"
        f"  {sys.executable} -m pip install {asked}\n"
        "or, for a machine without a network, fetch wheels on another one and hand them over with --wheels DIR:\n"
        f"  python -m pip download --only-binary=:all: --python-version {version} --platform manylinux_2_17_x86_64 "
        f"--platform manylinux_2_28_x86_64 -d DIR {asked}"
    )


def _requirement(name: str) -> str:
    """As pyproject.toml asks for it, without the marker of a platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = [line.split(";")[0].strip() for line in lines]
    return next((line for line in found if line.split(">")[0].split("=")[0].strip() == name), name)


def use_wheels(folder: Path) -> None:
    """Installs the wheels of a folder, offline, into a temporary one that this process and its children import from.

    SystemExit where there are none, or pip refuses one (another Python or platform, say).
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"error: --wheels {folder}: no wheel is there")
    target = tempfile.mkdtemp(prefix="gpu-wheels-")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", target, *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: --wheels {folder}: pip says\n{done.stdout}{done.stderr}")
    sys.path.insert(0, target)
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [target, os.environ.get("PYTHONPATH")]))


def set_up(dry: bool) -> None:
    """What must be said before torch and kernels are imported; children inherit it. In a dry run kernels are
    interpreted, no GPU is seen and nothing is compiled, whatever the machine has.
    """
    sys.path[:0] = [str(ROOT)]
    os.environ["HF_HUB_OFFLINE"] = "1"
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def run_words(argv: Sequence[str], dry: bool) -> dict[str, str]:
    """What a figure is worth nothing without: command, time, commit, machine and versions."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(["python", "benchmarks/gpu.py", *argv]),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if gpu else f"none (DRY RUN on {platform.machine()})" if dry else "none",
        "driver": _driver() if gpu else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} processors",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(name), "__version__", "unknown"))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    return _said(command) or "unknown"


def _commit() -> str:
    head = _said(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not head:
        return "unknown: no git here"
    return head + (" with changes" if _said(["git", "-C", str(ROOT), "status", "--porcelain"]) else "")


def _said(command: list[str]) -> str:
    """What a command says; empty where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
