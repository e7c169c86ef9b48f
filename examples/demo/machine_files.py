"""Which files of this machine the demo reads: the standard library, the installed packages, and their descriptions."""

from __future__ import annotations

import hashlib
import os
import site
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROSE_ENDINGS = (".md", ".rst", ".txt")
_NOT_PROSE = ("licen", "copying", "notice", "authors", "requirements", "entry_points", "top_level", "record", "credits")
_LARGEST = 400_000
_PASSED_OVER = {"__pycache__", "site-packages", "dist-packages", "_vendor", "_vendored", "node_modules", "pydoc_data"}


@dataclass(frozen=True)
class MachineFile:
    """A file to read. `id` is its place without the machine's folders; `package` is its first part."""

    path: str
    id: str
    package: str
    kind: str  # "python", "prose", "metadata" or "topics"


def find_files() -> list[MachineFile]:
    """Everything the demo may read, in the order it should be: descriptions, then modules, tests last.

    Within a kind the order is that of a hash of the id, so that it mixes packages and is the same on every machine
    with the same packages.
    """
    found = {file.id: file for root, name in _roots() for file in _below(root, name)}
    return sorted(found.values(), key=lambda file: (_rank(file), hashlib.blake2b(file.id.encode()).digest()))


def _roots() -> list[tuple[Path, str]]:
    standard = sysconfig.get_path("stdlib")
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    folders = [(Path(folder).resolve(), "") for folder in dict.fromkeys(installed)]
    return [(Path(standard).resolve(), "python"), *folders]


def _below(root: Path, name: str) -> Iterator[MachineFile]:
    topics = root / "pydoc_data" / "topics.py"
    if name and topics.is_file():
        yield MachineFile(str(topics), f"{name}/pydoc_data/topics", name, "topics")
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _PASSED_OVER and not f.startswith(".")]
        for file in names:
            path = os.path.join(folder, file)
            relative = os.path.relpath(path, root)
            place = f"{name}/{relative}" if name else relative
            kind = _kind(file, folder)
            if kind and not os.path.islink(path) and os.path.getsize(path) <= _LARGEST:
                yield MachineFile(path, place.replace(os.sep, "/"), place.split(os.sep, 1)[0].split("-")[0], kind)


def _kind(name: str, folder: str) -> str:
    lower = name.lower()
    if name.endswith(".py"):
        return "python"
    if name == "METADATA" and folder.endswith(".dist-info"):
        return "metadata"
    if lower.endswith(_PROSE_ENDINGS) and not lower.startswith(_NOT_PROSE) and "license" not in folder.lower():
        return "prose"
    return ""


def _rank(file: MachineFile) -> int:
    if file.kind != "python":
        return 0
    parts = file.id.split("/")
    is_test = any(part in ("test", "tests", "testing") or part.startswith("test_") for part in parts[1:])
    return 2 if is_test else 1
