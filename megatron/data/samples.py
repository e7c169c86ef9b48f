"""The stream of samples: mixture, cursors and ledger moved together, one global batch at a time.

`SampleStream` is the whole data position. It is made from a schedule, the sources and a ledger, and nothing else:
no layout, no micro-batch, no worker count (law M3). It imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.ledger import (
    Ledger,
    SourceRecord,
    SourceUse,
    StageRecord,
    add_to_order,
    fingerprint_word,
    order_sums,
)
from megatron.data.mixture import MixtureStream, open_mixture
from megatron.data.schedule import Schedule, TrainingStage
from megatron.data.source_stream import CursorState, EpochSpan, SourceStream
from megatron.data.sources import OpenSource

IGNORED_TARGET = -100


@dataclass(frozen=True)
class Sample:
    """One sample: where it comes from, as half-open input positions within documents."""

    number: int
    training_stage: str
    source: str
    source_id: int
    pieces: list[EpochSpan]


@dataclass(frozen=True)
class SampleTokens:
    """A sample's arrays, each [T]: ids int64, targets int64 (-100: no target), piece numbers int32 from 0 upwards."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    document_ids: npt.NDArray[np.int32]
    source_id: int


class SampleStream:
    """Gives global batches in order, from the position that a ledger says."""

    def __init__(
        self,
        schedule: Schedule,
        sources: Mapping[str, OpenSource],
        ledger: Ledger,
        lr_records: tuple[Mapping[str, Any], ...] = (),
        taken_cursors: Mapping[int, Ledger] | None = None,
    ) -> None:
        self._schedule = schedule
        self._sources = sources
        self._lr_records = lr_records
        self._taken = taken_cursors or {}
        self.ledger = ledger
        self._words = {name: fingerprint_word(source.fingerprint) for name, source in sources.items()}
        self._streams: dict[str, SourceStream] = {}
        self._renew_unused()
        for stage in schedule.stages[max(0, len(ledger.stages) - 1) :]:
            for name in stage.weights.sources:
                sources[name].opened()  # fails now, not at the stage that first needs it
        self._mixture: MixtureStream | None = None
        self._stage: TrainingStage | None = None
        if ledger.stages:
            self._continue_stage()

    @property
    def consumed_samples(self) -> int:
        """Samples given so far, over the whole run."""
        return self.ledger.consumed_samples

    @property
    def finished(self) -> bool:
        """Whether the schedule is at its end."""
        return self.consumed_samples >= self._schedule.samples

    def training_stage(self) -> TrainingStage:
        """The stage of the next batch."""
        return self._schedule.locate(self.consumed_samples)[0]

    def next_batch(self, owned: Collection[int] | None = None) -> list[Sample]:
        """The next global batch, in order.

        `owned` are the positions in the batch whose pieces the caller will load (default: all). The others come with
        no pieces: their cursors move without any look-up. Raises StopIteration at the schedule's end.
        """
        if self.finished:
            raise StopIteration("the schedule is at its end")
        stage = self.training_stage()
        if self._stage is None or self._stage.index != stage.index:
            self._begin_stage(stage)
        assert self._mixture is not None
        first = self.consumed_samples
        chosen = [stage.weights.sources[index] for index in self._mixture.take(stage.global_batch_size).tolist()]
        record = self.ledger.stages[-1]
        cursors = [0] * len(chosen)
        pieces: list[list[EpochSpan]] = [[]] * len(chosen)
        for name in dict.fromkeys(chosen):
            places = [place for place, source in enumerate(chosen) if source == name]
            stream = self._streams[name]
            for turn, place in enumerate(places):
                cursors[place] = stream.state.cursor + turn * stage.seq_length
            if owned is None or any(place in owned for place in places):
                spans = cut_into_samples(
                    stream.take(len(places) * stage.seq_length, stage.seq_length), stage.seq_length
                )
                for place, sample_spans in zip(places, spans, strict=True):
                    pieces[place] = sample_spans
            else:
                stream.skip(len(places), stage.seq_length)
            self._count(record, name, len(places), stage.seq_length)
        record.samples += len(chosen)
        if record.finished:
            self._note_unused(stage, record)
        words = np.array([self._words[name] for name in chosen], dtype=np.uint64)
        numbers = range(first, first + len(chosen))
        add_to_order(self.ledger.order, order_sums(numbers, words, cursors, stage.seq_length))
        return [
            Sample(first + place, stage.name, name, self._sources[name].source_id, pieces[place])
            for place, name in enumerate(chosen)
        ]

    def _note_unused(self, stage: TrainingStage, record: StageRecord) -> None:
        for name, use in record.use.items():
            left = stage.facts[name].cap_tokens - self.ledger.sources[name].lifetime_tokens
            use.unused = left if stage.facts[name].dry != "repeat" and 0 < left < stage.seq_length else 0

    def _count(self, record: StageRecord, name: str, samples: int, seq_length: int) -> None:
        """Enters samples of a source, whose stream has moved past them, into the ledger."""
        use, source = record.use[name], self.ledger.sources[name]
        use.samples += samples
        use.tokens += samples * seq_length
        source.lifetime_tokens += samples * seq_length
        source.cursor = self._streams[name].state.to_json()

    def seek(self, consumed_samples: int) -> None:
        """Moves on to a later sample number of the run, batch by batch boundaries not needed; used to look at data.

        Cursors move without look-ups; the order hash is not kept along the way, so that a stream that was moved so is
        for looking, not for training.
        """
        while self.consumed_samples < consumed_samples:
            stage, offset = self._schedule.locate(self.consumed_samples)
            if self._stage is None or self._stage.index != stage.index:
                self._begin_stage(stage)
            assert self._mixture is not None
            goal = min(stage.samples, consumed_samples - stage.start_sample)
            before = dict(zip(stage.weights.sources, self._mixture.counts, strict=True))
            self._mixture.seek(goal)
            for name, count in zip(stage.weights.sources, self._mixture.counts, strict=True):
                moved = count - before[name]
                self._streams[name].skip(moved, stage.seq_length)
                self._count(self.ledger.stages[-1], name, moved, stage.seq_length)
            self.ledger.stages[-1].samples += goal - offset

    def _begin_stage(self, stage: TrainingStage) -> None:
        """Opens a record in the ledger, applies the stage's cursor policy and starts its mixture."""
        self._take_cursors(stage.index)
        for name, source in self._sources.items():
            # Sources join the ledger when a stage that knows them begins, whether it uses them or not.
            self.ledger.sources.setdefault(name, SourceRecord(**source.identity()))
        self._renew_unused()
        if stage.cursor == "restart":
            self._streams.clear()
            for source_record in self.ledger.sources.values():
                source_record.cursor = CursorState().to_json()
        lr = dict(self._lr_records[stage.index]) if stage.index < len(self._lr_records) else {}
        record = StageRecord(
            name=stage.name,
            start_sample=stage.start_sample,
            start_token=stage.start_token,
            planned_samples=stage.samples,
            seq_length=stage.seq_length,
            global_batch_size=stage.global_batch_size,
            cursor=stage.cursor,
            weights=stage.weights.to_json(),
            sizes={name: fact.epoch_tokens for name, fact in stage.facts.items()},
            used=dict(stage.used_before),
            caps={name: [str(fact.max_epochs), fact.dry] for name, fact in stage.facts.items()},
            lr=lr,
        )
        self._open(stage, None)
        for name in stage.weights.sources:
            record.use[name] = SourceUse(start=self._streams[name].state.to_json())
        if stage.index in self._taken:
            record.taken["cursors"] = self._taken[stage.index].order_hash
        self.ledger.stages.append(record)

    def _renew_unused(self) -> None:
        """Sources that nothing was taken of are what today's config says; so are the groups of those without part."""
        weighted = {name for stage in self.ledger.stages for name in stage.use}
        for name, record in self.ledger.sources.items():
            if name not in self._sources:
                continue
            if record.lifetime_tokens == 0:
                self.ledger.sources[name] = SourceRecord(
                    **self._sources[name].identity(), cursor=CursorState().to_json()
                )
            elif name not in weighted:
                record.group = self._sources[name].group

    def _take_cursors(self, index: int) -> None:
        """Cursors and lifetime tokens from another run's ledger, for the sources that both know by content."""
        other = self._taken.get(index)
        if other is None:
            return
        for name, theirs in other.sources.items():
            if name in self._sources and self._sources[name].identity()["fingerprint"] == theirs.fingerprint:
                mine = SourceRecord(**self._sources[name].identity())
                # A cap counts what this run has trained on itself, too, though the cursor goes back before it.
                known = self.ledger.sources.get(name, mine).lifetime_tokens
                mine.lifetime_tokens, mine.cursor = max(known, theirs.lifetime_tokens), dict(theirs.cursor)
                self.ledger.sources[name] = mine
                self._streams.pop(name, None)

    def _continue_stage(self) -> None:
        record = self.ledger.stages[-1]
        stage = self._schedule.stages[len(self.ledger.stages) - 1]
        record.planned_samples = stage.samples
        self._open(stage, [record.use[name].samples for name in stage.weights.sources])

    def _open(self, stage: TrainingStage, counts: list[int] | None) -> None:
        for name in stage.weights.sources:
            if name not in self._streams:
                state = CursorState.from_json(self.ledger.sources[name].cursor)
                self._streams[name] = self._sources[name].stream(state)
        self._stage = stage
        self._mixture = open_mixture(stage.weights, stage.groups(), counts, horizon=stage.samples)


