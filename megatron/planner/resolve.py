"""From a config, and a ledger where the run has begun, to everything that decides the order of samples.

The one place where sources, schedule, learning rate and past are put together; the plan, the witness of the mixture
laws and the trainer all start here, so that none of them can see another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.config.layout_sizes import batch_remedy
from megatron.config.schema import ParallelSection, RunConfig, ValidationSection
from megatron.data.fim import FimSentinels, source_rates
from megatron.data.ledger import Ledger, SourceRecord, StageRecord
from megatron.data.past import Today, check_past, check_words, frozen_stages, match_by_content, record_lr
from megatron.data.samples import SampleStream
from megatron.data.schedule import Schedule, facts_of, resolve_schedule
from megatron.data.sources import OpenSource, TokenizerIdentity, open_sources
from megatron.data.stage_resolution import SourceFacts
from megatron.optim.lr import LRSchedule, resolve_lr
from megatron.planner.document_use import check_document_use
from megatron.planner.ledger_files import read_ledger


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose order of samples is decided. `events` are permitted changes since the ledger was written."""

    sources: Mapping[str, OpenSource]
    schedule: Schedule
    lr: LRSchedule
    ledger: Ledger
    taken_cursors: Mapping[int, Ledger]
    fim_sentinels: FimSentinels | None = None
    events: tuple[dict[str, Any], ...] = ()
    padding_id: int = 0

    def stream(self) -> SampleStream:
        """The samples from the ledger's position on. It moves the ledger: make one stream of a resolved run."""
        records = tuple(law.to_json() for law in self.lr.laws)
        return SampleStream(
            self.schedule,
            self.sources,
            self.ledger,
            records,
            self.taken_cursors,
            self.fim_sentinels,
            self.padding_id,
        )

    def stream_from_start(self) -> SampleStream:
        """The samples from the run's first on, as they were trained on, with a ledger of its own: for looking."""
        taken = dict(self.taken_cursors)
        for number, record in enumerate(self.ledger.stages):
            if "cursors" in record.taken:
                taken[number] = replace(self.ledger, sources=self._at_start_of(record))
        ledger = replace(self.ledger, stages=[], sources={}, order=[0, 0], events=[])
        return SampleStream(
            self.schedule,
            self.sources,
            ledger,
            taken_cursors=taken,
            fim_sentinels=self.fim_sentinels,
            padding_id=self.padding_id,
        )

    def _at_start_of(self, record: StageRecord) -> dict[str, SourceRecord]:
        return {
            name: SourceRecord(
                **self.sources[name].identity(), lifetime_tokens=record.used.get(name, 0), cursor=dict(use.start)
            )
            for name, use in record.use.items()
        }


def validation_split(section: ValidationSection) -> str:
    """What the past knows the held-out documents by."""
    return f"fraction {section.fraction.normalize()}"


def cache_folder(config: RunConfig) -> Path:
    """Where epoch indexes live: `data.cache`, or a folder beside the run's output that all runs there share."""
    return Path(config.data.cache) if config.data.cache else Path(config.run.output).parent / "index-cache"


