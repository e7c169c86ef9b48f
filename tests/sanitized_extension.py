"""Runs tests against the C++ extension built under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitized_extension.py [pytest arguments]

Builds csrc/module.cpp into a temporary folder, then runs pytest in a process that loads that build in place of the
installed one (this file is also the pytest plugin that does so). A read outside an array, an overflow or a misaligned
access ends the process with the sanitizer's report. Needs g++ with libasan and libubsan; says so, and exits with 77,
where they are missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "megatron.data._native"
VARIABLE = "STAGEMIX_SANITIZED_EXTENSION"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# all that reads files or memory in C++
TESTS = [
    "tests/data/test_index_fuzz.py",
    "tests/data/test_assembly.py",
    "tests/data/test_masked_assembly.py",
    "tests/data/test_piece_table.py",
    "tests/data/test_epoch_index.py",
    "tests/data/test_permutation.py",
    "tests/data/test_large_files.py",
]
SKIPPED = 77


def build(folder: Path) -> Path:
    """The extension with sanitizers, in `folder`. Raises CalledProcessError or FileNotFoundError."""
    import pybind11

    includes = ["-Icsrc", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O0", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden", *SANITIZE]

    library = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["g++", *flags, *includes, "-shared", "csrc/module.cpp", "-o", str(library)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=600)
    return library


def runtime(name: str) -> str | None:
    """Where the compiler's own library of this name lies."""
    try:
        found = subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    path = found.stdout.strip()
    return os.path.realpath(path) if os.path.isabs(path) else None


def main(arguments: list[str]) -> int:
    """Builds, runs, and gives pytest's exit status; 77 where the tools are missing."""
    libraries = [runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    if None in libraries:
        print("not run: g++ with libasan, libubsan and libstdc++ is needed (Debian, Ubuntu: apt install g++)")
        return SKIPPED
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            VARIABLE: str(build(Path(folder))),
            # libstdc++ beside them: the sanitizer looks for its throw when it starts
            "LD_PRELOAD": " ".join(str(library) for library in libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself leaves memory behind
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
            "PYTHONMALLOC": "malloc",  # so that the sanitizer sees each object's own bounds
        }
        # --capture=sys leaves the sanitizer's report, which it writes past Python, on the terminal
        command = [sys.executable, "-m", "pytest", "-p", "sanitized_extension", "-q", "-n", "0", "--capture=sys"]
        return subprocess.run(
            [*command, "-k", "not numpy", *(arguments or TESTS)], cwd=ROOT, env=environment, timeout=1800, check=False
        ).returncode


def load_in_place_of_the_installed(path: str) -> None:
    """Puts the sanitized build where `megatron.data.native` will find it."""
    spec = spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif VARIABLE in os.environ:
    load_in_place_of_the_installed(os.environ[VARIABLE])
