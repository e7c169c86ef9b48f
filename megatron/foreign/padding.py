"""Rows that a trainer puts behind the last word, so that tensor ranks hold equally many: how many there can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.errors import CheckpointError, DataError
from megatron.foreign.pieces import StoredTensor, rows_of

DIVISIBLE_BY = "make_vocab_size_divisible_by"
"""Both trainers' argument (`_vocab_size_with_padding` there): words are padded to a multiple of it x tensor ranks."""
_DEFAULT = 128
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Padding:
    """What is known of it. parts: the embedding on each tensor rank. divisible_by: what was said, or the default."""

    parts: Sequence[StoredTensor]
    divisible_by: int

    @property
    def rows(self) -> int:
        """Of the embedding on all ranks, padding included."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def most(self) -> int:
        """So many rows of padding there can be."""
        return self.divisible_by * len(self.parts) - 1

    def check(self, words: int, whose: str) -> None:
        """Raises DataError where more rows than padding can be would be left out. whose: what gave `words`."""
        left = self.rows - words
        if left > self.most:
            raise DataError(
                f"{whose} has {words:,} ids, and the embedding has {self.rows:,} rows: {left:,} would be left out as "
                f"padding, and {DIVISIBLE_BY} {self.divisible_by} x {len(self.parts)} tensor ranks pads by at most "
                f"{self.most:,}: it is not this model's: name another with --tokenizer; if it is, say how many words "
                f"are real with --vocab-size ({self.rows} keeps every row)"
            )

    def doubts(self, words: int) -> str | None:
        """What speaks against the rows from `words` on being padding; None where nothing does.

        Padding is all zero, or one row over and over, where a converter wrote it; a trainer starts it at random.
        """
        left = self.rows - words
        if left > self.most:
            return (
                f"{left:,} rows are left out, and {DIVISIBLE_BY} {self.divisible_by} x {len(self.parts)} tensor ranks "
                f"pads by at most {self.most:,}: real words may be among them"
            )
        if left > 0 and self._differ(words):
            return (
                f"the {left:,} rows left out differ from each other: a trainer's own padding does, and so do real "
                "words: look whether the tokenizer, or --vocab-size, is this model's"
            )
        return None

    def _differ(self, words: int) -> bool:
        first: Tensor | None = None
        for found in self._read(words):
            first = found[:1] if first is None else first
            if not torch.equal(found, first.expand_as(found)):
                return True
        return False

    def _read(self, words: int) -> Iterator[Tensor]:
        for begin in range(words, self.rows, _ROWS_AT_ONCE):
            for piece in rows_of(self.parts, 0, begin, min(_ROWS_AT_ONCE, self.rows - begin)):
                yield piece.read((0,) * len(piece.shape), piece.shape)


def padding_of(parts: Sequence[StoredTensor], said: Mapping[str, Any], where: str) -> Padding:
    """The padding of an embedding that lies in `parts`, by what a trainer's arguments say.

    Raises CheckpointError for a value that is no count.
    """
    value = said.get(DIVISIBLE_BY)
    if value is None:
        value = _DEFAULT
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{where}: {DIVISIBLE_BY} is {repr(value)[:60]}, which is no count: --set {DIVISIBLE_BY}=NUMBER"
        )
    return Padding(parts, value)
