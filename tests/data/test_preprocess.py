"""What preprocessing writes is each document's tokens and the end-of-document id, in order, at any worker count.

Oracles: the SentencePiece library called document by document, and UTF-8 itself for the byte tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.data import preprocess as module
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.preprocess import Progress, preprocess
from megatron.tokenizers.train import train_sentencepiece

TEXTS = [f"def f_{i}(x):\n    return x + {i}\n" * (1 + i % 7) + "é <|endoftext|>" * (i % 3) for i in range(300)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[:50], "", " \n", *TEXTS[50:]]))
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 2000)


def test_tokens_are_the_librarys_and_worker_counts_agree(tmp_path: Path, corpus: Path, small_chunks: None) -> None:
    model = tmp_path / "tokenizer.model"
    train_sentencepiece(TEXTS, model, 300)
    seen: list[Progress] = []
    for workers in (1, 2, 3):
        preprocess([corpus, corpus], tmp_path / f"w{workers}", model, workers=workers, progress=seen.append)
    for suffix in (".bin", ".idx", ".json"):
        assert len({(tmp_path / f"w{workers}{suffix}").read_bytes() for workers in (1, 2, 3)}) == 1
    library = sentencepiece.SentencePieceProcessor(str(model))
    data = IndexedDataset(tmp_path / "w2")
    expected = [[*library.encode(text), library.eos_id()] for text in TEXTS * 2]
    assert [data.tokens(d).tolist() for d in range(data.document_count)] == expected
    assert seen[-1] == Progress(2 * corpus.stat().st_size, 600, data.token_count)
    assert not list(tmp_path.glob("*partial*"))


def test_manifest_states_what_was_done(tmp_path: Path, corpus: Path) -> None:
    manifest = preprocess([corpus], tmp_path / "p", "bytes")
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert json.loads((tmp_path / "p.json").read_text()) == manifest == IndexedDataset(tmp_path / "p").manifest
    expected = {
        "format": 1,
        "documents": 300,
        "tokens": text_bytes + 300,
        "bytes_of_text": text_bytes,
        "dtype": "uint16",
        "bin_bytes": 2 * (text_bytes + 300),
        "bin_sha256": hashlib.sha256((tmp_path / "p.bin").read_bytes()).hexdigest(),
        "idx_sha256": hashlib.sha256((tmp_path / "p.idx").read_bytes()).hexdigest(),
        "max_token_id": 256,
        "inputs": [str(corpus)],
        "skipped": {"empty document": 2},
    }
    assert expected.items() <= manifest.items()
    assert manifest["tokenizer"]["name"] == "bytes" and manifest["tokenizer"]["vocab_size"] == 257


def test_the_text_of_an_end_of_document_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two</s>")
    model = tmp_path / "tokenizer.model"
    train_sentencepiece(TEXTS, model, 300)
    preprocess([tmp_path / "a.txt"], tmp_path / "p", model)
    data = IndexedDataset(tmp_path / "p")
    assert data.document_count == 1
    assert data.tokens(0).tolist().count(1) == 1 and data.tokens(0)[-1] == 1


def test_B1_errors_leave_nothing(tmp_path: Path, corpus: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match="no such file"):
        preprocess([corpus, tmp_path / "none"], tmp_path / "p", "bytes", workers=2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 1}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    for workers in (1, 2):
        with pytest.raises(DataError, match="bad.jsonl: line 2"):
            preprocess([bad], tmp_path / "p", "bytes", workers=workers)
    with pytest.raises(DataError, match="every document is empty"):
        preprocess([empty], tmp_path / "p", "bytes")
    with pytest.raises(ConfigError, match="workers"):
        preprocess([corpus], tmp_path / "p", "bytes", workers=0)
    assert set(tmp_path.iterdir()) == before | {bad, empty}
    preprocess([corpus], tmp_path / "p", "bytes")
    with pytest.raises(ConfigError, match="exists already.*--overwrite"):
        preprocess([corpus], tmp_path / "p", "bytes")
    preprocess([corpus], tmp_path / "p", "bytes", overwrite=True)


def test_a_dead_worker_ends_the_run(tmp_path: Path, corpus: Path, small_chunks: None) -> None:
    def kill_a_child(_: Progress) -> None:
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    with pytest.raises(UnavailableError, match="fewer --workers"):
        preprocess([corpus] * 40, tmp_path / "p", "bytes", workers=2, progress=kill_a_child)
    assert not list(tmp_path.glob("p.*"))


def children_of(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listing.read_text().split()] if listing.exists() else []


def test_workers_do_not_outlive_a_killed_run(tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\nfrom megatron.data.preprocess import preprocess\n"
        "if __name__ == '__main__':\n"
        "    preprocess([sys.argv[1]], sys.argv[2], 'bytes', workers=2, progress=lambda _: time.sleep(60))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script), str(corpus), str(tmp_path / "p")], env=environment)
    deadline = time.monotonic() + 60
    try:
        while not (tmp_path / "p.bin.partial").exists() or len(children_of(process.pid)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        workers = children_of(process.pid)
    finally:
        process.kill()
        process.wait(30)
    while any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived the killed run"
        time.sleep(0.05)
    assert not (tmp_path / "p.idx").exists()
    preprocess([corpus], tmp_path / "p", "bytes")  # what the killed run left does not stand in the way


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