def cut_into_samples(spans: list[EpochSpan], seq_length: int) -> list[list[EpochSpan]]:
    """The spans of several samples, which end where samples do, as one list for each sample."""
    samples: list[list[EpochSpan]] = []
    current: list[EpochSpan] = []
    filled = 0
    for span in spans:
        current.append(span)
        filled += span.end - span.start
        if filled == seq_length:
            samples.append(joined(current))
            current, filled = [], 0
    return samples


def joined(spans: list[EpochSpan]) -> list[EpochSpan]:
    """Neighbouring spans that go on in the same document of the same epoch made one."""
    result: list[EpochSpan] = []
    for span in spans:
        last = result[-1] if result else None
        if last and (last.epoch, last.document, last.end) == (span.epoch, span.document, span.start):
            result[-1] = EpochSpan(last.epoch, last.document, last.start, span.end)
        else:
            result.append(span)
    return result


def assemble(sample: Sample, source: OpenSource, seq_length: int) -> SampleTokens:
    """Reads a sample. Each target is the next token of the same document; a document's last token has none."""
    tokens = np.empty(seq_length, dtype=np.int64)
    targets = np.full(seq_length, IGNORED_TARGET, dtype=np.int64)
    document_ids = np.empty(seq_length, dtype=np.int32)
    at = 0
    for number, span in enumerate(sample.pieces):
        length = span.end - span.start
        ids = source.tokens_for(span)
        tokens[at : at + length] = ids[:length]
        targets[at : at + len(ids) - 1] = ids[1:]
        document_ids[at : at + length] = number
        at += length
    # A validation window may be shorter than a sample: what is left has no target.
    tokens[at:] = 0
    document_ids[at:] = len(sample.pieces)
    return SampleTokens(tokens, targets, document_ids, sample.source_id)
