"""How many samples an epoch of a source gives where each is one whole document, and what is left out of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import StageSection
from megatron.data.document_stream import SHORTEST_DOCUMENT, DocumentRule
from megatron.data.permutation import Integers
from megatron.data.source_files import SourceFiles


class PaddedEpoch(NamedTuple):
    """An epoch of a source, padded: `samples` documents that hold `tokens` tokens of its `epoch_tokens`; `too_long` of
    its documents are longer than a sample.
    """

    samples: int
    tokens: int
    epoch_tokens: int
    too_long: int = 0

    def stream_tokens(self, samples: int) -> int:
        """Tokens of the source's stream over epochs that so many samples move it by, what is skipped counted; exact for
        whole epochs."""
        return samples * self.epoch_tokens // max(1, self.samples)

    def words(self, rule: DocumentRule) -> str:
        """What it is made of."""
        mean = self.tokens / max(1, self.samples)
        words = f"{self.samples:,} documents an epoch, {1 - mean / rule.seq_length:.0%} of their samples padding"
        if self.too_long:
            done = "left out" if rule.too_long == "drop" else "cut"
            words += f", {self.too_long:,} longer than {rule.seq_length:,} tokens {done}"
        return words


class DocumentCounts(Protocol):
    """What is known of a source's documents before any is read."""

    def epoch(self, rule: DocumentRule, where: str) -> PaddedEpoch:
        """An epoch under a rule. Raises ConfigError, DataError where there is none; `where` names the source."""

    def check(self, rule: DocumentRule, where: str) -> None:
        """Raises ConfigError, DataError where a stage that takes of the source may not read it so."""


class MeasuredDocuments:
    """Of opened files: the documents of the slice that are not held out. piece_tokens: of the source."""

    def __init__(self, files: SourceFiles, piece_tokens: int) -> None:
        self._files = files
        self._piece_tokens = piece_tokens
        self._kept: tuple[Integers, Integers] | None = None

    def kept(self) -> tuple[Integers, Integers]:
        """Numbers of the documents through the source's files, ascending, and their lengths in tokens."""
        if self._kept is None:
            documents = self._files.kept_documents()
            self._kept = documents, self._files.document_lengths(documents)
        return self._kept

    def taken(self, rule: DocumentRule) -> tuple[Integers, Integers]:
        """Numbers of the documents that become samples under a rule, ascending, and how many tokens of each do."""
        documents, lengths = self.kept()
        takes = rule.takes(lengths)
        return documents[takes], np.minimum(lengths[takes], rule.seq_length)

    def epoch(self, rule: DocumentRule, where: str) -> PaddedEpoch:
        """See `DocumentCounts.epoch`."""
        lengths, taken = self.kept()[1], self.taken(rule)[1]
        if not len(taken):
            long = int(np.count_nonzero(lengths > rule.seq_length))
            short = int(np.count_nonzero(lengths < SHORTEST_DOCUMENT))
            raise DataError(
                f"{where}: none of its {len(lengths):,} documents can be a sample: {long:,} are longer than "
                f"{rule.seq_length:,} tokens, and {short:,} have fewer than {SHORTEST_DOCUMENT}. Raise the stage's "
                'seq_length, set its too_long to "truncate", or leave the source out'
            )
        too_long = int(np.count_nonzero(lengths > rule.seq_length))
        return PaddedEpoch(len(taken), int(taken.sum()), int(lengths.sum()), too_long)

    def check(self, rule: DocumentRule, where: str) -> None:
        """See `DocumentCounts.check`."""
        documents, lengths = self.kept()
        too_long = lengths > rule.seq_length
        count, at = int(np.count_nonzero(too_long)), int(lengths.argmax())
        longest = int(lengths[at])
        if count and rule.too_long == "error":
            first = int(np.flatnonzero(too_long)[0])
            raise DataError(
                f"{where}: {count:,} of its {len(lengths):,} documents are longer than a sample of {rule.seq_length:,} "
                f"tokens: the first is document {documents[first]} with {lengths[first]:,}, the longest document "
                f'{documents[at]} with {longest:,}. Set the stage\'s too_long to "drop" or "truncate", or its '
                f"seq_length to {longest} (inspect_data --documents shows them)"
            )
        if rule.seq_length > self._piece_tokens < longest:
            raise ConfigError(
                f"{where}: the stage's seq_length {rule.seq_length} is above its piece_tokens {self._piece_tokens}, at "
                f"which longer documents are cut, and padded samples hold whole ones: set its piece_tokens to at least "
                f"{rule.seq_length}"
            )


