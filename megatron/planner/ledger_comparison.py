"""How two ledgers differ, in words, and the first sample at which two runs part.

A ledger freezes everything that the order of its begun stages follows from: seed, sources by content, weights, lengths,
and the cursors that each stage began with. So the parting is found from the two ledgers alone, without configs or data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from megatron.config.quantities import format_count
from megatron.data.ledger import Ledger, SourceRecord, StageRecord
from megatron.data.ledger_events import event_words
from megatron.data.mixture import open_mixture
from megatron.data.stage_objective import StageObjective
from megatron.data.weight_function import Segment, WeightFunction

_CHUNK = 1 << 16
_LOOKED_AT = 1 << 26  # samples of one stage that are compared one by one: some seconds with the extension


@dataclass(frozen=True)
class Difference:
    """What differs: `what` names the field, `words` say it whole."""

    what: str
    words: str
    a: Any
    b: Any

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"what": self.what, "words": self.words, "a": self.a, "b": self.b}


@dataclass(frozen=True)
class Parting:
    """Where two runs stop being the same. sample: the first that differs; None where there is none within what both
    consumed, or it cannot be told. reason: in words."""

    sample: int | None
    reason: str
    known: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"sample": self.sample, "reason": self.reason, "known": self.known}


def same_samples(a: Ledger, b: Ledger) -> bool:
    """Whether both have consumed the same samples in the same order. The order's hash says which source, cursor and
    length a sample had; what a cursor points at follows from seed, algorithm and the pieces' length besides."""
    return (
        (a.consumed_samples, a.order, a.algorithm, a.seed) == (b.consumed_samples, b.order, b.algorithm, b.seed)
        and a.tokenizer == b.tokenizer
        and _pieces(a) == _pieces(b)
        and _rearranged(a) == _rearranged(b)
        and _packing(a) == _packing(b)
    )


def _pieces(ledger: Ledger) -> dict[str, int]:
    return {row.fingerprint: row.piece_tokens for row in ledger.sources.values() if row.lifetime_tokens}


def _packing(ledger: Ledger) -> list[str]:
    return [stage.packing for stage in ledger.stages if stage.samples]


def _rearranged(ledger: Ledger) -> list[dict[str, list[str]]]:
    """By begun stage, fill-in-the-middle rates by source content; trailing stages that took nothing are left out."""
    content = {name: row.fingerprint for name, row in ledger.sources.items()}
    return [{content[name]: rates for name, rates in stage.fim.items()} for stage in ledger.stages if stage.samples]


def differences(a: Ledger, b: Ledger) -> list[Difference]:
    """Everything that differs between two ledgers but the counts themselves, the most general first."""
    found = [
        Difference(
            key, f"{words}: {getattr(a, key) or '–'} and {getattr(b, key) or '–'}", getattr(a, key), getattr(b, key)
        )
        for key, words in (
            ("algorithm", "algorithm version"),
            ("seed", "run.seed"),
            ("tokenizer", "tokenizer's fingerprint"),
            ("validation", "validation split"),
        )
        if getattr(a, key) != getattr(b, key)
    ]
    for name in sorted({*a.sources, *b.sources}):
        found += _source(name, a.sources.get(name), b.sources.get(name))
    for number, (one, other) in enumerate(zip_longest(a.stages, b.stages)):
        found += _stage(number, one, other)
    if a.events != b.events:
        words = f"events: {len(a.events)} and {len(b.events)}"
        only = [f"only in {side}: {event_words(event)}" for side, event in _only(a.events, b.events)]
        found.append(Difference("events", "; ".join([words, *only]), a.events, b.events))
    return found


