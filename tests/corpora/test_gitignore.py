"""Nested ignore files mean what git takes them to mean. Oracle: `git ls-files --others --exclude-standard`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.corpora.selection import ReadOptions, select_files

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

NAMES = ["a", "b", "foo", "foo.py", "bar.o", ".hid", "x y"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)
PIECES = st.sampled_from(
    ["a", "b", "foo", "*", "**", "*.py", "*.o", "f*", "[ab]", "?", "x y", "x\\ y", ".hid", "foo.??"]
)
PATTERNS = st.builds(
    lambda negated, rooted, pieces, folder: negated + rooted + "/".join(pieces) + folder,
    st.sampled_from(["", "", "!"]),
    st.sampled_from(["", "", "/"]),
    st.lists(PIECES, min_size=1, max_size=3),
    st.sampled_from(["", "", "/"]),
) | st.sampled_from(["", "# a", "\\#a", "a  ", "/", "!", "foo/**", "**/foo", "a/**/b", "!*/", "[", "*/"])
IGNORE_FILES = st.lists(
    st.tuples(st.sampled_from(["", "a", "foo", "a/b", "b"]), st.lists(PATTERNS, max_size=5)), max_size=3
)


def untracked(root: Path) -> list[str]:
    """The files that git does not ignore."""
    command = ["git", "-c", "core.excludesFile=/dev/null", "ls-files", "-z", "--others", "--exclude-standard"]
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    listed = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=True, timeout=60).stdout
    return sorted(os.fsdecode(name) for name in listed.split(b"\0") if name)


def selected(root: Path) -> list[str]:
    try:
        return [file.name for file in select_files([root])]
    except DataError as error:
        assert "the corpus is empty" in str(error)
        return []


@pytest.fixture(scope="module")
def empty_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One `git init`, to be copied: running it takes most of an example's time."""
    root = tmp_path_factory.mktemp("empty")
    subprocess.run(["git", "init", "-q", "--template=", str(root)], check=True, timeout=60)
    return root


@needs_git
@settings(max_examples=80, deadline=None)
@example(paths=["a/b"], ignored=[("", ["a", "!*/"])], crlf=False)  # the folder comes back, and what is in it
@example(paths=["foo/a", "foo/b"], ignored=[("", ["foo/**", "!foo/a"])], crlf=False)
@given(paths=st.lists(PATHS, min_size=1, max_size=12), ignored=IGNORE_FILES, crlf=st.booleans())
def test_nested_ignore_files_are_gits(
    paths: list[str], ignored: list[tuple[str, list[str]]], crlf: bool, empty_repository: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(empty_repository / ".git", root / ".git")
        for path in paths:
            file = root / path
            if not any(parent.is_file() for parent in file.parents) and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("x")
        for above, patterns in ignored:
            if (root / above).is_dir():
                end = "\r\n" if crlf else "\n"
                (root / above / ".gitignore").write_bytes(end.join([*patterns, ""]).encode())
        assert selected(root) == untracked(root)


@needs_git
def test_the_repositorys_own_exclude_file_counts_and_can_be_overruled(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=60)
    (tmp_path / ".git" / "info" / "exclude").write_text("*.log\n")
    (tmp_path / ".gitignore").write_bytes(b"\xef\xbb\xbf*.tmp\n!keep.log\n")
    for name in ("a.log", "keep.log", "b.tmp", "c.py"):
        (tmp_path / name).write_text("x")
    assert selected(tmp_path) == untracked(tmp_path) == [".gitignore", "c.py", "keep.log"]
    everything = select_files([tmp_path], options=ReadOptions(gitignore=False))
    assert [file.name for file in everything] == [".gitignore", "a.log", "b.tmp", "c.py", "keep.log"]
