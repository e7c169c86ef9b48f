"""What preprocessing publishes: each document's tokens and the end-of-document id, in order, whatever way it was made.

Oracles: the SentencePiece library called document by document, UTF-8 itself, and a reader of `.idx` by struct.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece
import zstandard
from preprocessing.corpora import (
    byte_ids,
    digests,
    first_occurrences,
    manifest_of,
    read_indexed,
    texts_of,
    write_jsonl,
)

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.corpora.cleaning import CleaningOptions
from megatron.corpora.read_options import ReadOptions
from megatron.data.indexed_dataset import IndexedDataset
from megatron.preprocessing import sample_check, worker
from megatron.preprocessing.block_queue import Progress
from megatron.preprocessing.merge import merge
from megatron.preprocessing.options import PreprocessOptions, Shard
from megatron.preprocessing.run import preprocess
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.encoder import Encoder, EncoderMismatch
from megatron.tokenizers.train import train_sentencepiece

TEXTS = texts_of(1, 400)
KEPT = [text for text in TEXTS if text.strip()]
SMALL = PreprocessOptions(block_bytes=3000)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def test_bytes_are_equal_at_any_workers_and_block_sizes(tmp_path: Path, corpus: Path) -> None:
    seen: list[Progress] = []
    for workers, block_bytes in ((1, None), (1, 700), (2, 3000), (3, 50_000)):
        prefix = tmp_path / f"w{workers}-{block_bytes}"
        options = PreprocessOptions(block_bytes=block_bytes)
        preprocess([corpus, corpus], prefix, "bytes", workers=workers, options=options, progress=seen.append)
        assert read_indexed(prefix) == [byte_ids(text) for text in KEPT * 2]
        assert seen[-1].bytes_done == seen[-1].bytes_total == 2 * corpus.stat().st_size
        assert seen[-1].documents == 2 * len(KEPT)
    assert len({str(digests(path.with_suffix(""))) for path in tmp_path.glob("*.idx")}) == 1
    assert not [*tmp_path.glob("*partial*"), *tmp_path.glob("*.parts")]


def test_tokens_are_the_librarys(tmp_path: Path, corpus: Path) -> None:
    model = tmp_path / "tokenizer.model"
    train_sentencepiece(KEPT, model, 300)
    outcome = preprocess([corpus], tmp_path / "p", model, options=SMALL)
    library = sentencepiece.SentencePieceProcessor(str(model))
    assert read_indexed(tmp_path / "p") == [[*library.encode(text), library.eos_id()] for text in KEPT]
    assert outcome.parts_made > 5 and outcome.parts_kept == 0 and outcome.peak_memory > 1 << 20


def test_every_format_gives_the_same_documents(tmp_path: Path, corpus: Path) -> None:
    content = corpus.read_bytes()
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "corpus.jsonl.zst").write_bytes(zstandard.compress(content))
    for name in ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst"):
        preprocess([tmp_path / name], tmp_path / "p", "bytes", options=SMALL, overwrite=True)
        assert read_indexed(tmp_path / "p") == [byte_ids(text) for text in KEPT]


def test_manifest_states_what_was_done(tmp_path: Path) -> None:
    records = [
        {"text": "a = 1\n", "language": "Python", "source": "x"},
        {"text": "é", "language": "", "source": "x"},
        {"text": " ", "language": "Python", "source": "y"},
        {"text": "b = 2\n", "language": "Python", "source": "y"},
    ]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    read = ReadOptions(language_field="language", source_field="source")
    outcome = preprocess([corpus], tmp_path / "p", "bytes", options=PreprocessOptions(read, block_bytes=60))
    manifest = manifest_of(tmp_path / "p")
    assert manifest == outcome.manifest == IndexedDataset(tmp_path / "p").manifest
    expected = {
        "format": 1,
        "documents": 3,
        "tokens": 17,
        "bytes_of_text": 14,
        "dtype": "uint16",
        "bin_bytes": 34,
        "bin_sha256": hashlib.sha256((tmp_path / "p.bin").read_bytes()).hexdigest(),
        "idx_sha256": hashlib.sha256((tmp_path / "p.idx").read_bytes()).hexdigest(),
        "max_token_id": 256,
        "inputs": [str(corpus)],
        "skipped": {"blank line": 3, "empty document": 1},
        "counts": {"records": 4, "kept": 3, "rejected": {}, "duplicates": {}, "quarantined": {}},
        "languages": {
            "": {"documents": 1, "bytes_of_text": 2, "tokens": 3, "bytes_per_token": 0.6667},
            "Python": {"documents": 2, "bytes_of_text": 12, "tokens": 14, "bytes_per_token": 0.8571},
        },
        "sources": {
            "x": {"documents": 2, "bytes_of_text": 8, "tokens": 10, "bytes_per_token": 0.8},
            "y": {"documents": 1, "bytes_of_text": 6, "tokens": 7, "bytes_per_token": 0.8571},
        },
    }
    assert expected.items() <= manifest.items()
    assert manifest["input_files"]["list"] == [[str(corpus), corpus.stat().st_size]]
    assert manifest["tokenizer"]["name"] == "bytes" and manifest["tokenizer"]["vocab_size"] == 257


def test_shards_merge_to_the_bytes_of_one_run(tmp_path: Path) -> None:
    inputs = [write_jsonl(tmp_path / f"{n}.jsonl", texts_of(n, 120)) for n in range(3)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(inputs[0].read_bytes()))
    (tmp_path / "notes").mkdir()
    for n in range(20):
        (tmp_path / "notes" / f"{n}.txt").write_text(f"note {n}\n" * n)
    inputs = [inputs[0], tmp_path / "notes", tmp_path / "a.jsonl.gz", *inputs[1:]]
    options = PreprocessOptions(cleaning=CleaningOptions(exact="exact"), block_bytes=3000)
    preprocess(inputs, tmp_path / "one", "bytes", options=options)
    for count in (2, 3, 7):
        prefix = tmp_path / f"of{count}"
        for number in reversed(range(1, count + 1)):
            with pytest.raises(DataError, match=f"{number} of {count} shards are not complete|no parts are here"):
                merge(prefix)
            assert preprocess(inputs, prefix, "bytes", options=options, shard=Shard(number, count)).manifest is None
        merge(prefix)
        assert digests(prefix) == digests(tmp_path / "one")
        assert not Path(f"{prefix}.parts").exists()


def test_missing_shards_are_named_as_sbatch_takes_them(tmp_path: Path, corpus: Path) -> None:
    for number in (2, 6):
        preprocess([corpus], tmp_path / "p", "bytes", options=SMALL, shard=Shard(number, 7))
    with pytest.raises(DataError, match=r"5 of 7 shards are not complete: 1,3-5,7\."):
        merge(tmp_path / "p")
    with pytest.raises(ConfigError, match=r"shards: 7 became 8.*--restart"):
        preprocess([corpus], tmp_path / "p", "bytes", options=SMALL, shard=Shard(1, 8))
    for bad in ("0/4", "5/4", "1", "a/b"):
        with pytest.raises(ConfigError, match="shard"):
            Shard.parse(bad)


def test_exact_duplicates_are_found_across_parts_and_inputs(tmp_path: Path, corpus: Path) -> None:
    options = PreprocessOptions(cleaning=CleaningOptions(exact="exact"), block_bytes=2000)
    expected = first_occurrences(TEXTS)
    for workers in (1, 2):
        preprocess([corpus, corpus], tmp_path / f"{workers}", "bytes", workers=workers, options=options)
        assert read_indexed(tmp_path / f"{workers}") == [byte_ids(text) for text in expected]
    manifest = manifest_of(tmp_path / "1")
    assert manifest["counts"]["duplicates"] == {"exact-duplicate": 2 * len(KEPT) - len(expected)}
    assert manifest["bytes_of_text"] == sum(len(text.encode()) for text in expected)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_the_text_of_an_end_of_document_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two</s>")
    model = tmp_path / "tokenizer.model"
    train_sentencepiece(KEPT, model, 300)
    preprocess([tmp_path / "a.txt"], tmp_path / "p", model)
    (document,) = read_indexed(tmp_path / "p")
    assert document.count(1) == 1 and document[-1] == 1


def test_B1_errors_leave_nothing(tmp_path: Path, corpus: Path) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match="none"):
        preprocess([corpus, tmp_path / "none"], tmp_path / "p", "bytes", workers=2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 1}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    for workers in (1, 2):
        with pytest.raises(DataError, match="bad.jsonl: line 2.*--on-error quarantine"):
            preprocess([bad], tmp_path / "p", "bytes", workers=workers)
    with pytest.raises(ConfigError, match="workers"):
        preprocess([corpus], tmp_path / "p", "bytes", workers=0)
    assert set(tmp_path.iterdir()) == before | {bad, empty}
    with pytest.raises(DataError, match="every document is empty"):
        preprocess([empty], tmp_path / "p", "bytes")
    preprocess([corpus], tmp_path / "p", "bytes", restart=True)
    with pytest.raises(ConfigError, match=r"exists already.*--overwrite"):
        preprocess([corpus], tmp_path / "p", "bytes")
    preprocess([corpus], tmp_path / "p", "bytes", overwrite=True)


def test_the_first_bad_record_of_the_corpus_is_the_one_that_is_told(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    for number in (37, 200, 390):
        lines[number] = "{"
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    for workers in (1, 3):
        with pytest.raises(DataError, match="bad.jsonl: line 38: not JSON"):
            preprocess([path], tmp_path / f"w{workers}", "bytes", workers=workers, options=SMALL)


def test_quarantine_holds_exactly_the_bad_records(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    bad = {5: b"{", 6: b'{"text": "\xff"}', 150: b'{"text": null}', 399: b'{"body": "x"}'}
    for number, line in bad.items():
        lines[number] = line
    content = b"\n".join(lines) + b"\n"
    path, packed = tmp_path / "c.jsonl", tmp_path / "d.jsonl.gz"
    path.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for prefix, shards in (("one", 1), ("three", 3)):
        for number in range(1, shards + 1):
            options = PreprocessOptions(on_error="quarantine", block_bytes=2000)
            preprocess([path, packed], tmp_path / prefix, "bytes", options=options, shard=Shard(number, shards))
    merge(tmp_path / "three")
    assert digests(tmp_path / "three") == digests(tmp_path / "one")
    written = (tmp_path / "one.quarantine.jsonl").read_bytes()
    assert written == (tmp_path / "three.quarantine.jsonl").read_bytes()
    rows = [json.loads(line) for line in written.splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [
        (str(file), number + 1) for file in (path, packed) for number in sorted(bad)
    ]
    for row in rows:
        assert content[row["byte"] :].startswith(bad[row["line"] - 1])
    assert rows[0]["text"] == "{" and "base64" in rows[1] and "not JSON" in rows[0]["reason"]
    assert sum(manifest_of(tmp_path / "one")["counts"]["quarantined"].values()) == 8
    good = [text for number, text in enumerate(TEXTS) if number not in bad and text.strip()]
    assert read_indexed(tmp_path / "one") == [byte_ids(text) for text in good * 2]


class WrongEncoder:
    """Gives another first id for one document only, as a library with a fault would."""

    backend, note = "quick 1.0", ""

    def __init__(self, inner: Encoder) -> None:
        self._inner = inner

    def encode_documents(self, texts: list[str]) -> object:
        ids, lengths = self._inner.encode_documents(texts)
        if any("数" in text for text in texts):
            ids[0] ^= 1
        return ids, lengths


def test_an_encoder_that_differs_is_given_up(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, checked = worker.open_encoder, []

    def opened(tokenizer: Tokenizer, dtype: object, backend: str = "auto", proof: object = None) -> object:
        encoder = real(tokenizer, dtype, "reference")
        return encoder if backend == "reference" else WrongEncoder(encoder)

    def check(encoder: Encoder, tokenizer: Tokenizer, texts: list[str]) -> None:
        checked.append(texts)
        ids, _ = encoder.encode_documents(texts)
        if ids.tolist() != [i for text in texts for i in byte_ids(text)]:
            raise EncoderMismatch(0, 0, int(ids[0]), None)

    monkeypatch.setattr(worker, "open_encoder", opened)
    monkeypatch.setattr(sample_check, "check_sample", check)
    monkeypatch.setattr(worker, "_held", {})
    preprocess([corpus], tmp_path / "plain", "bytes", options=PreprocessOptions(encoder="reference", block_bytes=3000))
    outcome = preprocess([corpus], tmp_path / "p", "bytes", options=SMALL)
    assert checked and "quick 1.0 gave other ids" in outcome.notes[0]
    assert manifest_of(tmp_path / "p")["encoder"]["backend"] == "stagemix bytes"
    assert (tmp_path / "p.bin").read_bytes() == (tmp_path / "plain.bin").read_bytes()
    with pytest.raises(UnavailableError, match="not exact on this corpus"):
        preprocess([corpus], tmp_path / "q", "bytes", options=PreprocessOptions(encoder="fast", block_bytes=3000))


def test_a_mismatch_in_one_shard_makes_the_others_begin_anew(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess([corpus], tmp_path / "p", "bytes", options=SMALL, shard=Shard(1, 2))
    real, wrong = worker.open_encoder, "stagemix bytes"

    class Renamed:
        backend, note = "quick 1.0", ""

        def __init__(self, inner: Encoder) -> None:
            self.encode_documents = inner.encode_documents

    def opened(tokenizer: Tokenizer, dtype: object, backend: str = "auto", proof: object = None) -> object:
        encoder = real(tokenizer, dtype, "reference")
        return encoder if backend == "reference" else Renamed(encoder)

    def refuse(encoder: Encoder, tokenizer: Tokenizer, texts: list[str]) -> None:
        raise EncoderMismatch(0, 0, 1, 2)

    monkeypatch.setattr(worker, "open_encoder", opened)
    monkeypatch.setattr(worker, "_held", {})
    monkeypatch.setattr(sample_check, "check_sample", lambda *_: None)
    preprocess([corpus], tmp_path / "q", "bytes", options=SMALL, shard=Shard(1, 2))
    monkeypatch.setattr(sample_check, "check_sample", refuse)
    preprocess([corpus], tmp_path / "q", "bytes", options=SMALL, shard=Shard(2, 2))
    with pytest.raises(DataError, match=r"1 of 2 shards are not complete: 1\."):
        merge(tmp_path / "q")
    preprocess([corpus], tmp_path / "q", "bytes", options=SMALL, shard=Shard(1, 2))
    assert merge(tmp_path / "q")["encoder"]["backend"] == wrong
    assert read_indexed(tmp_path / "q") == [byte_ids(text) for text in KEPT]
