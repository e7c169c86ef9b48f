"""Git repositories at HEAD: the tracked files, out of the object store, checked out or not.

Only plumbing runs that looks at objects (`ls-tree`, `cat-file --batch`): no index is refreshed, no filter, text
conversion or hook is run, nothing is fetched. The repository's config can name programs for those; none is reached.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron.config.errors import DataError, UnavailableError
from megatron.corpora.compressed import compression_of, name_inside
from megatron.corpora.formats import JSON_LINES, readable_name, unread_format, wanted_text
from megatron.corpora.languages import language_of
from megatron.corpora.licences import LICENCE_FILE, LICENCE_FILE_BYTES, combined_licence, identify_licence
from megatron.corpora.read_options import InputFile, ReadOptions

# Nothing of the user's environment or config reaches git; these close what a repository's own config could open.
_ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
_SETTINGS = ("core.fsmonitor=false", "core.hooksPath=/dev/null", "protocol.allow=never", "safe.directory=*")
_LINE = re.compile(rb"(\d{6}) (\w+) ([0-9a-f]+) +(\d+|-|BAD)\t(.*)", re.DOTALL)


def git_folder(path: Path, below: str | None = None) -> Path | None:
    """The git folder of a repository, checked out or bare; None where the path is none.

    A `.git` file that leads elsewhere (a worktree, a submodule) counts only if it stays below the folder `below`.
    """
    inner = path / ".git"
    if inner.is_file() or inner.is_dir():
        if below is not None and not _target(inner).is_relative_to(below):
            return None
        return inner
    bare = (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()
    return path if bare else None


def _target(inner: Path) -> Path:
    if inner.is_dir():
        return inner.resolve()
    with inner.open("rb") as raw:
        named = raw.read(4096).decode("utf-8", "surrogateescape").removeprefix("gitdir:").strip()
    return (inner.parent / named).resolve()


def git_files(path: Path, prefix: str, options: ReadOptions, skipped: Counter[str]) -> list[InputFile]:
    """The tracked files of a repository at HEAD, sorted by path; `prefix` goes before their names.

    Symbolic links, submodules, archives and data files are passed over and counted. Raises DataError where the
    repository is damaged or has no commit, UnavailableError where git is missing.
    """
    folder = git_folder(path)
    if folder is None:
        raise DataError(f"{path}: not a git repository")
    listed = _run(folder, "ls-tree", "-r", "-z", "-l", "--full-tree", "HEAD")
    files: list[InputFile] = []
    licence_files: dict[str, dict[str, str]] = {}  # folder: name: object
    for line in listed.split(b"\0")[:-1]:
        if (match := _LINE.fullmatch(line)) is None:
            raise DataError(f"{path}: git ls-tree says something unexpected: {line!r}: is the repository damaged?")
        mode, _, identifier, size, raw_name = match.groups()
        name = raw_name.decode("utf-8", "backslashreplace")
        if mode in (b"120000", b"160000"):
            skipped["link in a git repository" if mode == b"120000" else "submodule"] += 1
            continue
        if not size.isdigit():
            raise DataError(
                f"{folder}: {name}: its object {identifier.decode()} is missing or damaged: "
                "run `git fsck` in the repository"
            )
        above, _, base = name.rpartition("/")
        if LICENCE_FILE.match(base) and int(size) <= LICENCE_FILE_BYTES:
            licence_files.setdefault(above, {})[base] = identifier.decode()
        file = _text_file(folder, prefix + name, int(size), identifier.decode(), options, skipped)
        files += [] if file is None else [file]
    licences = _licences(folder, licence_files)
    return sorted((_licensed(file, prefix, licences) for file in files), key=lambda file: file.name)


def _text_file(
    folder: Path, name: str, size: int, identifier: str, options: ReadOptions, skipped: Counter[str]
) -> InputFile | None:
    if options.suffixes and not name.endswith(options.suffixes):
        return None
    if unread_format(name) or compression_of(name):
        skipped["archive"] += 1
        return None
    if name_inside(name).lower().endswith((*JSON_LINES, ".parquet")):
        skipped["data file in a git repository"] += 1
        return None
    file = InputFile(str(folder), name, "git-blob", size, language_of(name), "", identifier)
    return file if wanted_text(file, options, skipped) else None


def _licences(folder: Path, found: dict[str, dict[str, str]]) -> dict[str, str]:
    if not found:
        return {}
    licences: dict[str, str] = {}
    with Blobs(str(folder)) as blobs:
        for above, names in found.items():
            texts = {name: blobs.read(identifier).decode("utf-8", "replace") for name, identifier in names.items()}
            licences[above] = combined_licence({name: identify_licence(text) for name, text in texts.items()})
    return licences


def _licensed(file: InputFile, prefix: str, licences: dict[str, str]) -> InputFile:
    above = file.name.removeprefix(prefix)
    while above:
        above = above.rpartition("/")[0]
        if licence := licences.get(above):
            return InputFile(file.path, file.name, file.kind, file.size, file.language, licence, file.object_id)
    return file


def _command(folder: str) -> list[str]:
    program = shutil.which("git")
    if program is None:
        raise UnavailableError(
            "git is not installed, and a repository is to be read: install git, or read the files without --git"
        )
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    return [program, "--no-pager", f"--git-dir={folder}", *settings]


def _run(folder: Path, *words: str) -> bytes:
    ended = subprocess.run(
        [*_command(str(folder)), *words], env=_ENVIRONMENT, capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    if ended.returncode:
        said = readable_name(ended.stderr.decode("utf-8", "surrogateescape")).strip()
        if "Not a valid object name HEAD" in said:
            raise DataError(f"{folder}: the repository has no commit at HEAD: there is nothing to read")
        raise DataError(
            f"{folder}: git cannot read the repository: {said or f'exit code {ended.returncode}'}: run `git fsck` in it"
        )
    return ended.stdout


class Blobs:
    """Contents of blobs, one after another, from one git process. Use as a context manager."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed at exit; a pipe would fill and block
        self._git = subprocess.Popen(
            [*_command(folder), "cat-file", "--batch"],
            env=_ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )

    def read(self, identifier: str) -> bytes:
        """The content of a blob. Raises DataError where it is missing or damaged."""
        assert self._git.stdin is not None and self._git.stdout is not None
        try:
            self._git.stdin.write(identifier.encode() + b"\n")
            self._git.stdin.flush()
            header = self._git.stdout.readline().split()
            if len(header) == 3 and header[1] == b"blob":
                size = int(header[2])
                content = self._git.stdout.read(size + 1)
                if len(content) == size + 1:
                    return content[:-1]
        except BrokenPipeError:
            header = []
        self._said.seek(0)
        said = self._said.read(1000).decode("utf-8", "replace").strip() or b" ".join(header).decode("utf-8", "replace")
        raise DataError(f"{self._folder}: object {identifier} cannot be read: {said}: run `git fsck` in the repository")

    def __enter__(self) -> Blobs:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._git.stdin is not None and self._git.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._git.stdin.close()
        self._git.stdout.close()
        self._git.wait()
        self._said.close()


def read_blobs(files: Sequence[InputFile], limit: int) -> Iterator[tuple[InputFile, bytes | None]]:
    """The files' contents in order; None for one larger than `limit`."""
    with Blobs(files[0].path) as blobs:
        for file in files:
            yield file, blobs.read(file.object_id) if file.size <= limit else None
