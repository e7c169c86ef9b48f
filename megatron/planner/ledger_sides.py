"""Two ledgers side by side: samples, tokens and epochs by training stage and source; and what each repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from megatron.config.quantities import format_count
from megatron.data.ledger import Ledger, StageRecord, ledger_rows
from megatron.data.stage_objective import StageObjective

Value = TypeVar("Value")

_NONE: dict[str, Any] = {"samples": 0, "tokens": 0, "epochs": 0.0}


def side_by_side(one: Ledger, other: Ledger) -> list[dict[str, Any]]:
    """Samples, tokens and epochs of both by stage and source."""
    rows_a, rows_b = _by_key(one), _by_key(other)
    result = []
    for key in sorted({*rows_a, *rows_b}, key=lambda key: (stage_position(key[0], one, other), key[1])):
        row_a, row_b = rows_a.get(key, _NONE), rows_b.get(key, _NONE)
        row: dict[str, Any] = {"training_stage": key[0], "source": key[1]}
        for what in _NONE:
            row |= {f"{what}_a": row_a[what], f"{what}_b": row_b[what]}
        result.append(row)
    return result


def totals_by_source(ledger: Ledger) -> dict[str, tuple[int, int]]:
    """(samples, tokens) of each source over all stages; sources that gave none are left out."""
    totals: dict[str, tuple[int, int]] = {}
    for stage in ledger.stages:
        for name, use in stage.use.items():
            if use.samples:
                samples, tokens = totals.get(name, (0, 0))
                totals[name] = samples + use.samples, tokens + use.tokens
    return totals


def aggregate_words(a: dict[str, tuple[int, int]], b: dict[str, tuple[int, int]]) -> str:
    """Whether `totals_by_source` of two ledgers are equal, and which are not."""
    if a == b:
        return "the same aggregate: as many samples and tokens of each source, to the sample"
    off = {name: b.get(name, (0, 0))[0] - a.get(name, (0, 0))[0] for name in sorted({*a, *b})}
    each = ", ".join(f"{name} {count:+,}" for name, count in off.items() if count)
    return f"another aggregate: {each or 'samples of other lengths'} samples in B"


def repeated_words(repeated: dict[str, int]) -> str:
    """What `repeated_tokens` found, in a line."""
    some = {name: count for name, count in repeated.items() if count}
    if not some:
        return "0 tokens trained on twice"
    return f"{', '.join(f'{name} {format_count(count)}' for name, count in some.items())} tokens trained on again"


def beyond_order(one: Ledger, other: Ledger) -> list[str]:
    """What differs between two ledgers besides how many samples each source gave, and in which order: a pair of which
    something is named here is no test of order, whatever its totals are. Stages may be cut in other places, and one may
    go on where the other ends."""
    plain: dict[str, Callable[[Ledger], object]] = {
        "seed": lambda ledger: ledger.seed,
        "tokenizer": lambda ledger: ledger.tokenizer,
        "held-out documents": lambda ledger: ledger.validation,
    }
    by_source: dict[str, Callable[[StageRecord, str], str]] = {
        "what the loss is on": _learned,
        "packing": lambda stage, name: stage.packing,
        "fill-in-the-middle": lambda stage, name: "/".join(stage.fim.get(name, ())),
    }
    found = [what for what, of in plain.items() if of(one) != of(other)]
    found += [what for what, of in by_source.items() if _used_otherwise(one, other, of)]
    if _shapes_differ(_shapes(one), _shapes(other)):
        found.append("sequence lengths or batches")
    laws = [merged(stage.lr for stage in ledger.stages if stage.samples) for ledger in (one, other)]
    return found + (["learning rate"] if laws[0] != laws[1] else [])


def merged(values: Iterable[Value]) -> list[Value]:
    """Values in their order, a run of equal ones once: what it is, wherever it is cut into stages."""
    found: list[Value] = []
    for value in values:
        if not found or found[-1] != value:
            found.append(value)
    return found


def _used_otherwise(one: Ledger, other: Ledger, of: Callable[[StageRecord, str], str]) -> bool:
    """Whether stages do something else with samples: with those of a source that both took of, or of any. Of as many
    samples of each source also where it is done with more of them."""
    mine, theirs = _by_source(one, of), _by_source(other, of)
    if totals_by_source(one) == totals_by_source(other):
        return mine != theirs
    kinds = [{way.partition(" ")[0] for uses in by.values() for way in uses} for by in (mine, theirs)]
    return kinds[0] != kinds[1] or any({*mine[name]} != {*theirs[name]} for name in {*mine} & {*theirs})


def _by_source(ledger: Ledger, of: Callable[[StageRecord, str], str]) -> dict[str, dict[str, int]]:
    """Samples of each source by what a stage does with them."""
    found: dict[str, dict[str, int]] = {}
    for stage in ledger.stages:
        for name, use in stage.use.items():
            if use.samples:
                uses, way = found.setdefault(name, {}), of(stage, name)
                uses[way] = uses.get(way, 0) + use.samples
    return found


def _learned(stage: StageRecord, name: str) -> str:
    """What the loss is on of a source's samples."""
    objective = StageObjective.from_json(stage.objective)
    return f"mask {objective.masks[name]}" if name in objective.masks else "all"


