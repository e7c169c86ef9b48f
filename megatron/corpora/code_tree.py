"""Folders of code, text and data files: what is in them, by path, without what version control or filters leave out."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.config.errors import DataError
from megatron.corpora.compressed import open_file
from megatron.corpora.formats import found_file, readable_name
from megatron.corpora.git_tree import git_files, git_folder
from megatron.corpora.gitignore import IGNORE_FILE, IgnoreRules
from megatron.corpora.licences import LICENCE_FILE, LICENCE_FILE_BYTES, combined_licence, identify_licence
from megatron.corpora.read_options import InputFile, ReadOptions

SKIPPED_FOLDERS = {
    ".git",
    ".hg",
    ".svn",
    ".bzr",
    "CVS",
    "__pycache__",
    "node_modules",
    ".venv",
    ".tox",
    ".nox",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".ipynb_checkpoints",
}
_IGNORE_FILE_BYTES = 100 << 20  # git reads no larger one either


@dataclass(frozen=True, slots=True)
class _Folder:
    path: str
    relative: str  # to the root, "" or ending in a slash
    rules: IgnoreRules
    licence: str


def folder_files(root: Path, options: ReadOptions, skipped: Counter[str]) -> list[InputFile]:
    """The files below a folder, sorted by their paths relative to it.

    Links to files inside the folder are read as files; links to folders, and links that leave the folder, are not
    followed. A file's licence is that of the nearest folder at or above it (not above the root) with a licence file.
    Raises DataError where a folder cannot be read.
    """
    files: list[InputFile] = []
    inside = os.path.realpath(root)
    rules = IgnoreRules()
    if options.gitignore and (root / ".git" / "info" / "exclude").is_file():
        rules = rules.with_file("", (root / ".git" / "info" / "exclude").read_bytes())
    waiting = [_Folder(str(root), "", rules, "")]
    while waiting:
        folder = waiting.pop()
        entries = _entries(folder.path)
        here = _entered(folder, entries, options)
        for entry in entries:
            relative = folder.relative + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name in SKIPPED_FOLDERS and (is_folder or entry.name == ".git"):
                continue
            if here.rules.ignores(relative, is_folder):
                skipped["ignored folder" if is_folder else "ignored file"] += 1
            elif is_folder:
                if options.git and git_folder(Path(entry.path), below=inside) is not None:
                    files += git_files(Path(entry.path), f"{readable_name(relative)}/", options, skipped)
                else:
                    waiting.append(_Folder(entry.path, f"{relative}/", here.rules, here.licence))
            elif (size := _size_of_file(entry, inside, skipped)) is not None:
                file = found_file(entry.path, readable_name(relative), size, options, skipped, here.licence)
                files += [] if file is None else [file]
    return sorted(files, key=lambda file: file.name)


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{path}: the folder cannot be read: {error.strerror}") from None


def _entered(folder: _Folder, entries: Iterable[os.DirEntry[str]], options: ReadOptions) -> _Folder:
    """The folder with its own ignore file and licence."""
    rules, licences = folder.rules, dict[str, str]()
    for entry in entries:
        if entry.is_file(follow_symlinks=False):
            if entry.name == IGNORE_FILE and options.gitignore:
                rules = rules.with_file(folder.relative, _begin(entry.path, _IGNORE_FILE_BYTES))
            elif LICENCE_FILE.match(entry.name):
                content = _begin(entry.path, LICENCE_FILE_BYTES)
                licences[entry.name] = identify_licence(content.decode("utf-8", "replace"))
    return _Folder(folder.path, folder.relative, rules, combined_licence(licences) or folder.licence)


def _begin(path: str, size: int) -> bytes:
    with open_file(path) as raw:
        return raw.read(size)


def _size_of_file(entry: os.DirEntry[str], inside: str, skipped: Counter[str]) -> int | None:
    """The size of a regular file, or None, counted, for what is not to be read."""
    try:
        found = entry.stat()
    except OSError:
        skipped["link that leads nowhere"] += 1  # or into itself
        return None
    if entry.is_symlink():
        if stat.S_ISDIR(found.st_mode):
            skipped["link to a folder"] += 1
            return None
        if not Path(os.path.realpath(entry.path)).is_relative_to(inside):
            skipped["link that leaves the folder"] += 1
            return None
    if not stat.S_ISREG(found.st_mode):
        skipped["not a regular file"] += 1
        return None
    return found.st_size
