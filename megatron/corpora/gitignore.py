"""Which entries of a folder git ignores: .gitignore files, nested, as gitignore(5) has them.

pathspec turns patterns into regular expressions that also match everything below a folder that matches. A walk from the
top asks about each entry alone and never enters an ignored folder, so only matches of the entry itself count here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pathspec.patterns.gitignore.base import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

IGNORE_FILE = ".gitignore"
_FOLDER_MARK = "ps_d"  # pathspec's group for the slash that ends a matched folder


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The patterns that hold in a folder: of its own ignore file and of those above it, the deepest last."""

    files: tuple[tuple[str, tuple[GitIgnoreSpecPattern, ...]], ...] = ()

    def with_file(self, folder: str, content: bytes) -> IgnoreRules:
        """These and the patterns of an ignore file; `folder` is where it lies, "" or ending in a slash."""
        patterns = [_compiled(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
        own = tuple(pattern for pattern in patterns if pattern is not None and pattern.include is not None)
        return IgnoreRules((*self.files, (folder, own))) if own else self

    def ignores(self, path: str, is_folder: bool) -> bool:
        """Whether an entry of a folder that is not itself ignored is; the path is relative to the root."""
        for folder, patterns in reversed(self.files):
            entry = path.removeprefix(folder) + ("/" if is_folder else "")
            for pattern in reversed(patterns):
                if _matches_itself(pattern, entry):
                    return bool(pattern.include)
        return False


def _compiled(line: bytes) -> GitIgnoreSpecPattern | None:
    text = line.removesuffix(b"\r").decode("utf-8", "surrogateescape")
    try:
        return GitIgnoreSpecPattern(text)
    except (GitIgnorePatternError, ValueError):
        return None  # git passes over patterns that mean nothing


def _matches_itself(pattern: GitIgnoreSpecPattern, entry: str) -> bool:
    regex = pattern.regex
    if regex is None:
        return False
    if regex.pattern == f"(?P<{_FOLDER_MARK}>/)":  # `*/`: every folder
        return entry.endswith("/")
    if (match := regex.search(entry)) is None:
        return False
    if match.groupdict().get(_FOLDER_MARK) is not None:
        return match.end(_FOLDER_MARK) == len(entry)
    # `folder/**`: what is in the folder, not the folder
    return not regex.pattern.endswith("/") or match.end() < len(entry)
