"""What a range of samples holds: counts by stage and source against their targets, and the epochs they are from."""

from __future__ import annotations

from typing import Any

from megatron.data.samples import SampleStream
from megatron.planner.positions import Place, place_row
from megatron.planner.resolve import ResolvedRun


def summary_of(run: ResolvedRun, first: int, last: int) -> dict[str, Any]:
    """Samples first … last − 1 by stage and source, from the stream itself at both ends, without reading data.

    "rows": for each stage that the range touches and each source with a weight in it "samples" and "target" within the
    range, "error" (samples less target since the stage began, where the range or the stage ends: law M1 keeps it below
    1), "tokens", and "epochs" [first, last] that its samples are from. "groups" likewise, as sums.
    """
    stream = run.stream_from_start()
    rows: list[dict[str, Any]] = []
    for stage in run.schedule.stages:
        start, end = max(first, stage.start_sample), min(last, stage.end_sample)
        if start >= end:
            continue
        stream.seek(start)
        before = _counts(stream, stage.index)
        stood = {name: record.cursor.get("cursor", 0) for name, record in stream.ledger.sources.items()}
        stream.seek(end)
        after = _counts(stream, stage.index)
        from_, to = start - stage.start_sample, end - stage.start_sample
        for name in stage.weights.sources:
            (had, had_tokens), (has, has_tokens) = before.get(name, (0, 0)), after.get(name, (0, 0))
            target = stage.weights.target(name, to)
            size = run.sources[name].epoch_tokens
            # tokens of the stream over epochs where the range ends, which a restart of cursors may have put back
            cursor = stream.ledger.sources[name].cursor["cursor"]
            tokens = has_tokens - had_tokens
            begun = cursor - tokens
            if stage.documents is not None:  # what is skipped moves it, too
                begun = stood[name] if from_ else stream.ledger.stages[stage.index].use[name].start["cursor"]
            rows.append(
                {
                    "stage": stage.name,
                    "source": name,
                    "group": stage.facts[name].group,
                    "samples": has - had,
                    "target": float(target - stage.weights.target(name, from_)),
                    "error": float(has - target),
                    "tokens": tokens,
                    "epochs": [begun // size, (cursor - 1) // size] if tokens and size else [],
                }
            )
    places = [place_row(run.schedule, _place(run, number)) for number in (first, last)]
    return {"first": first, "last": last, "from": places[0], "to": places[1], "rows": rows, "groups": _groups(rows)}


def _counts(stream: SampleStream, stage: int) -> dict[str, tuple[int, int]]:
    if len(stream.ledger.stages) <= stage:
        return {}
    return {name: (use.samples, use.tokens) for name, use in stream.ledger.stages[stage].use.items()}


def _place(run: ResolvedRun, sample: int) -> Place:
    stage, offset = run.schedule.locate(sample)
    return Place(stage.index, offset)


def _groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["stage"], row["group"]
        group = sums.setdefault(
            key, {"stage": key[0], "group": key[1], "samples": 0, "target": 0.0, "error": 0.0, "tokens": 0}
        )
        for what in ("samples", "target", "error", "tokens"):
            group[what] += row[what]
    return list(sums.values())
