"""Corpora and independent readers for the tests of preprocessing."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path

SUFFIXES = (".bin", ".idx", ".json")


def texts_of(seed: int, count: int) -> list[str]:
    """Documents of many lengths; some empty, some of white space, some that repeat an earlier one."""
    draw = random.Random(seed)
    words = ["def", "return", "é", "naïve", "x = 1\n", "数", "\t", "<|endoftext|>", "class A:\n    pass\n", " "]
    texts: list[str] = []
    for _ in range(count):
        if texts and draw.random() < 0.1:
            texts.append(draw.choice(texts))
        else:
            texts.append(" ".join(draw.choices(words, k=draw.choice([0, 1, 5, 40, 200]))))
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def byte_ids(text: str) -> list[int]:
    """What the byte tokenizer must give, with its end-of-document id."""
    return [*text.encode(), 256]


def read_indexed(prefix: Path) -> list[list[int]]:
    """The documents of P.bin/P.idx, read with struct as Megatron-LM lays them out; shares no code with ours."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, entries = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    letter, size = {4: ("i", 4), 8: ("H", 2)}[code]
    at = 34
    sizes = struct.unpack_from(f"<{sequences}i", index, at)
    at += 4 * sequences
    pointers = struct.unpack_from(f"<{sequences}q", index, at)
    at += 8 * sequences
    documents = struct.unpack_from(f"<{entries}q", index, at)
    assert at + 8 * entries == len(index)
    content = Path(f"{prefix}.bin").read_bytes()
    assert sum(sizes) * size == len(content)
    rows = [list(struct.unpack_from(f"<{n}{letter}", content, p)) for n, p in zip(sizes, pointers, strict=True)]
    starts = zip(documents, documents[1:], strict=False)
    return [[i for row in rows[low:high] for i in row] for low, high in starts]


def digests(prefix: Path) -> dict[str, str]:
    """The checksum of each published file."""
    return {s: hashlib.sha256(Path(f"{prefix}{s}").read_bytes()).hexdigest() for s in SUFFIXES}


def manifest_of(prefix: Path) -> dict[str, object]:
    manifest: dict[str, object] = json.loads(Path(f"{prefix}.json").read_text())
    return manifest


def first_occurrences(texts: list[str]) -> list[str]:
    """Exact deduplication, the plain way: the first of equal texts; none of white space only."""
    return list(dict.fromkeys(text for text in texts if text.strip()))
