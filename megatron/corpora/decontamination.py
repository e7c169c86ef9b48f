"""Decontamination: keeping documents that contain parts of evaluation sets out of the training data.

A document that has n words in a row in common with an evaluation item is rejected whole. The default is 13 words, of
lower-case text without punctuation, as for GPT-3 [Brown et al. 2020, arXiv 2005.14165, appendix C], whose authors also
take 8 as the shortest collision for short items; PaLM [Chowdhery et al. 2022, arXiv 2204.02311, section 8] uses
8-grams. Items of fewer than n but at least `shortest` words must occur whole.

The n-grams of the evaluation sets are a sorted array of 64-bit hashes, and their words a vocabulary: a document's words
outside of it end a run at once, so that most text costs one look-up a word.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import DataError
from megatron.corpora.word_hashes import Hashes, hashes_at, mix, segments, window_hashes, words_of


@dataclass(frozen=True, slots=True)
class DecontaminationOptions:
    """Which evaluation sets to keep out, and what counts as containing them.

    files: .jsonl (one JSON object a line) or text files (one item a line).
    fields: of the JSON objects, those to protect; none means every string in them, however deep.
    n: words of an n-gram. shortest: an item of fewer words than this is ignored.
    minimum_matches: a document is rejected with this many n-grams of evaluation sets in it, each place counted.
    minimum_share: … and only where they cover at least this share of its words.
    table: where `prepared` has put the n-grams; not part of the choice.
    """

    files: tuple[str, ...]
    fields: tuple[str, ...] = ()
    n: int = 13
    shortest: int = 8
    minimum_matches: int = 1
    minimum_share: float = 0.0
    table: str = ""

    def to_json(self) -> dict[str, Any]:
        """The choice, with a digest of the evaluation n-grams in place of the files' paths."""
        evaluation = EvaluationSet.open(self)
        return {
            "fields": list(self.fields),
            "n": self.n,
            "shortest": self.shortest,
            "minimum_matches": self.minimum_matches,
            "minimum_share": self.minimum_share,
            "items": evaluation.items,
            "ignored_items": evaluation.ignored,
            "ngrams": evaluation.ngrams,
            "digest": evaluation.digest,
        }

    def prepared(self, folder: Path) -> DecontaminationOptions:
        """These options with `table` naming the n-grams in `folder`, written there if they are not yet."""
        evaluation = EvaluationSet.of_files(self)
        path = folder / f"evaluation-ngrams-{evaluation.digest[:16]}"
        evaluation.write(path)
        return replace(self, table=str(path))


