"""Trains tokenizers that give every text back exactly: SentencePiece BPE or unigram, and byte-level BPE."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron.config.durable_files import write_whole
from megatron.config.errors import ConfigError, DataError
from megatron.tokenizers.base import looks_like_marker, utf8_of
from megatron.tokenizers.tiktoken_patterns import KNOWN
from megatron.tokenizers.training_sample import CHUNK_CHARACTERS, chunks_of

EOD_NAME = "<|endoftext|>"
SMALLEST_VOCAB = 1 + 1 + 256 + 1  # unknown, end of document, the bytes, and a piece to learn


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
    model_type: Literal["bpe", "unigram"] = "bpe",
    special: Sequence[str] = (),
) -> TrainingReport:
    """Train a model with byte fallback on the first `sample_bytes` UTF-8 bytes of the texts, and publish it whole.

    Nothing is normalised, no space is added, runs of spaces (indentation) and line ends make pieces of their own,
    digits stay single, rare characters fall to bytes: so decode(encode(x)) == x. Ids: 0 unknown (never used), 1 the
    end of a document, then the special names as control pieces, the 256 bytes, and what is learnt. The same texts and
    options give the same file. Raises DataError where there is no text or too little for the vocabulary, ConfigError
    for a vocabulary or special names that cannot be.
    """
    _check(vocab_size, special)
    sample = _Sample(texts, sample_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * CHUNK_CHARACTERS,  # bytes; a character has at most 4
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOD_NAME,
            control_symbols=list(special),
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, sample.total_bytes, vocab_size) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, model.getvalue())
    return TrainingReport(sample.documents, sample.total_bytes, vocab_size)


def train_byte_level_bpe(
    texts: Iterable[str],
    output: Path,
    vocab_size: int,
    *,
    sample_bytes: int = 16_000_000,
    special: Sequence[str] = (),
) -> TrainingReport:
    """Train byte-level BPE on the first `sample_bytes` UTF-8 bytes of the texts: a Hugging Face tokenizer.json.

    Text is cut into words as Qwen2 does, digits one by one. Ids: 0 the end of a document, then the special names, the
    256 bytes, and what is learnt. A tokenizer_config.json that names the end of a document is written beside it. The
    same texts and options give the same files. Raises as `train_sentencepiece` does.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    _check(vocab_size, special)
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(KNOWN["qwen2"].pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_NAME, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = _Sample(texts, sample_bytes)
    tokenizer.train_from_iterator(iter(sample), trainer)
    if not sample.total_bytes:
        raise _no_text()
    if (given := tokenizer.get_vocab_size()) < vocab_size:
        raise _too_little(sample.total_bytes, vocab_size, given)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD_NAME,
        "additional_special_tokens": list(special),
        "clean_up_tokenization_spaces": False,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output.parent / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_whole(output, (tokenizer.to_str(pretty=True) + "\n").encode())
    return TrainingReport(sample.documents, sample.total_bytes, vocab_size)


def _check(vocab_size: int, special: Sequence[str]) -> None:
    for name in special:
        if not looks_like_marker(name) or "," in name or name.startswith("<0x"):
            raise ConfigError(
                f"special name {name!r}: text would become it: give a name in angle brackets, such as <fim_prefix>, "
                "without a comma"
            )
        if name in (EOD_NAME, "<unk>") or special.count(name) > 1:
            raise ConfigError(f"special name {name!r}: the tokenizer has it already: leave it out")
    if vocab_size < (smallest := SMALLEST_VOCAB + len(special)):
        raise ConfigError(f"vocab_size {vocab_size} is too small: the bytes and special pieces need {smallest}")


def _no_text() -> DataError:
    return DataError("no text to train the tokenizer on: every input was empty")


def _too_little(sample_bytes: int, vocab_size: int, most: int) -> DataError:
    return DataError(
        f"{sample_bytes} bytes of text are too few for a vocabulary of {vocab_size}: give more text, or a "
        f"--vocab-size of at most {most}"
    )


def _explained(error: RuntimeError, sample_bytes: int, vocab_size: int) -> Exception:
    if sample_bytes == 0:
        return _no_text()
    if limit := re.search(r"Vocabulary size (?:is )?too high .*<= (\d+)", str(error)):
        return _too_little(sample_bytes, vocab_size, int(limit.group(1)))
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
            for chunk in chunks_of(text):
                yield chunk
                self.total_bytes += len(chunk.encode())
                if self.total_bytes >= self._limit:
                    return
