"""The past is frozen, the future is editable (law M5): what a resume compares, and how it names a difference."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from megatron.config.errors import ChangedPastError, ConfigError
from megatron.config.schema import StageSection
from megatron.data.document_counts import PaddedEpoch
from megatron.data.document_stream import packing_words
from megatron.data.fim import FimSentinels
from megatron.data.ledger import ALGORITHM, Ledger, SourceRecord, StageRecord
from megatron.data.schedule import Schedule, TrainingStage
from megatron.data.stage_mixture import weighted_names
from megatron.data.stage_objective import StageObjective
from megatron.data.stage_resolution import FrozenStage
from megatron.data.weight_function import WeightFunction


def frozen_stages(ledger: Ledger) -> list[FrozenStage]:
    """What the begun stages of a ledger fix for `resolve_schedule`."""
    last = len(ledger.stages) - 1
    return [
        FrozenStage(
            name=record.name,
            samples=record.planned_samples,
            resolved_samples=record.resolved_samples,
            finished=record.finished or index < last,
            sizes=record.sizes,
            used=record.used,
            caps={name: (Decimal(cap), dry) for name, (cap, dry) in record.caps.items()},
            shapes=record.stage_shapes,
            shape_words=record.shape_words,
            run_tokens=record.run_tokens,
            padded={name: PaddedEpoch(*row) for name, row in record.padded.items()},
            objective=StageObjective.from_json(record.objective),
        )
        for index, record in enumerate(ledger.stages)
    ]


def check_words(ledger: Ledger, sections: Sequence[StageSection], sources: Collection[str]) -> None:
    """What can be seen before resolution: begun stages that are gone, renamed, or name sources they did not know, and
    sources that were trained on and are gone from the config."""
    differences = [
        f"source {name!r} was trained on and is gone from the config"
        for name, source in ledger.sources.items()
        if source.lifetime_tokens and name not in sources
    ]
    for index, record in enumerate(ledger.stages):
        if index >= len(sections):
            differences.append(f"stage {record.name!r} has begun and is gone from the config")
            continue
        section = sections[index]
        if section.name != record.name:
            differences.append(f"stage {index} was {record.name!r} and is now {section.name!r}")
        if (section.take.cursors == "continue") != ("cursors" not in record.taken):
            differences.append(f"stage {record.name!r}: take.cursors has changed, and the stage has begun")
        groups = {source.group for name, source in ledger.sources.items() if name in record.sizes}
        for name in sorted(weighted_names(section)):
            if name not in record.sizes and name not in groups:
                differences.append(f"stage {record.name!r} now names {name!r}, which it did not know when it began")
    _refuse(differences)


@dataclass(frozen=True)
class Today:
    """What today's config says, to be compared with the past.

    identities: for each source its "group", "fingerprint", "epoch_tokens" and "piece_tokens" · lr: for each stage the
    law of the learning rate in force, as plain values · fim_sentinels: the tokenizer's; None where none was looked at.
    """

    seed: int
    tokenizer: str
    validation: str
    identities: Mapping[str, Mapping[str, Any]]
    lr: Sequence[Mapping[str, Any]]
    fim_sentinels: FimSentinels | None = None


def check_past(ledger: Ledger, schedule: Schedule, today: Today) -> None:
    """Compares what decided the order of the consumed samples with today's config.

    `schedule` is resolved with `begun=frozen_stages(ledger)`. Raises ChangedPastError that lists every difference.
    """
    differences = []
    for what, then, now in (
        ("the algorithm version", ledger.algorithm, ALGORITHM),
        ("run.seed", ledger.seed, today.seed),
        ("the tokenizer's fingerprint", ledger.tokenizer, today.tokenizer),
        ("the validation split", ledger.validation, today.validation),
    ):
        if then != now:
            differences.append(f"{what} was {then} and is now {now}")
    differences += _changed_sources(ledger, today.identities)
    for index, record in enumerate(ledger.stages):
        differences += _changed_stage(record, schedule.stages[index], running=index == len(ledger.stages) - 1)
        now_ids = today.fim_sentinels.ids() if today.fim_sentinels else record.fim_sentinels
        if record.fim_sentinels and record.fim_sentinels != now_ids:
            differences.append(
                f"stage {record.name!r}: its fill-in-the-middle sentinels were {record.fim_sentinels} and are now "
                f"{now_ids}"
            )
    _refuse(differences)


def record_lr(ledger: Ledger, today: Today, allow_change: bool) -> list[dict[str, Any]]:
    """Compares the learning rate of the begun stages; a change that is allowed enters the ledger as an event.

    Returns the events. Raises ChangedPastError where a change is not allowed.
    """
    changed = [
        (record, now) for record, now in zip(ledger.stages, today.lr, strict=False) if dict(record.lr) != dict(now)
    ]
    if not allow_change:
        _refuse(
            [
                f"stage {record.name!r}: its learning rate was {_shown(record.lr)} and is now {_shown(now)} "
                "(allow it with --allow-lr-change)"
                for record, now in changed
            ]
        )
    events = []
    for record, now in changed:
        events.append({"event": "lr-changed", "stage": record.name, "sample": ledger.consumed_samples})
        record.lr = dict(now)
    ledger.events += events
    return events


def match_by_content(other: Ledger, seed: int, identities: Mapping[str, Mapping[str, Any]], where: str) -> Ledger:
    """`other` with its sources under the names of those of `identities` that hold the same content; without the rest.

    Raises ConfigError where a place in the other run's order of a source is no place in this one's.
    """
    matched: dict[str, SourceRecord] = {}
    for name, identity in identities.items():
        same = [theirs for theirs, row in other.sources.items() if row.fingerprint == identity["fingerprint"]]
        if not same:
            continue
        matched[name] = record = other.sources[name if name in same else min(same)]
        then = (other.algorithm, other.seed, record.piece_tokens)
        now = (ALGORITHM, seed, identity["piece_tokens"])
        for what, theirs, ours in zip(("algorithm version", "run.seed", "piece_tokens"), then, now, strict=True):
            if record.lifetime_tokens and theirs != ours:
                raise ConfigError(
                    f"{where}: take.cursors: source {name!r} was read there with {what} {theirs} and is read here with "
                    f"{ours}, which is another order, so that its tokens would be trained on again: make them equal"
                )
    return replace(other, sources=matched)


def _changed_sources(ledger: Ledger, identities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    differences = []
    weighted = {name for stage in ledger.stages for name in stage.use}
    for name, record in ledger.sources.items():
        for key, now in identities.get(name, {}).items():
            then = getattr(record, key)
            # Groups decide ties from a stage's first sample on; content matters from the source's first sample on.
            past = name in weighted if key == "group" else record.lifetime_tokens > 0
            if past and then != now:
                differences.append(f"source {name!r}: its {key.replace('_', ' ')} was {then} and is now {now}")
    return differences


def _changed_stage(record: StageRecord, stage: TrainingStage, running: bool) -> list[str]:
    where = f"stage {record.name!r}"
    differences = []
    fim = {name: rates.to_json() for name, rates in stage.fim.items()}
    for what, then, now in (
        ("batch x sequence length", record.stage_shapes, stage.shapes),
        ("cursor", record.cursor, stage.cursor),
        ("packing", record.packing, packing_words(stage.documents)),
        ("fill-in-the-middle rates", record.fim, fim),
        *StageObjective.from_json(record.objective).differences(stage.objective),
    ):
        if then != now:
            differences.append(f"{where}: its {what} was {then} and is now {now}")
    then_weights = WeightFunction.from_json(record.weights)
    if then_weights != stage.weights:
        differences.append(f"{where}: its weights were {_weights(then_weights)} and are now {_weights(stage.weights)}")
    if stage.samples != record.planned_samples and (record.finished or not running):
        differences.append(
            f"{where} is finished with {record.planned_samples} samples; the config now gives it {stage.samples}"
        )
    elif stage.samples < record.samples:
        differences.append(
            f"{where}: {record.samples} of its samples are consumed; the config now gives it only {stage.samples}"
        )
    return differences


def _weights(function: WeightFunction) -> str:
    parts = []
    for segment in function.segments:
        shares = ", ".join(f"{n} {u / function.denominator:.6g}" for n, u in segment.weights.items())
        ends = (
            ""
            if segment.to is None
            else " → " + ", ".join(f"{n} {u / function.denominator:.6g}" for n, u in segment.to.items())
        )
        parts.append(f"from sample {segment.start}: {shares}{ends}" if len(function.segments) > 1 else shares)
    return "{" + "; ".join(parts) + "}"


def _shown(record: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key} {value}" for key, value in record.items()) + "}"


def _refuse(differences: list[str]) -> None:
    if differences:
        raise ChangedPastError(
            "the config changes what this run has already been trained on:\n  "
            + "\n  ".join(differences)
            + "\nput it back, or start another run with --fresh and another run.output"
        )