class EvaluationSet:
    """The n-grams of evaluation sets, to be looked for in documents.

    items: how many have n-grams; ignored: how many are too short. ngrams: how many. digest: of all of them.
    """

    def __init__(self, options: DecontaminationOptions, head: Mapping[str, Any], table: Hashes) -> None:
        """`head` and `table` are what `write` keeps: the table has the sorted hashes, then bits of the beginnings."""
        self.items, self.ignored, self.ngrams = int(head["items"]), int(head["ignored"]), int(head["ngrams"])
        self.digest = str(head["digest"])
        self._options, self._head, self._table = options, head, table
        self._hashes, self._beginnings = table[: self.ngrams], table[self.ngrams :].view(np.uint8)
        self._lengths: list[int] = head["lengths"]  # ascending
        self._numbers, self._values = _vocabulary(head["words"])

    @staticmethod
    def open(options: DecontaminationOptions) -> EvaluationSet:
        """From the prepared table, else from the evaluation files. Raises DataError for a file that cannot be read."""
        if not options.table:
            return EvaluationSet.of_files(options)
        path = Path(options.table)
        try:
            head = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return EvaluationSet(options, head, np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}.json, .npy: the prepared evaluation n-grams cannot be read ({error}): delete both files"
            ) from error

    @staticmethod
    def of_files(options: DecontaminationOptions) -> EvaluationSet:
        """From the evaluation files themselves."""
        texts = (text for name in options.files for text in read_items(Path(name), options.fields))
        items = [words for text in texts if (words := words_of(text))]
        kept = [words for words in items if len(words) >= min(options.shortest, options.n)]
        words = sorted({word for item in kept for word in item})
        lengths = sorted({min(len(item), options.n) for item in kept})
        numbers, values = _vocabulary(words)
        grams, beginnings = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for item in kept:
            sequence = values[[numbers[word] for word in item]]
            grams.append(window_hashes(sequence, min(len(item), options.n)))
            beginnings.append(window_hashes(sequence, lengths[0])[: len(grams[-1])])
        hashes = np.unique(np.concatenate(grams))
        content = json.dumps([lengths, words]).encode() + hashes.astype("<u8").tobytes()
        head = {
            "items": len(kept),
            "ignored": len(items) - len(kept),
            "ngrams": len(hashes),
            "lengths": lengths,
            "digest": hashlib.blake2b(content, digest_size=16).hexdigest(),
            "words": words,
        }
        bits = _bits_of(np.unique(np.concatenate(beginnings)))
        return EvaluationSet(options, head, np.concatenate([hashes, bits.view(np.uint64)]))

    def write(self, path: Path) -> None:
        """Publish as path.npy, then path.json, each whole or absent; what is there already stays."""
        if path.with_suffix(".json").exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with aside.open("wb") as file:
                np.save(file, self._table, allow_pickle=False)
            os.replace(aside, path.with_suffix(".npy"))
            aside.write_text(json.dumps(self._head), encoding="utf-8")
            os.replace(aside, path.with_suffix(".json"))
        finally:
            aside.unlink(missing_ok=True)

    def contaminates(self, text: str) -> bool:
        """Whether a document has enough evaluation n-grams in it to be rejected."""
        if not self.ngrams:
            return False
        options = self._options
        reach = self._lengths[-1] - 1  # how many words of the segment before may begin a match
        numbers = np.zeros(0, np.int64)
        matches = covered = total = 0
        for segment in segments(text):
            words = words_of(segment)
            fresh = np.fromiter(map(self._numbers.get, words, repeat(0)), np.int64, len(words))
            kept = min(reach, len(numbers))
            numbers = np.concatenate([numbers[len(numbers) - kept :], fresh])
            found, cover = self._matches(numbers, kept)
            matches, covered, total = matches + found, covered + cover, total + len(fresh)
            if matches >= options.minimum_matches and not options.minimum_share:
                return True
        return matches >= options.minimum_matches and covered >= options.minimum_share * total

    def _matches(self, numbers: NDArray[np.int64], known: int) -> tuple[int, int]:
        """Places of evaluation n-grams that end after the first `known` words, and words that those n-grams cover.

        Words covered both here and in the segment before count twice; only a share of a text of many segments could
        notice.
        """
        shortest = self._lengths[0]
        unknown = np.concatenate([np.zeros(1, np.int64), np.cumsum(numbers == 0)])
        begins = np.flatnonzero(unknown[shortest:] == unknown[:-shortest])
        if not len(begins):
            return 0, 0
        values = self._values[numbers]
        begins = begins[_has_bits(self._beginnings, window_hashes(values, shortest)[begins])]
        places, edges = 0, np.zeros(len(numbers) + 1, np.int64)
        for length in self._lengths if len(begins) else ():
            fit = begins[(begins + length > known) & (begins + length <= len(numbers))]
            fit = fit[unknown[fit + length] == unknown[fit]]
            hashes = hashes_at(values, fit, length)
            where = np.minimum(np.searchsorted(self._hashes, hashes), self.ngrams - 1)
            fit = fit[self._hashes[where] == hashes]
            places += len(fit)
            np.add.at(edges, fit, 1)
            np.add.at(edges, fit + length, -1)
        return places, int(np.count_nonzero(np.cumsum(edges[:-1])))


def _vocabulary(words: Sequence[str]) -> tuple[dict[str, int], Hashes]:
    """The number of each word, from 1, and the value for hashing of each number; 0 is every other word."""
    values = mix(np.arange(len(words) + 1, dtype=np.uint64))
    return {word: number for number, word in enumerate(words, 1)}, values


def _bits_of(hashes: Hashes) -> NDArray[np.uint8]:
    """A bit set of 32 bits or more a hash, in which `_has_bits` looks one up by its upper bits."""
    size = max(12, (32 * len(hashes)).bit_length())
    bits = np.zeros(1 << size, np.bool_)
    bits[hashes >> np.uint64(64 - size)] = True
    return np.packbits(bits, bitorder="little")


def _has_bits(bits: NDArray[np.uint8], hashes: Hashes) -> NDArray[np.bool_]:
    """False for what is surely not in the set, true for what is, and for about 3 % of the rest."""
    places = hashes >> np.uint64(64 - (8 * len(bits)).bit_length() + 1)
    shifted: NDArray[np.uint8] = bits[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8)
    return (shifted & np.uint8(1)).astype(np.bool_)


def read_items(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    """The texts of an evaluation file: strings of JSON objects for .jsonl, lines for any other.

    Raises DataError for a file that cannot be read, a line that is no JSON object, and one without any of the fields.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if path.suffix == ".jsonl" and line.strip():
                    yield from _strings(_record(path, number, line, fields))
                elif path.suffix != ".jsonl":
                    yield line
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the evaluation set cannot be read ({error}): give a UTF-8 .jsonl or text file"
        ) from error


def _record(path: Path, number: int, line: str, fields: tuple[str, ...]) -> Any:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} line {number}: not JSON ({error}): one object a line in an evaluation set") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path} line {number}: {type(record).__name__}, not a JSON object: one a line in an evaluation set"
        )
    if not fields:
        return record
    chosen = {field: record[field] for field in fields if field in record}
    if not chosen:
        there = ", ".join(sorted(record)) or "none"
        raise DataError(f"{path} line {number}: has none of the fields {', '.join(fields)}; its fields are {there}")
    return chosen


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from _strings(member)
    elif isinstance(value, list):
        for member in value:
            yield from _strings(member)