def _only(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from (("A", event) for event in a if event not in b)
    yield from (("B", event) for event in b if event not in a)


def _source(name: str, a: SourceRecord | None, b: SourceRecord | None) -> Iterator[Difference]:
    where = f"source {name!r}"
    if a is None or b is None:
        side = "A" if b is None else "B"
        yield Difference(f"sources.{name}", f"{where} is known only to {side}", a is not None, b is not None)
        return
    for key in ("fingerprint", "epoch_tokens", "piece_tokens", "group"):
        one, other = getattr(a, key), getattr(b, key)
        if one != other:
            shown = (f"{one[:12]}…", f"{other[:12]}…") if key == "fingerprint" else (f"{one}", f"{other}")
            words = f"{where}: its {key.replace('_', ' ')} is {shown[0]} and {shown[1]}"
            yield Difference(
                f"sources.{name}.{key}", words + (": other content" if key == "fingerprint" else ""), one, other
            )


def _stage(number: int, a: StageRecord | None, b: StageRecord | None) -> Iterator[Difference]:
    if a is None or b is None:
        record, side = (a, "A") if b is None else (b, "B")
        assert record is not None
        words = f"stage {record.name!r} has begun only in {side}, which has taken {record.samples:,} samples of it"
        yield Difference(f"stages.{record.name}", words, a is not None, b is not None)
        return
    where = f"stage {a.name!r}"
    if a.name != b.name:
        yield Difference(f"stages.{number}.name", f"stage {number + 1} is {a.name!r} and {b.name!r}", a.name, b.name)
    for key, words in (
        ("planned_samples", "planned length"),
        ("stage_shapes", "batch x sequence length"),
        ("cursor", "cursor policy"),
        ("packing", "packing"),
    ):
        one, other = getattr(a, key), getattr(b, key)
        if one != other:
            unit = " samples" if key == "planned_samples" else ""
            field = {"stage_shapes": "shapes"}.get(key, key)
            values = getattr(a, field), getattr(b, field)
            words = f"{where}: its {words} is {one}{unit} and {other}{unit}"
            yield Difference(f"stages.{a.name}.{field}", words, *values)
    for what, mine, theirs in StageObjective.from_json(a.objective).differences(StageObjective.from_json(b.objective)):
        yield Difference(f"stages.{a.name}.objective", f"{where}: its {what} is {mine} and {theirs}", mine, theirs)
    if a.weights != b.weights:
        words = f"{where}: its weights differ: {_weights_differ(a, b)}"
        yield Difference(f"stages.{a.name}.weights", words, a.weights, b.weights)
    for key, words in (
        ("lr", "learning rate"),
        ("fim", "fill-in-the-middle rates"),
        ("caps", "caps (max_epochs, dry)"),
        ("taken", "taken cursors"),
    ):
        yield from _table(f"stages.{a.name}.{key}", f"{where}: its {words}", getattr(a, key), getattr(b, key))


def _table(what: str, words: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    if keys:
        parts = [f"{key} {_word(a.get(key))} and {_word(b.get(key))}" for key in keys]
        yield Difference(what, f"{words}: {', '.join(parts)}", dict(a), dict(b))


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(str(part) for part in value)
    return "absent" if value is None else str(value)


def _weights_differ(a: StageRecord, b: StageRecord) -> str:
    one, other = WeightFunction.from_json(a.weights), WeightFunction.from_json(b.weights)
    parts = []
    for name in sorted({*one.sources, *other.sources}):
        ways = _way(one, name), _way(other, name)
        if ways[0] != ways[1]:
            parts.append(f"{name} {ways[0]} and {ways[1]}")
    return ", ".join(parts) or "the places of their steps or ramps"


def _way(function: WeightFunction, name: str) -> str:
    """A source's weight over a stage: "0.5", "0.5 → 0.1" where it is ramped, "0.5, 0.2 from sample 800"."""
    return ", ".join(
        _segment(function, part, name) + (f" from sample {part.start:,}" if part.start else "")
        for part in function.segments
    )


def _segment(function: WeightFunction, part: Segment, name: str) -> str:
    first = part.weights.get(name, 0) / function.denominator
    last = first if part.to is None else part.to.get(name, 0) / function.denominator
    return f"{first:.6g}" if first == last else f"{first:.6g} → {last:.6g}"


def parting(a: Ledger, b: Ledger) -> Parting:
    """The first sample that differs between what both have consumed."""
    for key, words in (("algorithm", "another algorithm"), ("seed", "another seed: every source has another order")):
        if getattr(a, key) != getattr(b, key) and a.stages and b.stages:
            return Parting(0, words)
    for number, (one, other) in enumerate(zip(a.stages, b.stages, strict=False)):
        common = min(one.samples, other.samples)
        if not common:
            break
        found = _parting_in_stage(a, b, one, other, common)
        if found is not None:
            return found
        if one.samples != other.samples:
            ends, goes_on, side = (a, b, "A") if one.samples < other.samples else (b, a, "B")
            if len(ends.stages) > number + 1 and ends.stages[number + 1].samples:
                words = f"stage {ends.stages[number].name!r} ends there in {side} and goes on in the other"
                return Parting(one.start_sample + common, words)
            return _one_is_longer(a, b)
    if a.consumed_samples != b.consumed_samples:
        return _one_is_longer(a, b)
    if a.order != b.order:
        return Parting(None, "the hashes of the order differ, and nothing in the ledgers says where", known=False)
    return Parting(None, "both have consumed the same samples")


def _one_is_longer(a: Ledger, b: Ledger) -> Parting:
    longer, most = ("A", a) if a.consumed_samples > b.consumed_samples else ("B", b)
    least = min(a.consumed_samples, b.consumed_samples)
    return Parting(None, f"the same up to sample {least:,}, where {longer} goes on to {most.consumed_samples:,}")


def _parting_in_stage(a: Ledger, b: Ledger, one: StageRecord, other: StageRecord, common: int) -> Parting | None:
    """The first difference in the first `common` samples of a stage that both began at the same sample."""
    start = one.start_sample
    if one.packing != other.packing:
        return Parting(start, f"stage {one.name!r}: {one.packing} in A, {other.packing} in B")
    until = _lengths_part(one, other, common)
    found = _choices_part(a, b, one, other, until)
    if found is not None or until == common:
        return found
    lengths = [record.stage_shapes.at(until).seq_length for record in (one, other)]
    return Parting(start + until, f"stage {one.name!r}: samples of {lengths[0]} tokens in A, of {lengths[1]} in B")


def _lengths_part(one: StageRecord, other: StageRecord, common: int) -> int:
    """The first of the first `common` samples whose lengths differ; `common` where none does. The batches may."""
    shapes = one.stage_shapes, other.stage_shapes
    borders = sorted({step.start for its in shapes for step in its.steps})
    apart = (at for at in borders if shapes[0].at(at).seq_length != shapes[1].at(at).seq_length)
    return min(common, next(apart, common))


def _choices_part(a: Ledger, b: Ledger, one: StageRecord, other: StageRecord, common: int) -> Parting | None:
    """The first of a stage's first `common` samples, equally long in both, that is of another source or place."""
    start = one.start_sample
    functions = WeightFunction.from_json(one.weights), WeightFunction.from_json(other.weights)
    groups = tuple(
        {name: ledger.sources[name].group for name in function.sources}
        for ledger, function in zip((a, b), functions, strict=True)
    )
    begun = tuple(
        [_begins(ledger, record, name) for name in function.sources]
        for ledger, record, function in zip((a, b), (one, other), functions, strict=True)
    )
    if (functions[0], groups[0], begun[0]) == (functions[1], groups[1], begun[1]):
        return None
    # One number for each source and where it began, the same in both runs.
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*begun[0], *begun[1]]))}
    tables = [np.array([numbers[key] for key in keys], dtype=np.int64) for keys in begun]
    streams = [open_mixture(function, its, horizon=common) for function, its in zip(functions, groups, strict=True)]
    for at in range(0, min(common, _LOOKED_AT), _CHUNK):
        count = min(_CHUNK, common - at)
        mine, theirs = (table[stream.take(count)] for table, stream in zip(tables, streams, strict=True))
        apart = np.flatnonzero(mine != theirs)
        if len(apart):
            place = int(apart[0])
            keys = list(numbers)
            words = f"stage {one.name!r}: {_chosen(a, keys[int(mine[place])])} in A, "
            return Parting(start + at + place, words + f"{_chosen(b, keys[int(theirs[place])])} in B")
    if common > _LOOKED_AT:
        words = (
            f"not in the first {format_count(_LOOKED_AT)} samples of stage {one.name!r}; later ones were not looked at"
        )
        return Parting(None, words, known=False)
    return None


Begins = tuple[str, int, tuple[tuple[str, int], ...], tuple[str, ...]]


def _begins(ledger: Ledger, record: StageRecord, name: str) -> Begins:
    """A source by content, how it is cut, where the stage found it, and its fill-in-the-middle rates."""
    source = ledger.sources[name]
    start = record.use[name].start if name in record.use else {}
    return source.fingerprint, source.piece_tokens, tuple(sorted(start.items())), tuple(record.fim.get(name, ()))


def _chosen(ledger: Ledger, key: Begins) -> str:
    name = next((name for name, row in ledger.sources.items() if row.fingerprint == key[0]), "a source")
    rate = f", fill-in-the-middle {key[3][0]}" if key[3] else ""
    return f"{name} (which the stage began at token {dict(key[2]).get('cursor', 0):,} of its stream{rate})"
