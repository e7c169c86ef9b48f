"""The stream of samples: mixture, cursors and ledger moved together, one global batch at a time.

`SampleStream` is the whole data position. It is made from a schedule, the sources and a ledger, and nothing else:
no layout, no micro-batch, no worker count (law M3). It imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron.data.document_stream import DocumentRule, TakenDocuments, packing_words
from megatron.data.fim import DISPLACED, FimRule, FimSentinels
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
from megatron.data.permutation import Integers
from megatron.data.schedule import Schedule, TrainingStage
from megatron.data.source_stream import CursorState, EpochSpan, SourceStream
from megatron.data.sources import OpenSource
from megatron.data.stage_shapes import ShapeStep, StageShapes

_PASSED_AT_ONCE = 1 << 16  # documents


@dataclass(frozen=True)
class Sample:
    """One sample: where it comes from, as half-open input positions within documents.

    fim: numbers of the pieces that `fim_rule` rearranges when the sample is read · masked: only those of its targets
    count that the source's loss mask marks · cursor: where it stands in its source's stream, in tokens · padded: it is
    one document, and what that leaves of the sample is filled with padding_id.
    """

    number: int
    training_stage: str
    source: str
    source_id: int
    pieces: list[EpochSpan]
    fim: tuple[int, ...] = ()
    fim_rule: FimRule | None = None
    masked: bool = False
    cursor: int = 0
    padded: bool = False
    padding_id: int = 0


class _Taken(NamedTuple):
    """Of a sample, what its source's stream gave: see `Sample`."""

    pieces: list[EpochSpan]
    fim: tuple[int, ...]
    cursor: int


def record_of(stage: TrainingStage, lr: Mapping[str, Any], run_tokens: int | None) -> StageRecord:
    """What the ledger keeps of a stage as it was resolved when it begins; it has taken nothing yet. lr: of its law."""
    return StageRecord(
        name=stage.name,
        start_sample=stage.start_sample,
        start_token=stage.start_token,
        planned_samples=stage.samples,
        shapes=stage.shapes.to_json(),
        shape_words=stage.shape_words,
        cursor=stage.cursor,
        weights=stage.weights.to_json(),
        sizes={name: fact.epoch_tokens for name, fact in stage.facts.items()},
        used=dict(stage.used_before),
        caps={name: [str(fact.max_epochs), fact.dry] for name, fact in stage.facts.items()},
        fim={name: rates.to_json() for name, rates in stage.fim.items()},
        lr=dict(lr),
        run_tokens=run_tokens,
        objective=stage.objective.to_json(),
        packing=packing_words(stage.documents),
        padded={name: list(epoch) for name, epoch in stage.padded.items()},
    )


