"""Every format that is read, on real files of this machine: 50 MB of code and 20 MB of prose, through the command.

The oracle reads the staged files itself and knows nothing of readers, parts or indexes: it says what `.bin` must hold,
id by id (the tokenizer is bytes, so that ids are the text), and how many documents there are.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

CODE_BYTES, PROSE_BYTES = 50_000_000, 20_000_000
TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
END = 256


@dataclass(frozen=True)
class Staged:
    """Files copied to one folder, and their texts in the order of their paths."""

    folder: Path
    texts: dict[str, str]


def _candidates(roots: list[Path], suffixes: set[str]) -> Iterator[Path]:
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix in suffixes and path.is_file() and not path.is_symlink():
                yield path


def _stage(folder: Path, roots: list[Path], suffixes: set[str], least: int) -> Staged:
    texts: dict[str, str] = {}
    size = 0
    for number, path in enumerate(_candidates(roots, suffixes)):
        if size >= least:
            break
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not text.strip() or "\0" in text or len(text) > 4_000_000:
            continue
        name = f"{number % 40:02}/{number:06}{path.suffix}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
        texts[name] = text
        size += len(text.encode())
    if size < least:
        pytest.skip(f"this machine holds only {size / 1e6:.0f} of {least / 1e6:.0f} MB of such files")
    return Staged(folder, dict(sorted(texts.items())))


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Staged:
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    return _stage(tmp_path_factory.mktemp("code"), roots, {".py", ".pyi"}, CODE_BYTES)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Staged:
    roots = [Path("/usr/share/doc"), *(Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib"))]
    return _stage(tmp_path_factory.mktemp("prose"), roots, {".md", ".rst", ".txt", ".html"}, PROSE_BYTES)


def _lines(staged: Staged) -> bytes:
    return b"".join(
        json.dumps({"id": name, "text": text, "kind": "real"}, ensure_ascii=len(name) % 2 == 0).encode() + b"\n"
        for name, text in staged.texts.items()
    )


def _members(content: bytes, parts: int) -> Iterator[bytes]:
    """Pieces cut anywhere: readers must not care where a member or frame ends."""
    step = len(content) // parts + 1
    for start in range(0, len(content), step):
        yield content[start : start + step]


def _written(staged: Staged, kind: str, folder: Path) -> list[str]:
    """The corpus in one format; gives the words of the command that name it."""
    if kind == "tree":
        return ["--input", str(staged.folder)]
    if kind == "glob":
        return ["--input", *(f"{staged.folder}/{n}/*" for n in sorted({name[:2] for name in staged.texts}))]
    if kind == "list":
        listed = folder / "files.txt"
        listed.write_text("".join(f"{staged.folder / name}\n" for name in staged.texts))
        return ["--files-from", str(listed)]
    if kind == "git":
        return ["--git", "--input", str(_repository(staged, folder))]
    path = folder / f"corpus.{kind}"
    if kind == "parquet":
        table = pyarrow.table({"text": list(staged.texts.values()), "id": list(staged.texts)})
        pyarrow.parquet.write_table(table, path, row_group_size=500)
    elif kind == "jsonl":
        path.write_bytes(_lines(staged))
    elif kind == "jsonl.gz":
        path.write_bytes(b"".join(gzip.compress(part, 1) for part in _members(_lines(staged), 5)))
    else:
        frames = zstandard.ZstdCompressor(level=3)
        path.write_bytes(b"".join(frames.compress(part) for part in _members(_lines(staged), 5)))
    return ["--input", str(path)]


def _repository(staged: Staged, folder: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = folder / "repository"
    shutil.copytree(staged.folder, root)
    (root / "untracked.py").write_text("print('never read')\n")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.autocrlf=false"]
    for words in (
        ["init", "-q"],
        ["add", "--", *sorted({name[:2] for name in staged.texts})],
        ["commit", "-qm", "all"],
    ):
        subprocess.run([*git, *words], check=True, timeout=300)
    return root


def _expected(staged: Staged) -> np.ndarray:
    parts = [np.append(np.frombuffer(text.encode(), np.uint8).astype(np.uint16), END) for text in staged.texts.values()]
    return np.concatenate(parts).astype(np.uint16)


KINDS = ["tree", "glob", "list", "git", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corpus", ["code", "prose"])
def test_real_files_come_back_id_by_id(kind: str, corpus: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    staged: Staged = request.getfixturevalue(corpus)
    words = _written(staged, kind, tmp_path)
    command = [sys.executable, str(TOOL), *words, "--output-prefix", str(tmp_path / "out"), "--tokenizer", "bytes"]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    expected = _expected(staged)
    found = np.fromfile(tmp_path / "out.bin", "<u2")
    assert found.shape == expected.shape and (found == expected).all()
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["documents"] == len(staged.texts)
    assert manifest["tokens"] == len(expected)
    assert manifest["bytes_of_text"] == sum(len(text.encode()) for text in staged.texts.values())
