"""Opens the sources of a config: their files, their order, and the checks that only all of them together allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.config.schema import SourceSection
from megatron.data.document_counts import DocumentCounts, MeasuredDocuments, PlannedDocuments
from megatron.data.document_stream import DocumentRule
from megatron.data.epoch_index import SourceOrder, Span, overlapping
from megatron.data.indexed_dataset import IndexedDataset, check_vocab
from megatron.data.loss_mask import has_loss_mask
from megatron.data.source_stream import CursorState, EpochSpan, SourceStream
from megatron.tokenizers.base import Tokenizer

PIECE_SEQUENCES = 8
PADDING_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the checks need of a tokenizer, and the id that fills padded samples: its padding token, where it has one,
    else its end of a document."""

    name: str
    fingerprint: str
    vocab_size: int
    padding_id: int = 0

    @staticmethod
    def of(tokenizer: Tokenizer) -> TokenizerIdentity:
        """That of an opened tokenizer."""
        named = [tokenizer.special_ids[name] for name in PADDING_NAMES if name in tokenizer.special_ids]
        padding_id = named[0] if named else tokenizer.eod_id
        return TokenizerIdentity(tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, padding_id)


@dataclass(frozen=True)
class OpenSource:
    """A source whose files are open, or one that is planned by its size alone (`order` is None).

    has_loss_mask: some of its files say which of their tokens are learned (instruction data).
    """

    name: str
    source_id: int
    section: SourceSection
    piece_tokens: int
    order: SourceOrder | None
    has_loss_mask: bool = False

    @property
    def group(self) -> str:
        """The source's group; its own name where none is said."""
        return self.section.group or self.name

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one epoch: what the slice holds, less what is held out for validation."""
        if self.order is not None:
            return self.order.epoch_tokens
        assert self.section.tokens is not None
        start, end = self.section.slice
        return int(self.section.tokens * (end - start))

    @property
    def fingerprint(self) -> str:
        """Identifies the content, whatever its name and place."""
        return self.order.fingerprint if self.order is not None else f"planned:{self.epoch_tokens}"

    @property
    def is_planned(self) -> bool:
        """Whether it is a size alone, without data."""
        return self.order is None

    @property
    def mask_checksum(self) -> str | None:
        """Identifies its loss masks; None where a file has none."""
        return self.order.files.mask_checksum if self.order is not None else None

    def loss_tokens(self, masked: bool, rule: DocumentRule | None) -> int:
        """Targets of one epoch that count: see `SourceFiles.loss_tokens`; of a source that is planned by its size, all
        its tokens. Raises DataError for bad masks."""
        if self.order is None:
            return self.epoch_tokens
        return self.opened().files.loss_tokens(masked, rule)

    @cached_property
    def documents(self) -> DocumentCounts:
        """How many samples its documents are in padded stages; read from its files when that is first asked."""
        if self.order is not None:
            return MeasuredDocuments(self.order.files, self.piece_tokens)
        return PlannedDocuments(self.epoch_tokens, self.planned_documents)

    @property
    def planned_documents(self) -> int | None:
        """Documents in the slice of a source that is planned by sizes alone; None where their number is not said."""
        start, end = self.section.slice
        return None if self.section.documents is None else int(self.section.documents * (end - start))

    def identity(self) -> dict[str, Any]:
        """What the past knows a source by."""
        return {
            "group": self.group,
            "fingerprint": self.fingerprint,
            "epoch_tokens": self.epoch_tokens,
            "piece_tokens": self.piece_tokens,
        }

    def stream(self, state: CursorState | None) -> SourceStream:
        """The source's stream from a state on; from its beginning where there is none."""
        last = None
        if self.section.dry != "repeat":
            last = max(0, -int(-self.section.max_epochs // 1) - 1)
        return SourceStream(self.opened(), state or CursorState(), last_epoch=last)

    def opened(self) -> SourceOrder:
        """The order over its files. Raises DataError for a source that is planned by its size alone."""
        if self.order is None:
            raise DataError(
                f"source {self.name!r} has a size (tokens = …) and no data: training needs "
                f"sources.{self.name}.data = [prefixes of .bin/.idx]"
            )
        return self.order

    def tokens_for(self, span: EpochSpan | Span) -> npt.NDArray[np.integer]:
        """The ids of a span, and one more where its document goes on."""
        return self.opened().tokens_for(Span(span.document, span.start, span.end))


def open_sources(
    sections: Mapping[str, SourceSection],
    *,
    seed: int,
    seq_length: int,
    holdout_fraction: Decimal,
    cache_dir: Path | None,
    tokenizer: TokenizerIdentity | None = None,
) -> dict[str, OpenSource]:
    """Every source by name.

    Args:
        sections: `[sources.…]`; a source that has data is opened, one that has only `tokens` is planned with.
        seq_length: the model's; long documents are cut at 8 times this unless the source says otherwise.
        holdout_fraction: share of the documents kept for validation.
        cache_dir: folder of the epoch indexes; None: they are built in memory.
        tokenizer: checked against every file's manifest and ids, where given.

    Raises DataError for files that are missing, broken or made by another tokenizer, and for sources that share
    documents without allow_overlap.
    """
    opened: dict[str, OpenSource] = {}
    for source_id, name in enumerate(sorted(sections)):
        section = sections[name]
        piece_tokens = section.piece_tokens or PIECE_SEQUENCES * seq_length
        order, masked = None, False
        if section.data:
            files = [IndexedDataset(prefix) for prefix in section.data]
            for file in files:
                _check_tokenizer(name, file, tokenizer)
            masked = any(has_loss_mask(file.manifest) for file in files)
            order = SourceOrder(
                files,
                seed=seed,
                piece_tokens=piece_tokens,
                cache_dir=cache_dir,
                document_slice=section.slice,
                holdout_fraction=holdout_fraction,
            )
        opened[name] = OpenSource(name, source_id, section, piece_tokens, order, masked)
    _check_overlap(opened)
    return opened


def _check_tokenizer(name: str, file: IndexedDataset, tokenizer: TokenizerIdentity | None) -> None:
    if tokenizer is None:
        return
    made_with = (file.manifest or {}).get("tokenizer")
    if made_with and made_with["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"source {name!r}: {file.prefix}.bin was tokenised by {made_with['name']} "
            f"({made_with['fingerprint'][:12]}…), the config's tokenizer is {tokenizer.name} "
            f"({tokenizer.fingerprint[:12]}…): set tokenizer.path to the first, or preprocess the corpus again"
        )
    check_vocab(file, tokenizer.vocab_size)


def _check_overlap(opened: Mapping[str, OpenSource]) -> None:
    for one, other in combinations(opened.values(), 2):
        if one.order is None or other.order is None:
            continue
        allowed = one.section.allow_overlap or other.section.allow_overlap
        if not allowed and overlapping(one.order, other.order):
            raise DataError(
                f"sources {one.name!r} and {other.name!r} hold the same documents, so that their tokens would be "
                "trained on twice: give them disjoint slices, drop one, or set allow_overlap = true on one of them"
            )