def _shapes(ledger: Ledger) -> list[tuple[int, int, int]]:
    """(sequence length, batch, samples) of what was consumed, in its order."""
    found: list[tuple[int, int, int]] = []
    for stage in ledger.stages:
        steps = stage.stage_shapes.steps
        for step, end in zip(steps, [*(later.start for later in steps[1:]), stage.samples], strict=True):
            count = min(end, stage.samples) - step.start
            shape = step.seq_length, step.global_batch_size
            if count > 0 and found and found[-1][:2] == shape:
                found[-1] = (*shape, found[-1][2] + count)
            elif count > 0:
                found.append((*shape, count))
    return found


def _shapes_differ(one: list[tuple[int, int, int]], other: list[tuple[int, int, int]]) -> bool:
    """Whether samples that both consumed were of other lengths, or in other batches; or those of one alone."""
    common = min(sum(count for _, _, count in shapes) for shapes in (one, other))
    heads = []
    for shapes in (one, other):
        head, left = [], common
        for length, batch, count in shapes:
            if left > 0:
                head.append((length, batch, min(count, left)))
            left -= count
        heads.append(head)
    return heads[0] != heads[1] or {shape[:2] for shape in one} != {shape[:2] for shape in other}


def repeated_tokens(ledger: Ledger) -> dict[str, int]:
    """By source, tokens that had been trained on before in the same run: 0 where no stage came back to a place of the
    source's stream and none went beyond its first epoch. Sources that gave nothing are left out."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for number, stage in enumerate(ledger.stages):
        for name, use in stage.use.items():
            if use.tokens:
                start = use.start.get("cursor", 0)
                # what was passed over lies before the stage's first token or within it: where the next begins tells
                least, most = start + use.tokens, start + use.tokens + use.skipped
                after = _next_start(ledger, name, number)
                spans.setdefault(name, []).append((start, most if after is None else min(max(after, least), most)))
    repeated = {}
    for name, of in spans.items():
        epoch = ledger.sources[name].epoch_tokens
        repeated[name] = sum(end - start for start, end in of) - _covered(
            [(a, min(b, epoch)) for a, b in of if a < epoch]
        )
    return repeated


def _next_start(ledger: Ledger, name: str, number: int) -> int | None:
    """Where the next stage that takes of a source begins in its stream; where the stream stands after the last."""
    for stage in ledger.stages[number + 1 :]:
        if name in stage.use and stage.use[name].tokens:
            return stage.use[name].start.get("cursor")
    return ledger.sources[name].cursor.get("cursor")


def _covered(spans: list[tuple[int, int]]) -> int:
    """How much of the line the spans cover together."""
    covered, reached = 0, 0
    for start, end in sorted(spans):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def stage_position(name: str, *ledgers: Ledger) -> int:
    """The place of a stage among those of the ledgers."""
    names = [stage.name for ledger in ledgers for stage in ledger.stages]
    return names.index(name)


def _by_key(ledger: Ledger) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["training_stage"], row["source"]): row for row in ledger_rows(ledger)}
