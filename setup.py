"""Builds the optional C++ extension; everything else about the distribution is said in pyproject.toml.

Where there is no compiler, or it fails, installation succeeds all the same and says so: megatron.data then runs the
NumPy twins, which give the same bytes more slowly.
"""

from __future__ import annotations

import sys
from glob import glob
from pathlib import Path
from textwrap import shorten
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXTENSION = "megatron.data._native"
NOTICE = """
  ******************************************************************************
  stagemix: the C++ extension was NOT built, so the NumPy twins will be used.
  Results are the same, byte for byte; building indexes and mixtures is slower.
  Reason: {reason}
  To build it: install a C++17 compiler (Debian, Ubuntu: apt install g++;
  Fedora: dnf install gcc-c++; macOS: xcode-select --install), install again.
  ******************************************************************************
"""


class OptionalBuildExt(build_ext):
    """Compiles the extension where that is possible; where not, tells the user what that means and goes on."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # no compiler known for this platform
            for extension in self.extensions:
                self.give_up(extension, error)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # distutils raises its own classes and OSError alike
            self.give_up(ext, error)

    def give_up(self, ext: Extension, error: Exception) -> None:
        """Prints the notice, and removes an extension built from older sources: it would be used in silence."""
        if self.editable_mode or self.inplace:
            for stale in Path(*ext.name.split(".")[:-1]).glob(f"{ext.name.split('.')[-1]}*.so"):
                stale.unlink()
        reason = shorten(str(error) or type(error).__name__, 200, placeholder=" … (all of it: pip install -v)")
        announce(NOTICE.format(reason=reason))


def announce(notice: str) -> None:
    """Prints to standard error, and to the terminal if there is one: pip keeps a build's output to itself."""
    print(notice, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            Path("/dev/tty").write_text(notice, encoding="utf-8")
        except OSError:
            return


def extensions() -> list[Any]:
    """The extension module, or nothing where pybind11 is absent (possible only with --no-build-isolation)."""
    try:
        import pybind11
    except ImportError:
        announce(NOTICE.format(reason="pybind11 is not installed in this build environment"))
        return []
    windows = sys.platform == "win32"
    return [
        Extension(
            EXTENSION,
            sources=["csrc/module.cpp"],  # which includes the others
            depends=sorted(glob("csrc/*")),
            include_dirs=["csrc", pybind11.get_include()],
            language="c++",
            extra_compile_args=["/std:c++17", "/O2"]
            if windows
            else ["-std=c++17", "-O3", "-pthread", "-fvisibility=hidden", "-g0"],
            extra_link_args=[] if windows else ["-pthread"],
            optional=True,  # so that setuptools does not look for the file that was not built
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt})
