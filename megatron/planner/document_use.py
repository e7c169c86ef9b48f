"""Whether what packed and padded stages take of one source together stays within its cap.

Where a source is always read one way, that is arithmetic (`stage_resolution`). Where stages read it in both, or padded
with different rules, how much is skipped at each change follows from where its documents lie: its cursor is moved
through the rest of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from math import ceil

from megatron.config.errors import ConfigError
from megatron.data.ledger import Ledger
from megatron.data.samples import SampleStream
from megatron.data.schedule import Schedule
from megatron.data.sources import OpenSource


def check_document_use(
    schedule: Schedule, sources: Mapping[str, OpenSource], ledger: Ledger, taken: Mapping[int, Ledger]
) -> None:
    """Raises ConfigError for a source that the rest of the run, from the ledger's position on, takes past its cap.

    taken: ledgers that stages yet to begin take their cursors from. Nothing is checked before all data are there.
    """
    ahead = schedule.stages[max(0, len(ledger.stages) - 1) :]
    names = [name for name in sources if _is_mixed(schedule, name) and sources[name].section.dry != "repeat"]
    if not names or any(sources[name].order is None for stage in ahead for name in stage.weights.sources):
        return
    moved = _where_it_stands(ledger, taken)
    if moved is None:
        return
    SampleStream(schedule, sources, moved, taken_cursors=taken).seek(schedule.samples)
    for name in names:
        record, section = moved.sources[name], sources[name].section
        cap = int(Fraction(section.max_epochs) * record.epoch_tokens)
        if record.lifetime_tokens <= cap:
            continue
        skipped = sum(stage.use[name].skipped for stage in moved.stages if name in stage.use)
        remedy = Decimal(ceil(record.epochs * 100)) / 100
        raise ConfigError(
            f"source {name!r} runs dry: packed and padded stages together go through {float(record.epochs):.2f} epochs "
            f"of its {record.epoch_tokens:,} tokens, of which they skip {skipped:,} (documents that a packed stage has "
            f"begun, or that are longer than a sample), and max_epochs is {section.max_epochs}. Set sources.{name}."
            f'max_epochs = {remedy}, or sources.{name}.dry to "repeat", or give it less weight'
        )


def _where_it_stands(ledger: Ledger, taken: Mapping[int, Ledger]) -> Ledger | None:
    """A copy whose cursors can be moved on. A planned ledger, of a trunk that is not trained yet, has counts and no
    cursors: then an empty one, since where it will stand follows from its stages; None where one of them takes its
    cursors from a run that is not at hand."""
    if all(record.cursor for record in ledger.sources.values()):
        return Ledger.from_json(ledger.to_json())
    if any("cursors" in record.taken and number not in taken for number, record in enumerate(ledger.stages)):
        return None
    return Ledger(ledger.seed, ledger.tokenizer, ledger.validation)


def _is_mixed(schedule: Schedule, name: str) -> bool:
    ways = {stage.documents for stage in schedule.stages if name in stage.weights.sources}
    return len(ways) > 1