class SampleStream:
    """Gives global batches in order, from the position that a ledger says."""

    def __init__(
        self,
        schedule: Schedule,
        sources: Mapping[str, OpenSource],
        ledger: Ledger,
        lr_records: tuple[Mapping[str, Any], ...] = (),
        taken_cursors: Mapping[int, Ledger] | None = None,
        fim_sentinels: FimSentinels | None = None,
        padding_id: int = 0,
    ) -> None:
        """padding_id: what fills the rest of padded samples; no result depends on it."""
        self._schedule = schedule
        self._sources = sources
        self._lr_records = lr_records
        self._taken = taken_cursors or {}
        self._fim_sentinels = fim_sentinels
        self._padding_id = padding_id
        self._fim_rules: dict[str, FimRule] = {}
        self.ledger = ledger
        self._words = {name: fingerprint_word(source.fingerprint) for name, source in sources.items()}
        self._streams: dict[str, SourceStream] = {}
        self._renew_unused()
        for stage in schedule.stages[max(0, len(ledger.stages) - 1) :]:
            for name in stage.weights.sources:
                files = sources[name].opened().files  # fails now, not at the stage that first needs it
                if name in stage.objective.masks:
                    _ = files.masks
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

    def shape(self) -> ShapeStep:
        """Sequence length and batch of the next batch."""
        stage = self.training_stage()
        return stage.shape_at(self.consumed_samples - stage.start_sample)

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
        shape = stage.shape_at(first - stage.start_sample)
        chosen = [stage.weights.sources[index] for index in self._mixture.take(shape.global_batch_size).tolist()]
        record = self.ledger.stages[-1]
        taken: list[_Taken] = [_Taken([], (), 0)] * len(chosen)
        for name in dict.fromkeys(chosen):
            places = [place for place, source in enumerate(chosen) if source == name]
            if stage.documents is not None:  # how far a document goes is seen when it is looked up: all ranks do
                given = self._take_documents(name, len(places), stage.documents)
            else:
                look_up = owned is None or any(place in owned for place in places)
                given = self._take_packed(name, len(places), shape.seq_length, look_up)
            for place, one in zip(places, given, strict=True):
                taken[place] = one
                if owned is None or place in owned:
                    record.use[name].displaced += DISPLACED * len(one.fim)
        record.samples += len(chosen)
        if record.finished:
            self._note_unused(stage, record)
        words = np.array([self._words[name] for name in chosen], dtype=np.uint64)
        numbers = range(first, first + len(chosen))
        cursors = [one.cursor for one in taken]
        add_to_order(self.ledger.order, order_sums(numbers, words, cursors, shape.seq_length))
        return [
            Sample(
                first + place,
                stage.name,
                name,
                self._sources[name].source_id,
                taken[place].pieces,
                taken[place].fim,
                self._fim_rules.get(name),
                name in stage.objective.masks,
                cursors[place],
                stage.documents is not None,
                self._padding_id,
            )
            for place, name in enumerate(chosen)
        ]

    def _note_unused(self, stage: TrainingStage, record: StageRecord) -> None:
        if stage.documents is not None:  # what is left are whole documents, which a later stage may take
            return
        below = leftover_bound(stage.shapes)
        for name, use in record.use.items():
            left = stage.facts[name].cap_tokens - self.ledger.sources[name].lifetime_tokens
            use.unused = left if stage.facts[name].dry != "repeat" and 0 < left < below else 0

    def _take_packed(self, name: str, count: int, seq_length: int, look_up: bool) -> list[_Taken]:
        """The next samples of a source, one behind the other in its stream; without pieces where not looked up."""
        stream = self._streams[name]
        cursors = [stream.state.cursor + turn * seq_length for turn in range(count)]
        if look_up:
            rows = stream.take_rows(count * seq_length, seq_length)
            cut = cut_into_samples(rows, seq_length, self._fim_rules.get(name))
        else:
            stream.skip(count, seq_length)
            cut = [([], ())] * count
        self._count(self.ledger.stages[-1], name, count, seq_length)
        return [_Taken(spans, fim, cursor) for (spans, fim), cursor in zip(cut, cursors, strict=True)]

    def _take_documents(self, name: str, count: int, rule: DocumentRule) -> list[_Taken]:
        """The next documents of a source, a sample each."""
        taken, fim = self._streams[name].take_documents(count, rule), self._fim_rules.get(name)
        self._count_documents(self.ledger.stages[-1], name, taken, rule)
        chosen = [False] * count if fim is None else fim.chosen(taken.rows).tolist()
        columns = taken.rows.tolist(), taken.cursors.tolist(), chosen
        return [_Taken([EpochSpan(*row)], (0,) * is_fim, cursor) for row, cursor, is_fim in zip(*columns, strict=True)]

    def _count_documents(self, record: StageRecord, name: str, taken: TakenDocuments, rule: DocumentRule) -> None:
        """Enters documents of a source, whose stream has moved past them, into the ledger."""
        use, source = record.use[name], self.ledger.sources[name]
        use.samples += len(taken.rows)
        use.tokens += taken.tokens
        use.padding += len(taken.rows) * rule.seq_length - taken.tokens
        use.skipped += taken.skipped
        use.skipped_documents += taken.skipped_documents
        use.truncated += taken.truncated
        source.lifetime_tokens += taken.tokens + taken.skipped
        source.cursor = self._streams[name].state.to_json()

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
            shape = stage.shape_at(offset)
            end = stage.shapes.end_of(shape)
            goal = min(stage.samples, consumed_samples - stage.start_sample, stage.samples if end is None else end)
            before = dict(zip(stage.weights.sources, self._mixture.counts, strict=True))
            self._mixture.seek(goal)
            for name, count in zip(stage.weights.sources, self._mixture.counts, strict=True):
                moved = count - before[name]
                if stage.documents is not None:
                    self._pass_documents(name, moved, stage.documents)
                    continue
                self._streams[name].skip(moved, shape.seq_length)
                self._count(self.ledger.stages[-1], name, moved, shape.seq_length)
            self.ledger.stages[-1].samples += goal - offset

    def _pass_documents(self, name: str, count: int, rule: DocumentRule) -> None:
        for start in range(0, count, _PASSED_AT_ONCE):
            taken = self._streams[name].take_documents(min(_PASSED_AT_ONCE, count - start), rule)
            self._count_documents(self.ledger.stages[-1], name, taken, rule)

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
        record = record_of(stage, lr, self._schedule.run_tokens)
        record.fim_sentinels = self._fim_sentinels.ids() if self._fim_sentinels and stage.fim else []
        self._open(stage, None)
        for name in stage.weights.sources:
            skipped = 0 if stage.documents is not None else self._streams[name].leave_documents()
            record.use[name] = SourceUse(start=self._streams[name].state.to_json(), skipped=skipped)
            self.ledger.sources[name].lifetime_tokens += skipped
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
        seed, sentinels = self.ledger.seed, self._fim_sentinels
        self._fim_rules = {
            name: FimRule(seed, self._sources[name].fingerprint, rates, sentinels) for name, rates in stage.fim.items()
        }
        self._stage = stage
        self._mixture = open_mixture(stage.weights, stage.groups(), counts, horizon=stage.samples)


def cut_into_samples(
    rows: Integers, seq_length: int, fim: FimRule | None = None
) -> list[tuple[list[EpochSpan], tuple[int, ...]]]:
    """The rows of several samples, which end where samples do: for each sample its spans, neighbours joined where
    neither is rearranged, and the numbers of the spans that are."""
    chosen = fim.chosen(rows).tolist() if fim is not None else [False] * len(rows)
    samples: list[tuple[list[EpochSpan], tuple[int, ...]]] = []
    spans: list[EpochSpan] = []
    rearranged: list[int] = []
    filled = 0
    for row, is_fim in zip(rows.tolist(), chosen, strict=True):
        span = EpochSpan(*row)
        filled += span.end - span.start
        last = spans[-1] if spans and not is_fim and len(spans) - 1 not in rearranged else None
        if last and (last.epoch, last.document, last.end) == (span.epoch, span.document, span.start):
            spans[-1] = EpochSpan(last.epoch, last.document, last.start, span.end)
        else:
            if is_fim:
                rearranged.append(len(spans))
            spans.append(span)
        if filled == seq_length:
            samples.append((spans, tuple(rearranged)))
            spans, rearranged, filled = [], [], 0
    return samples


def leftover_bound(shapes: StageShapes) -> int:
    """Tokens below which what a cap leaves of a source is too little for another sample: see `dry_sources`."""
    changes, longest = shapes.length_changes, shapes.longest_sequence
    return 2 * changes + 3 * longest if changes else longest
