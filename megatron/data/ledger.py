"""The ledger: what has been trained on, by training stage and source, and in which order (law M5).

Kept in every checkpoint as JSON. With it the data position is complete: counts of the mixture, cursors of the sources
and a running hash of the order. The hash is two sums modulo 2^64 of a mix of (sample number, source fingerprint,
cursor, length), so that it does not depend on who loaded which sample: ranks add theirs and sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from megatron.data.permutation import GOLDEN, Words, derive_key, mix64_array
from megatron.data.stage_shapes import StageShapes
from megatron.data.weight_function import WeightFunction

ALGORITHM = 1
_MASK = 2**64 - 1


@dataclass
class SourceUse:
    """What one training stage has taken of one source. `start` is the cursor state when the stage began; `unused` are
    the tokens below one sample that the source's cap left when the stage ended.

    Of a padded stage: `tokens` are input positions that hold a token, `padding` those that hold none · skipped: tokens
    that were passed over or cut off, skipped_documents: documents of which nothing was taken, truncated: documents that
    were cut.
    """

    samples: int = 0
    tokens: int = 0
    unused: int = 0
    skipped: int = 0
    displaced: int = 0
    start: dict[str, int] = field(default_factory=dict)
    padding: int = 0
    skipped_documents: int = 0
    truncated: int = 0


@dataclass
class StageRecord:
    """A begun training stage, as it was resolved when it began, and what it has taken so far.

    planned_samples: its length, which may be edited while it runs · resolved_samples: the length that its weights were
    resolved for when it began, which never changes: phases and ramps stay where they were · shapes: rows of start,
    sequence length and batch · fim: by source, the rate of fill-in-the-middle and its share with the suffix first ·
    run_tokens: `train.tokens` when it began · fim_sentinels: ids of prefix, middle and suffix, where there is a rate ·
    objective: `StageObjective.to_json`, empty where the loss is on every token · packing: `packing_words`, and padded:
    of each source the samples, their tokens and all tokens of an epoch.
    """

    name: str
    start_sample: int
    start_token: int
    planned_samples: int
    shapes: list[list[int]]
    shape_words: str
    cursor: str
    weights: dict[str, Any]
    sizes: dict[str, int]
    used: dict[str, int]
    caps: dict[str, list[str]]
    fim: dict[str, list[str]]
    lr: dict[str, Any]
    run_tokens: int | None = None
    fim_sentinels: list[int] = field(default_factory=list)
    taken: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    use: dict[str, SourceUse] = field(default_factory=dict)
    resolved_samples: int = 0
    objective: dict[str, Any] = field(default_factory=dict)
    packing: str = "packed"
    padded: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.resolved_samples = self.resolved_samples or self.planned_samples

    @property
    def finished(self) -> bool:
        """Whether every planned sample is consumed."""
        return self.samples >= self.planned_samples

    @property
    def stage_shapes(self) -> StageShapes:
        """Its sequence lengths and batches."""
        return StageShapes.from_json(self.shapes)


@dataclass
class SourceRecord:
    """A source that a begun stage knows: what identifies its content, and where it stands."""

    group: str
    fingerprint: str
    epoch_tokens: int
    piece_tokens: int
    lifetime_tokens: int = 0
    cursor: dict[str, int] = field(default_factory=dict)

    @property
    def epochs(self) -> Fraction:
        """Epochs trained on over the whole run."""
        return Fraction(self.lifetime_tokens, max(1, self.epoch_tokens))


@dataclass
class Ledger:
    """Everything that the order of samples depends on, and everything that has been consumed."""

    seed: int
    tokenizer: str
    validation: str
    algorithm: int = ALGORITHM
    stages: list[StageRecord] = field(default_factory=list)
    sources: dict[str, SourceRecord] = field(default_factory=dict)
    order: list[int] = field(default_factory=lambda: [0, 0])
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def consumed_samples(self) -> int:
        """Samples consumed over the whole run."""
        return sum(stage.samples for stage in self.stages)

    @property
    def consumed_tokens(self) -> int:
        """Input positions consumed over the whole run."""
        return sum(stage.stage_shapes.tokens_at(stage.samples) for stage in self.stages)

    @property
    def consumed_steps(self) -> int:
        """Optimizer steps done over the whole run."""
        return sum(stage.stage_shapes.batches_at(stage.samples) for stage in self.stages)

    @property
    def order_hash(self) -> str:
        """The running hash of the order, in hexadecimal."""
        return hash_words(self.order)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, independent of later changes of the ledger."""
        record = asdict(self)
        record["order"] = self.order_hash
        record["consumed_samples"] = self.consumed_samples
        record["consumed_tokens"] = self.consumed_tokens
        record["consumed_steps"] = self.consumed_steps
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Ledger:
        """The inverse of `to_json`."""
        stages = []
        for row in record["stages"]:
            use = {name: SourceUse(**taken) for name, taken in row["use"].items()}
            stages.append(StageRecord(**{**row, "use": use}))
        return Ledger(
            seed=record["seed"],
            tokenizer=record["tokenizer"],
            validation=record["validation"],
            algorithm=record["algorithm"],
            stages=stages,
            sources={name: SourceRecord(**row) for name, row in record["sources"].items()},
            order=[int(record["order"][:16], 16), int(record["order"][16:], 16)],
            events=list(record["events"]),
        )


def order_sums(numbers: Sequence[int], fingerprints: Words, cursors: Sequence[int], length: int) -> tuple[int, int]:
    """What a batch of samples adds to the two sums of the order hash.

    Args:
        numbers: global sample numbers.
        fingerprints: 64-bit key of each sample's source, from `fingerprint_word`.
        cursors: stream position of each sample in its source, in tokens.
        length: input positions of a sample.
    """
    sums = []
    for salt in (GOLDEN, 0xC2B2AE3D27D4EB4F):
        words = mix64_array(np.asarray(numbers, dtype=np.uint64) + np.uint64(salt))
        words = mix64_array(words ^ fingerprints)
        words = mix64_array(words + np.asarray(cursors, dtype=np.uint64) * np.uint64(salt | 1))
        words = mix64_array(words ^ np.uint64(length))
        sums.append(int(np.sum(words, dtype=np.uint64)))
    return sums[0], sums[1]


def hash_words(order: Sequence[int]) -> str:
    """The two sums of an order hash in hexadecimal."""
    return "".join(f"{word:016x}" for word in order)


def add_to_order(order: list[int], sums: tuple[int, int]) -> None:
    """Adds a batch to a running order hash, modulo 2^64."""
    order[0] = (order[0] + sums[0]) & _MASK
    order[1] = (order[1] + sums[1]) & _MASK


def fingerprint_word(fingerprint: str) -> int:
    """A source's fingerprint as a 64-bit word for the order hash."""
    return derive_key("order", fingerprint)


def ledger_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """The ledger as a table: one row for each begun stage and source, with target and error in samples."""
    rows = []
    for stage in ledger.stages:
        weights = WeightFunction.from_json(stage.weights)
        for name in sorted({*stage.use, *weights.sources}):
            use = stage.use.get(name, SourceUse())
            target = weights.target(name, stage.samples)
            record = ledger.sources[name]
            rows.append(
                {
                    "training_stage": stage.name,
                    "source": name,
                    "group": record.group,
                    "samples": use.samples,
                    "target": float(target),
                    "error": float(use.samples - target),
                    "tokens": use.tokens,
                    "share": use.samples / stage.samples if stage.samples else 0.0,
                    "epochs": use.tokens / record.epoch_tokens if record.epoch_tokens else 0.0,
                }
            )
    return rows
