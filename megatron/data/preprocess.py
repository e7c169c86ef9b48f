"""Corpora to indexed datasets: worker processes tokenize, one process reads and writes, order is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.data.corpus import Document, ReadOptions, ReadProgress, read_corpora
from megatron.data.indexed_dataset import IndexedDatasetWriter, dtype_for_vocab
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer

# Fixed, so that what a worker gets does not depend on how many there are.
_CHUNK_CHARACTERS = 1 << 20
_CHUNK_DOCUMENTS = 4096
_CHUNKS_IN_FLIGHT = 3  # for each worker


@dataclass(frozen=True)
class Progress:
    """How far preprocessing is: bytes read from the disk, and what has been written."""

    bytes_read: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class _Encoded:
    """A chunk of documents as ids, each document ending in the end-of-document id."""

    ids: NDArray[Any]
    lengths: list[int]
    text_bytes: int


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path,
    *,
    workers: int = 1,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Tokenize the inputs, one after another, into `P.bin`, `P.idx` and the manifest `P.json`, and give the manifest.

    The files are byte-identical at any number of workers, and appear whole or not at all, `.idx` last. Documents of
    white space only are left out and counted under `skipped`. Every document ends in the tokenizer's end-of-document
    id. Raises DataError for what cannot be read, an output that exists, or inputs without any text, ConfigError for
    `workers` below 1, UnavailableError where a worker process died.
    """
    if workers < 1:
        raise ConfigError(f"workers = {workers}: at least 1 is needed")
    options = options or ReadOptions()
    model = load_tokenizer(tokenizer)
    read = ReadProgress()
    text_bytes = 0
    with IndexedDatasetWriter(output_prefix, dtype_for_vocab(model.vocab_size), overwrite=overwrite) as writer:
        chunks = _chunks(read_corpora(inputs, options, read), read)
        encoded = _encode_here(model, chunks) if workers == 1 else _encode_in_workers(tokenizer, model, chunks, workers)
        for chunk in encoded:
            writer.add_documents(chunk.ids, chunk.lengths)
            text_bytes += chunk.text_bytes
            if progress is not None:
                progress(Progress(read.bytes_read, writer.document_count, writer.token_count))
        if writer.document_count == 0:
            raise DataError(f"{', '.join(map(str, inputs))}: every document is empty: there is nothing to train on")
        writer.manifest_fields = {
            "bytes_of_text": text_bytes,
            "bytes_per_token": round(text_bytes / writer.token_count, 4),
            "tokenizer": {"name": model.name, "fingerprint": model.fingerprint, "vocab_size": model.vocab_size},
            "options": {
                "text_field": options.text_field,
                "id_field": options.id_field,
                "suffixes": list(options.suffixes),
                "append_eod": True,
            },
            "inputs": [str(path) for path in inputs],
            "skipped": dict(sorted(read.skipped.items())),
        }
        return writer.finish()


def _chunks(documents: Iterable[Document], read: ReadProgress) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for document in documents:
        if not document.text or document.text.isspace():
            read.skip("empty document")
            continue
        texts.append(document.text)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS or len(texts) >= _CHUNK_DOCUMENTS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _encode(tokenizer: Tokenizer, texts: list[str]) -> _Encoded:
    dtype = dtype_for_vocab(tokenizer.vocab_size)
    documents = [np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype) for text in texts]
    return _Encoded(
        ids=np.concatenate(documents),
        lengths=[len(document) for document in documents],
        text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
    )


def _encode_here(tokenizer: Tokenizer, chunks: Iterator[list[str]]) -> Iterator[_Encoded]:
    for texts in chunks:
        yield _encode(tokenizer, texts)


def _encode_in_workers(
    path: str | Path, model: Tokenizer, chunks: Iterator[list[str]], workers: int
) -> Iterator[_Encoded]:
    # Spawned, not forked: the tokenizer libraries run threads of their own, which do not survive a fork.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(path), model.fingerprint),
    )
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for texts in chunks:
            waiting.append(pool.submit(_encode_in_worker, texts))
            if len(waiting) >= workers * _CHUNKS_IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UnavailableError(
            f"one of {workers} worker processes died (killed by the system, most often for lack of memory): nothing "
            "was published. Run it again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# What a worker process holds between its tasks; set once by its initializer, never in the main process.
_worker_state: dict[str, Tokenizer] = {}


def _start_worker(tokenizer_path: str, fingerprint: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    exit_with_parent()
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{tokenizer_path}: the file was changed while preprocessing ran")
    _worker_state["tokenizer"] = tokenizer


def _encode_in_worker(texts: list[str]) -> _Encoded:
    return _encode(_worker_state["tokenizer"], texts)


def exit_with_parent() -> None:
    """In a worker process: end when the process that started it has ended, even by SIGKILL.

    A worker whose parent was killed would wait for its next task for ever.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
