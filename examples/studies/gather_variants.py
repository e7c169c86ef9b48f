"""Gathers two other kinds of code for the toy studies, from this machine: C and C++ headers, and documented Python.

headers.jsonl: the headers that the installed packages bring (PyTorch's above all), without the comment at their top.
documented.jsonl: Python files as they are, docstrings and comments included. Only files that gave nothing to the
corpora of examples/demo/gather.py are taken, so that no document is in two corpora.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

from machine_files import find_files

from megatron.commands.frame import run_command
from megatron.config.errors import ConfigError, DataError
from megatron.config.quantities import parse_count

_HEADERS = (".h", ".hpp", ".cuh")
_SMALLEST, _LARGEST = 500, 100_000  # bytes
_LARGEST_SHARE = 0.5  # of a corpus, that one folder of one package may have
_LEADING_COMMENT = re.compile(r"\A\s*(?:/\*.*?\*/\s*|(?://[^\n]*\n\s*)+)", re.DOTALL)

Document = tuple[str, str, str]
"""(folder that it counts for, id, text)."""


def headers() -> Iterator[Document]:
    """Every header below the installed packages and Python's own, in the order of a hash of its id."""
    roots = [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib", "include")]
    found = {
        path.relative_to(root).as_posix(): path
        for root in dict.fromkeys(roots)
        for folder, _, names in os.walk(root)
        for path in (Path(folder, name) for name in names if name.endswith(_HEADERS))
        if not path.is_symlink() and _SMALLEST <= path.stat().st_size <= _LARGEST
    }
    for name in sorted(found, key=_mixed):
        if (text := read_text(found[name])) is not None:
            # of torch/include/ATen/ops/x.h "torch/include/ATen/ops": thousands of files there are nearly the same
            yield name.rpartition("/")[0], name, without_top_comment(text)


def documented(taken: set[str]) -> Iterator[Document]:
    """Python files with all that is in them, but those whose ids are taken."""
    for file in find_files():
        if file.kind == "python" and file.id not in taken and os.path.getsize(file.path) <= _LARGEST:
            text = read_text(Path(file.path))
            if text is not None and '"""' in text and max(map(len, text.split("\n"))) <= 1000:
                yield file.package, file.id, text


def without_top_comment(source: str) -> str:
    """C or C++ without the comment that it begins with, which mostly is a licence."""
    return _LEADING_COMMENT.sub("", source, count=1)


def _mixed(name: str) -> bytes:
    return hashlib.blake2b(name.encode()).digest()


def read_text(path: Path) -> str | None:
    """A file as text; None where it is short, no UTF-8, or cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) >= _SMALLEST and "\x00" not in text else None


def write(path: Path, documents: Iterator[Document], limit: int) -> tuple[int, int]:
    """(documents, bytes of text) written to the file, whole or not at all, each text once; about `limit` bytes at most.

    Raises DataError where there is none.
    """
    by_folder: Counter[str] = Counter()
    seen: set[bytes] = set()
    count = size = 0
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for folder, name, text in documents:
            if size >= limit:
                break
            key = _mixed(" ".join(text.split()))
            if key in seen or len(text) < _SMALLEST or by_folder[folder] > _LARGEST_SHARE * limit:
                continue
            seen.add(key)
            stream.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            by_folder[folder] += len(text.encode())
            size += len(text.encode())
            count += 1
    if not count:
        raise DataError(f"no {path.stem} was found among the packages of {sys.prefix}")
    os.replace(partial, path)
    return count, size


def ids_of(paths: list[Path]) -> set[str]:
    """The ids of the documents in these JSON lines. Raises DataError where a file is not there."""
    found: set[str] = set()
    for path in paths:
        try:
            with path.open(encoding="utf-8") as lines:
                found |= {json.loads(line)["id"] for line in lines}
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}: run examples/demo/gather.py first") from None
    return found


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, gather, and say what was found."""
    parser = argparse.ArgumentParser(
        prog="gather_variants.py",
        description="Gather C and C++ headers, and Python files with their docstrings, from the files of this machine.",
        epilog="example:\n  python examples/studies/gather_variants.py --output study-toy/corpora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="has code.jsonl and text.jsonl")
    parser.add_argument("--bytes", default="4M", metavar="N", help="of each, about, at most (default: 4M)")
    args = parser.parse_args(argv)
    try:
        limit = parse_count(args.bytes)
    except ValueError as error:
        raise ConfigError(f"--bytes: {error}") from None
    taken = ids_of([args.output / "code.jsonl", args.output / "text.jsonl"])
    for name, documents in (("headers", headers()), ("documented", documented(taken))):
        count, size = write(args.output / f"{name}.jsonl", documents, limit)
        print(f"{args.output / name}.jsonl: {count:,} documents, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
