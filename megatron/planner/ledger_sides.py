"""Two ledgers side by side: samples, tokens and epochs by training stage and source; and what each repeated."""

from __future__ import annotations

from typing import Any

from megatron.data.ledger import Ledger, ledger_rows

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