class PlannedDocuments:
    """Of a source that is planned by its sizes alone: `documents` of them, None where that is not said."""

    def __init__(self, tokens: int, documents: int | None) -> None:
        self._tokens = tokens
        self._documents = documents

    def epoch(self, rule: DocumentRule, where: str) -> PaddedEpoch:
        """See `DocumentCounts.epoch`. All documents are taken to be of one length."""
        if not self._documents:
            raise ConfigError(
                f"{where}: the stage is padded, so that its length goes by documents, and the source has only a size in"
                " tokens: say how many documents it has (documents = …), or give it data"
            )
        return PaddedEpoch(self._documents, min(self._tokens, self._documents * rule.seq_length), self._tokens)

    def check(self, rule: DocumentRule, where: str) -> None:
        """See `DocumentCounts.check`."""
        length = self._tokens // max(1, self._documents or 1)
        if length > rule.seq_length and rule.too_long != "truncate":
            raise ConfigError(
                f"{where}: its documents have {length:,} tokens on average, more than a sample of {rule.seq_length:,}: "
                'raise the stage\'s seq_length, or set its too_long to "truncate"'
            )


def padded_rule(section: StageSection, seq_length: int, where: str) -> DocumentRule | None:
    """What a padded stage takes; None for a packed one. Raises ConfigError where its sequence length changes."""
    if section.packing != "padded":
        return None
    lengths = {shape.seq_length or seq_length for shape in section.shapes or []} or {seq_length}
    if len(lengths) > 1:
        raise ConfigError(
            f"{where}: it is padded, and its shapes have the sequence lengths {', '.join(map(str, sorted(lengths)))}: "
            "what is too long would change within it. Make a stage of each"
        )
    return DocumentRule(lengths.pop(), section.too_long)


class PaddedEpochs(Mapping[str, PaddedEpoch]):
    """An epoch of each source under a rule, measured when it is first asked for: a stage takes of few sources.

    known: of a stage that has begun, what it was then; sources that it did not know give nothing. `[name]` raises as
    `DocumentCounts.epoch` does.
    """

    def __init__(
        self,
        rule: DocumentRule,
        counts: Mapping[str, DocumentCounts | None],
        where: str,
        known: Mapping[str, PaddedEpoch] | None,
    ) -> None:
        self._rule = rule
        self._counts = counts
        self._where = where
        self._begun = known is not None
        self._known = dict(known or {})

    def __getitem__(self, name: str) -> PaddedEpoch:
        if name not in self._known:
            count = self._counts[name]
            if self._begun or count is None:
                return PaddedEpoch(0, 0, 0)
            self._known[name] = count.epoch(self._rule, f"{self._where}: source {name!r}")
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def check(self, names: Iterable[str]) -> None:
        """Raises where a stage that takes of these sources may not; what a begun one took is past."""
        for name in names:
            count = self._counts[name]
            if count is not None and not self._begun:
                count.check(self._rule, f"{self._where}: source {name!r}")


class PaddedSizes(Mapping[str, int]):
    """Input positions of the samples of an epoch, by source: what a padded stage takes sizes to be."""

    def __init__(self, epochs: PaddedEpochs, seq_length: int) -> None:
        self._epochs = epochs
        self._seq_length = seq_length

    def __getitem__(self, name: str) -> int:
        return self._epochs[name].samples * self._seq_length

    def __iter__(self) -> Iterator[str]:
        return iter(self._epochs)

    def __len__(self) -> int:
        return len(self._epochs)