def resolve_run(
    config: RunConfig,
    *,
    ledger: Ledger | None = None,
    tokenizer: TokenizerIdentity | None = None,
    fim_sentinels: FimSentinels | None = None,
    allow_lr_change: bool = False,
    layout: Layout | None = None,
    opened: Mapping[str, OpenSource] | None = None,
) -> ResolvedRun:
    """Opens the sources and resolves schedule and learning rate.

    Args:
        ledger: of the checkpoint that the run goes on from; None for a new run.
        tokenizer: checked against every source's files where given.
        fim_sentinels: the tokenizer's, where it has them; needed where a tokenizer is given and a stage has a rate.
        allow_lr_change: permits another learning rate in a begun stage; it is recorded as an event.
        layout: over the run's processes, where their number is known; it only decides what errors recommend.
        opened: what `open_run_sources` gave for a config with the same sources, so that they are not opened again.

    Raises ConfigError, DataError, and ChangedPastError where the config contradicts the ledger.
    """
    if ledger is not None:
        check_words(ledger, config.stages, config.sources)
    sources = opened if opened is not None else open_run_sources(config, tokenizer)
    identities = {name: source.identity() for name, source in sources.items()}
    taken = _taken_cursors(config, identities, begun=len(ledger.stages) if ledger is not None else 0)
    schedule = resolve_schedule(
        config.stages,
        _facts(config, sources),
        seq_length=config.model.seq_length,
        global_batch_size=config.train.global_batch_size,
        run_tokens=config.train.tokens,
        begun=frozen_stages(ledger) if ledger is not None else (),
        taken={n: {name: row.lifetime_tokens for name, row in other.sources.items()} for n, other in taken.items()},
        templates=config.templates,
        fim=source_rates({name: section.fim for name, section in config.sources.items()}),
        sources=sources,
    )
    if tokenizer is not None:
        _refuse_fim(schedule, tokenizer.name, fim_sentinels)
    check_batches(schedule, config.train.micro_batch_size, config.parallel, layout)
    lr = resolve_lr(config.stages, schedule)
    (identity, padding), events = (tokenizer.fingerprint, tokenizer.padding_id) if tokenizer else ("", 0), []
    validation = validation_split(config.validation)
    if ledger is None:
        ledger = Ledger(seed=config.run.seed, tokenizer=identity, validation=validation)
    else:
        today = Today(
            seed=config.run.seed,
            tokenizer=identity or ledger.tokenizer,
            validation=validation,
            identities=identities,
            lr=[law.to_json() for law in lr.laws],
            fim_sentinels=fim_sentinels,
        )
        check_past(ledger, schedule, today)
        events = record_lr(ledger, today, allow_lr_change)
    check_document_use(schedule, sources, ledger, taken)
    return ResolvedRun(sources, schedule, lr, ledger, taken, fim_sentinels, tuple(events), padding)


def open_run_sources(config: RunConfig, tokenizer: TokenizerIdentity | None) -> dict[str, OpenSource]:
    """Every source of a config, opened. Raises DataError."""
    return open_sources(
        config.sources,
        seed=config.run.seed,
        seq_length=config.model.seq_length,
        holdout_fraction=config.validation.fraction,
        cache_dir=cache_folder(config),
        tokenizer=tokenizer,
    )


def _facts(config: RunConfig, sources: Mapping[str, OpenSource]) -> dict[str, SourceFacts]:
    sizes = {name: source.epoch_tokens for name, source in sources.items()}
    return facts_of(config.sources, sizes, {name: source.documents for name, source in sources.items()})


def _refuse_fim(schedule: Schedule, tokenizer: str, sentinels: FimSentinels | None) -> None:
    for stage in schedule.stages if sentinels is None else ():
        for name, rates in stage.fim.items():
            raise ConfigError(
                f"stage {stage.name!r}: source {name!r} has a fill-in-the-middle rate of {rates.rate}, and the "
                f"tokenizer {tokenizer} has no sentinels for it: train one with train_tokenizer --fim, name its "
                "prefix, middle and suffix sentinels in tokenizer.fim, or leave fim out"
            )


def _taken_cursors(config: RunConfig, identities: Mapping[str, Mapping[str, Any]], begun: int) -> dict[int, Ledger]:
    """By number of the stage, what stages yet to begin take their cursors from. What a begun one took is in its own
    ledger: the checkpoint that it came from need not exist any more."""
    return {
        number: match_by_content(
            read_ledger(Path(section.take.cursors)), config.run.seed, identities, f"stage {section.name!r}"
        )
        for number, section in enumerate(config.stages)
        if section.take.cursors != "continue" and number >= begun
    }


def check_batches(
    schedule: Schedule, micro_batch_size: int, parallel: ParallelSection, layout: Layout | None = None
) -> None:
    """Raises ConfigError for a training stage whose global batch is not whole microbatches.

    layout: over the processes of the run, where their number is known: what is recommended then fits it, too.
    """
    over = f" x {layout.data} data ranks = {micro_batch_size * layout.data}" if layout and layout.data > 1 else ""
    for stage in schedule.stages:
        for shape in stage.shapes.steps:
            size = shape.global_batch_size
            if size % micro_batch_size:
                axes = (ParallelSection(), Layout()) if layout is None else (parallel, layout)
                raise ConfigError(
                    f"stage {stage.name!r}: global_batch_size {size} is not a multiple of micro_batch_size "
                    f"{micro_batch_size}{over}: set train.global_batch_size to "
                    f"{batch_remedy(*axes, micro_batch_size, size)}"
                )
