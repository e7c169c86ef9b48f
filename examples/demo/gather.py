"""Gathers the demo's corpora from this very machine: no download, real code and real prose.

Code: the Python files of the standard library and of the installed packages, without docstrings and comments.
Text: those docstrings and comments, `pydoc`'s topics, the packages' descriptions and documents; prose only.
"""

from __future__ import annotations

import argparse
import ast
import email
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from machine_files import MachineFile, find_files
from prose import paragraphs_of, sameness_key
from python_source import NotUsable, remarks_of, stripped
from tqdm import tqdm

from megatron.commands.frame import run_command
from megatron.config.errors import ConfigError, DataError
from megatron.config.quantities import parse_count
from megatron.preprocessing.processes import exit_with_parent

_FILES_A_TASK = 16
_SHORTEST_CODE, _SHORTEST_TEXT = 200, 300  # characters
_LARGEST_SHARE = 0.15  # of a corpus, that one package may have while others still can fill it
_MOST_COMPRESSIBLE = 7  # code is 3 to 5 times smaller when compressed, tables of data ten times and more
_GENERATED = re.compile(
    r"(?:auto-?(?:matically )?|machine )generated|code generated|do not edit|generated (?:by|from)", re.I
)


@dataclass(frozen=True)
class Gathered:
    """What one file gave: code, paragraphs of prose, or the reason why it gave nothing."""

    id: str
    package: str
    code: str = ""
    paragraphs: tuple[str, ...] = ()
    skipped: str = ""


@dataclass
class Corpus:
    """One output file, filled up to a limit of bytes of text; full packages wait until nothing else is left."""

    name: str
    limit: int
    stream: IO[str]
    documents: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    by_package: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)
    waiting: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.bytes >= self.limit

    def is_new(self, content: str) -> bool:
        """True the first time that this content is seen."""
        key = hashlib.blake2b(content.encode(), digest_size=16).digest()
        new = key not in self.seen
        self.seen.add(key)
        return new

    def offer(self, package: str, document: str, text: str) -> None:
        """Write the document, or keep it back while its package has had its share."""
        if self.by_package[package] > _LARGEST_SHARE * self.limit:
            self.waiting.append((package, document, text))
        else:
            self.write(package, document, text)

    def write(self, package: str, document: str, text: str) -> None:
        """Write the document, if there is room."""
        if self.full:
            return
        self.stream.write(json.dumps({"id": document, "text": text}, ensure_ascii=False) + "\n")
        self.documents += 1
        size = len(text.encode())
        self.bytes += size
        self.by_package[package] += size

    def finish(self) -> None:
        """Fill what is left with the documents that were kept back."""
        for entry in self.waiting:
            self.write(*entry)

    def summary(self) -> dict[str, Any]:
        """Counts for people and for summary.json."""
        largest = dict(self.by_package.most_common(10))
        skipped = dict(sorted(self.skipped.items()))
        return {"documents": self.documents, "bytes": self.bytes, "skipped": skipped, "largest_packages": largest}


def read_files(files: list[MachineFile], with_code: bool) -> list[Gathered]:
    """Runs in a worker: read each file and take it apart."""
    return [_read_file(file, with_code) for file in files]


def _read_file(file: MachineFile, with_code: bool) -> Gathered:
    try:
        source = Path(file.path).read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return Gathered(file.id, file.package, skipped="not UTF-8")
    except OSError:
        return Gathered(file.id, file.package, skipped="cannot be read")
    if file.kind == "python":
        return _read_python(file, source, with_code)
    text = "\n\n".join(_topics(source)) if file.kind == "topics" else source
    if file.kind == "metadata":
        message = email.message_from_string(source)
        text = str(message.get_payload()) or str(message.get("Description", ""))
    return Gathered(file.id, file.package, paragraphs=tuple(paragraphs_of(text)))


def _read_python(file: MachineFile, source: str, with_code: bool) -> Gathered:
    if not source.strip():
        return Gathered(file.id, file.package, skipped="empty")
    if _GENERATED.search(source[:1500]):
        return Gathered(file.id, file.package, skipped="generated")
    if "\x00" in source or max(map(len, source.split("\n"))) > 1000:
        return Gathered(file.id, file.package, skipped="very long lines")
    paragraphs = tuple(dict.fromkeys(p for remark in remarks_of(source) for p in paragraphs_of(remark)))
    if not with_code:
        return Gathered(file.id, file.package, paragraphs=paragraphs)
    try:
        code = stripped(source)
    except NotUsable as reason:
        return Gathered(file.id, file.package, paragraphs=paragraphs, skipped=str(reason))
    if len(code) < _SHORTEST_CODE:
        return Gathered(file.id, file.package, paragraphs=paragraphs, skipped="short")
    if sum(map(str.isalpha, code)) < 0.5 * len("".join(code.split())):
        return Gathered(file.id, file.package, paragraphs=paragraphs, skipped="mostly numbers or symbols")
    if len(code) > _MOST_COMPRESSIBLE * len(zlib.compress(code.encode(), 1)):
        return Gathered(file.id, file.package, paragraphs=paragraphs, skipped="repeats itself (a table)")
    return Gathered(file.id, file.package, code, paragraphs)


