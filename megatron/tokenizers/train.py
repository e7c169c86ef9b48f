"""Trains a SentencePiece BPE tokenizer that gives every text back exactly."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron.config.errors import ConfigError, DataError
from megatron.tokenizers.base import utf8_of

EOD_NAME = "<|endoftext|>"
SMALLEST_VOCAB = 1 + 1 + 256 + 1  # unknown, end of document, the bytes, and a piece to learn

_CHUNK_BYTES = 4096


@dataclass(frozen=True)
class TrainingReport:
    """What the tokenizer was trained on."""

    documents: int
    sample_bytes: int
    vocab_size: int


def train_sentencepiece(
    texts: Iterable[str],
    output: Path,
    vocab_size: int,
    *,
    sample_bytes: int = 16_000_000,
    num_threads: int = 1,
    character_coverage: float = 0.9995,
) -> TrainingReport:
    """Train BPE with byte fallback on the first `sample_bytes` UTF-8 bytes of the texts, and publish `output` whole.

    Nothing is normalised, no space is added, runs of spaces (indentation) and line ends make pieces of their own,
    digits stay single, rare characters fall to bytes: so decode(encode(x)) == x. Ids: 0 unknown (never used), 1 the
    end of a document, 2..257 the bytes. The same texts and options give the same file. Raises DataError where there is
    no text or too little for the vocabulary.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(f"vocab_size {vocab_size} is too small: the bytes and special pieces need {SMALLEST_VOCAB}")
    sample = _Sample(texts, sample_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _CHUNK_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOD_NAME,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, sample.total_bytes, vocab_size) from None
    _publish(output, model.getvalue())
    return TrainingReport(sample.documents, sample.total_bytes, vocab_size)


def _explained(error: RuntimeError, sample_bytes: int, vocab_size: int) -> Exception:
    if sample_bytes == 0:
        return DataError("no text to train the tokenizer on: every input was empty")
    if limit := re.search(r"Vocabulary size too high .*<= (\d+)", str(error)):
        return DataError(
            f"{sample_bytes} bytes of text are too few for a vocabulary of {vocab_size}: give more text, or a "
            f"--vocab-size of at most {limit.group(1)}"
        )
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return DataError(
            f"a vocabulary of {vocab_size} is too small for the characters of this text: give a --vocab-size above "
            f"{limit.group(1)}"
        )
    return error


class _Sample:
    """The texts, cut at line ends into chunks that the trainer accepts (it drops longer ones), up to a budget."""

    def __init__(self, texts: Iterable[str], limit: int) -> None:
        self._texts, self._limit = texts, limit
        self.documents = self.total_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self.total_bytes >= self._limit:
                return
            utf8_of(text)
            self.documents += 1
            for chunk in _chunks(text):
                yield chunk
                self.total_bytes += len(chunk.encode())
                if self.total_bytes >= self._limit:
                    return


def _chunks(text: str) -> Iterator[str]:
    gathered: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        # A character is at most 4 bytes, so these parts are within the limit whatever they hold.
        for part in (line[i : i + _CHUNK_BYTES] for i in range(0, len(line), _CHUNK_BYTES)):
            if gathered and size + len(part) > _CHUNK_BYTES:
                yield "".join(gathered)
                gathered, size = [], 0
            gathered.append(part)
            size += len(part)
    if gathered:
        yield "".join(gathered)


def _publish(output: Path, content: bytes) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
