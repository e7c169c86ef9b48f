"""Licences by their published texts and SPDX expressions; languages by file names."""

from __future__ import annotations

from importlib import metadata

import pytest

from megatron.corpora.languages import language_of
from megatron.corpora.licences import (
    LICENCE_FILE,
    combined_licence,
    identify_licence,
    licences_allowed,
    spdx_expression,
)


@pytest.mark.parametrize(
    ("package", "licence"),
    [
        ("orjson", {"Apache-2.0", "MIT", "MPL-2.0"}),
        ("pytest", {"MIT"}),
        ("pathspec", {"MPL-2.0"}),
        ("click", {"BSD-3-Clause"}),
        ("hypothesis", {"MPL-2.0"}),
        ("zstandard", {"BSD-3-Clause"}),
        ("packaging", {"Apache-2.0", "BSD-2-Clause"}),
        ("safetensors", {"Apache-2.0"}),
        ("typing_extensions", {"PSF-2.0"}),
        ("certifi", {"MPL-2.0"}),
    ],
)
def test_licence_files_of_installed_packages_are_known(package: str, licence: set[str]) -> None:
    """What each package says of itself on its own page, against the texts that it ships."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    texts = [file.read_text(encoding="utf-8") for file in files if LICENCE_FILE.match(file.name)]
    if not texts:
        pytest.skip(f"{package} ships no licence file")
    found = {name for text in texts for name in identify_licence(text).split(" AND ") if name}
    assert found and found <= licence


def test_licence_files_by_name() -> None:
    for name in (
        "LICENSE",
        "LICENCE.txt",
        "license.md",
        "COPYING",
        "COPYING.LESSER",
        "LICENSE-MIT",
        "UNLICENSE",
        "LICENSE.rst",
    ):
        assert LICENCE_FILE.match(name), name
    for name in ("licenses.py", "license_check.md", "LICENSE.py", "copying.c", "mylicense"):
        assert not LICENCE_FILE.match(name), name


def test_licences_of_a_folder_add_up() -> None:
    assert combined_licence({"LICENSE-MIT": "MIT", "LICENSE-APACHE": "Apache-2.0"}) == "Apache-2.0 OR MIT"
    assert combined_licence({"LICENSE": "MIT", "COPYING": "GPL-2.0-only"}) == "GPL-2.0-only AND MIT"
    assert combined_licence({"LICENSE": "MIT", "COPYING": ""}) == "LicenseRef-unknown AND MIT"
    assert combined_licence({"LICENSE": ""}) == combined_licence({}) == ""


@pytest.mark.parametrize(
    ("line", "expression"),
    [
        ("# SPDX-License-Identifier: MIT", "MIT"),
        ("/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */", "GPL-2.0 WITH Linux-syscall-note"),
        ("<!-- SPDX-License-Identifier: (MIT OR  Apache-2.0) -->", "(MIT OR Apache-2.0)"),
        ("// SPDX-License-Identifier: BSD-3-Clause\nint main;", "BSD-3-Clause"),
        ("no header", ""),
    ],
)
def test_spdx_headers(line: str, expression: str) -> None:
    assert spdx_expression(f"\n{line}\n") == expression


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND Apache-2.0", True),
        ("(GPL-3.0-only AND MIT) OR Apache-2.0", True),
        ("GPL-3.0-only AND (MIT OR Apache-2.0)", False),
        ("GPL-3.0-only OR MIT AND GPL-2.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("LGPL-2.1-or-later", True),
        ("LGPL-2.1+", True),
        ("", False),
        ("MIT AND", False),
        ("(MIT", False),
        ("MIT Apache-2.0", False),
        ("LicenseRef-unknown AND MIT", False),
    ],
)
def test_expressions_against_an_allow_list(expression: str, allowed: bool) -> None:
    assert licences_allowed(expression, ("MIT", "Apache-2.0", "LGPL-2.1")) is allowed


def test_languages_by_name() -> None:
    names = {
        "a/b/c.py": "Python",
        "x.CPP": "C++",
        "Makefile": "Makefile",
        "sub/CMakeLists.txt": "CMake",
        "a.txt": "Text",
        "Dockerfile.dev": "Dockerfile",
        "x.h": "C",
        "go.mod": "Go Module",
        "a.f90": "Fortran Free Form",
        "noending": "",
        "x.unknown": "",
        "a.d.ts": "TypeScript",
        ".gitignore": "Ignore List",
    }
    assert {name: language_of(name) for name in names} == names