def _topics(source: str) -> list[str]:
    tree = ast.parse(source)
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    values = [value for table in tables for value in table.values]
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def in_order(files: list[MachineFile], code: Corpus, workers: int) -> Iterator[list[Gathered]]:
    """What the files gave, in the order of the files, with few tasks under way so that the reader may stop early.

    Once the code corpus is full, files are read for their prose alone, which is much quicker.
    """
    batches = iter([files[i : i + _FILES_A_TASK] for i in range(0, len(files), _FILES_A_TASK)])
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), exit_with_parent)
    waiting: deque[Future[list[Gathered]]] = deque()
    try:
        waiting.extend(pool.submit(read_files, batch, True) for batch in islice(batches, 3 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(read_files, batch, not code.full) for batch in islice(batches, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def add(gathered: Gathered, code: Corpus, text: Corpus) -> None:
    """Put what a file gave into the corpora, each text once."""
    if gathered.skipped and not code.full:
        code.skipped[gathered.skipped] += 1
    elif gathered.code and not code.full:
        if code.is_new(" ".join(gathered.code.split())):
            code.offer(gathered.package, gathered.id, gathered.code)
        else:
            code.skipped["duplicate"] += 1
    if text.full or not gathered.paragraphs:
        return
    paragraphs = [p for p in gathered.paragraphs if text.is_new(sameness_key(p))]
    text.skipped["duplicate paragraphs"] += len(gathered.paragraphs) - len(paragraphs)
    document = "\n\n".join(paragraphs) + "\n"
    if len(document) < _SHORTEST_TEXT:
        text.skipped["short"] += 1
    else:
        text.offer(gathered.package, gathered.id, document)


def gather(output: Path, code_limit: int, text_limit: int, workers: int) -> dict[str, Any]:
    """Write code.jsonl, text.jsonl and summary.json into the folder, each whole or not at all; give the summary."""
    files = find_files()
    output.mkdir(parents=True, exist_ok=True)
    partial = {name: output / f"{name}.jsonl.partial" for name in ("code", "text")}
    read = 0
    with (
        partial["code"].open("w", encoding="utf-8") as code_stream,
        partial["text"].open("w", encoding="utf-8") as text_stream,
        tqdm(total=code_limit + text_limit, unit="B", unit_scale=True, desc="gather", file=sys.stderr) as bar,
    ):
        code, text = Corpus("code", code_limit, code_stream), Corpus("text", text_limit, text_stream)
        for batch in in_order(files, code, workers):
            read += len(batch)
            for gathered in batch:
                add(gathered, code, text)
            bar.set_postfix_str(f"{read} files, {code.documents} + {text.documents} documents", False)
            bar.update(min(code.bytes, code.limit) + min(text.bytes, text.limit) - bar.n)
            if code.full and text.full:
                break
        code.finish()
        text.finish()
        bar.update(min(code.bytes, code.limit) + min(text.bytes, text.limit) - bar.n)
    for corpus in (code, text):
        if not corpus.documents:
            raise DataError(f"no {corpus.name} was found in {len(files)} files of this machine's Python installation")
        os.replace(partial[corpus.name], output / f"{corpus.name}.jsonl")
    summary = {"files_found": len(files), "files_read": read, "code": code.summary(), "text": text.summary()}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, gather, and say what was found."""
    parser = argparse.ArgumentParser(
        prog="gather.py",
        description="Gather a corpus of Python code and one of English prose from the files of this machine.",
        epilog="example:\n  python examples/demo/gather.py --output demo/corpora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="gets code.jsonl and text.jsonl")
    parser.add_argument("--code-bytes", default="30M", metavar="N", help="code to gather at most (default: 30M)")
    parser.add_argument("--text-bytes", default="12M", metavar="N", help="prose to gather at most (default: 12M)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    args = parser.parse_args(argv)
    try:
        limits = parse_count(args.code_bytes), parse_count(args.text_bytes)
    except ValueError as error:
        raise ConfigError(f"--code-bytes, --text-bytes: {error}") from None
    began = time.perf_counter()
    summary = gather(args.output, *limits, max(1, args.workers))
    print(f"{summary['files_read']:,} of {summary['files_found']:,} files, {time.perf_counter() - began:.1f} s")
    for name in ("code", "text"):
        part = summary[name]
        print(f"{args.output / name}.jsonl: {part['documents']:,} documents, {part['bytes'] / 1e6:.1f} MB")
        print("  left out: " + (", ".join(f"{n:,} {reason}" for reason, n in part["skipped"].items()) or "nothing"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
