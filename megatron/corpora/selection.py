"""Which files a corpus is made of: paths, folders, globs, git checkouts and lists of them, in a fixed order."""

from __future__ import annotations

import difflib
import glob
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron.config.errors import ConfigError, DataError
from megatron.corpora.code_tree import folder_files
from megatron.corpora.formats import named_file
from megatron.corpora.git_tree import git_files, git_folder
from megatron.corpora.languages import LANGUAGES
from megatron.corpora.read_options import InputFile, Kind, ReadOptions

__all__ = ["InputFile", "Kind", "ReadOptions", "select_files"]


def select_files(
    inputs: Sequence[str | Path],
    files_from: str | Path | None = None,
    options: ReadOptions | None = None,
    skipped: Counter[str] | None = None,
) -> list[InputFile]:
    """The files of the corpora in the order they are read: inputs one after another, folders sorted by path.

    `files_from` is a file with one path a line, relative to the current folder, "-" for standard input; its paths come
    after the inputs. `skipped` counts what was found and passed over, by reason. Raises DataError for a missing path,
    a glob without a match, a format that is not read, a damaged repository, or where an input has nothing to read.
    """
    options = options or ReadOptions()
    counts = skipped if skipped is not None else Counter[str]()
    _check_languages(options)
    paths = [str(path) for path in inputs]
    if files_from is not None:
        paths += _listed(str(files_from))
    if not paths:
        raise DataError("no input was given")
    return [file for path in paths for found in _matches(path) for file in _of_path(found, options, counts)]


def _listed(files_from: str) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if files_from == "-" else Path(files_from).read_bytes()
    except OSError as error:
        raise DataError(f"{files_from}: the list of files cannot be read: {error.strerror}") from None
    lines = [line.removesuffix(b"\r") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise DataError(f"{files_from}: the list of files names none")
    if (number := next((n for n, line in enumerate(lines, 1) if b"\0" in line), None)) is not None:
        raise DataError(f"{files_from}: line {number}: a zero byte is in no path: write one path a line")
    return paths


def _matches(path: str) -> list[Path]:
    """The path itself, or what a glob matches (`**` over folders), sorted."""
    if glob.has_magic(path) and not os.path.lexists(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise DataError(f"{path}: the glob matches nothing")
        return [Path(one) for one in found]
    return [Path(path)]


def _of_path(path: Path, options: ReadOptions, skipped: Counter[str]) -> list[InputFile]:
    try:
        if path.is_file():
            return [named_file(path)]
        if not path.is_dir():
            reason = "not a file or a folder" if path.exists() else "no such file or folder"
            raise DataError(f"{path}: {reason}: correct the input path")
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    before = Counter(skipped)
    repository = git_folder(path)
    if repository is not None and options.git:
        files = git_files(path, "", options, skipped)
    elif repository == path:
        raise DataError(f"{path}: a bare git repository has no files of its own: read it with --git")
    else:
        files = folder_files(path, options, skipped)
        if options.git and not any(file.object_id for file in files):
            raise DataError(f"{path}: --git was asked for, and neither this folder nor one in it is a git repository")
    if not files:
        passed = ", ".join(f"{count} {reason}" for reason, count in sorted((skipped - before).items()))
        wanted = f" whose name ends in {' or '.join(options.suffixes)}" if options.suffixes else ""
        raise DataError(
            f"{path}: the corpus is empty: the folder holds no file{wanted}"
            + (f" that passes the filters ({passed})" if passed else "")
        )
    return files


def _check_languages(options: ReadOptions) -> None:
    if options.language_field:
        return  # the values of a field may be of any kind
    known = {language.lower(): language for language in LANGUAGES}
    for name in options.languages:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean {known[near[0]]!r}?" if near else "names are GitHub linguist's, such as Python or C++"
            raise ConfigError(f"language {name!r} is not known: {hint}")
