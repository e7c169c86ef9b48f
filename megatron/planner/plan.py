"""The plan of a run: for each training stage and source the tokens, epochs and shortfall, and the learning rate at
each boundary. Plain values, so that the terminal, JSON and the report show the same."""

from __future__ import annotations

from typing import Any

from megatron.data.schedule import TrainingStage
from megatron.planner.resolve import ResolvedRun


def plan_of(run: ResolvedRun) -> dict[str, Any]:
    """The whole plan as JSON values.

    Keys: "steps", "samples", "tokens"; "stages": one object each with its length, notes, rates and "sources" rows;
    "sources": each source's size, use over the run, epochs, cap and what is left below one sample.
    """
    schedule = run.schedule
    return {
        "steps": schedule.steps,
        "samples": schedule.samples,
        "tokens": schedule.tokens,
        "stages": [_stage_row(run, stage) for stage in schedule.stages],
        "sources": [_source_row(run, name) for name in sorted(run.sources)],
    }


def _stage_row(run: ResolvedRun, stage: TrainingStage) -> dict[str, Any]:
    step_tokens = stage.global_batch_size * stage.seq_length
    return {
        "name": stage.name,
        "steps": stage.steps,
        "samples": stage.samples,
        "tokens": stage.tokens,
        "start_step": stage.start_step,
        "start_sample": stage.start_sample,
        "start_token": stage.start_token,
        "seq_length": stage.seq_length,
        "global_batch_size": stage.global_batch_size,
        "cursor": stage.cursor,
        "lr_first": run.lr.rate(stage.start_token + step_tokens),
        "lr_last": run.lr.rate(stage.start_token + stage.tokens),
        "notes": list(stage.notes),
        "weights": stage.weights.to_json(),
        "sources": [_use_row(stage, name) for name in stage.weights.sources],
        "groups": _group_rows(stage),
    }


def _use_row(stage: TrainingStage, name: str) -> dict[str, Any]:
    count = stage.counts.get(name, 0)
    fact = stage.facts[name]
    target = stage.weights.target(name, stage.samples)
    before = stage.used_before.get(name, 0)
    after = before + count * stage.seq_length
    return {
        "source": name,
        "group": fact.group,
        "samples": count,
        "target": float(target),
        "tokens": count * stage.seq_length,
        "share": count / stage.samples,
        "epochs": _epochs(count * stage.seq_length, fact.epoch_tokens),
        "epochs_before": _epochs(before, fact.epoch_tokens),
        "epochs_after": _epochs(after, fact.epoch_tokens),
        "shortfall": max(0, after - fact.cap_tokens),
        "weight_first": float(stage.weights.weight(name, 0)),
        "weight_last": float(stage.weights.weight(name, max(0, stage.samples - 1))),
    }


def _group_rows(stage: TrainingStage) -> list[dict[str, Any]]:
    rows = []
    for group in sorted({fact.group for fact in stage.facts.values()}):
        members = [name for name in stage.weights.sources if stage.facts[name].group == group]
        if not members:
            continue
        count = sum(stage.counts.get(name, 0) for name in members)
        target = sum(float(stage.weights.target(name, stage.samples)) for name in members)
        rows.append({"group": group, "samples": count, "share": count / stage.samples, "error": count - target})
    return rows


def _source_row(run: ResolvedRun, name: str) -> dict[str, Any]:
    last = run.schedule.stages[-1]
    fact = last.facts[name]
    source = run.sources[name]
    used = sum(stage.counts.get(name, 0) * stage.seq_length for stage in run.schedule.stages)
    # Of its lifetime, which `take.cursors` may have begun before this run.
    left = fact.cap_tokens - last.used_before.get(name, 0) - last.counts.get(name, 0) * last.seq_length
    return {
        "source": name,
        "group": fact.group,
        "epoch_tokens": source.epoch_tokens,
        "planned_only": source.order is None,
        "tokens": used,
        "epochs": _epochs(used, source.epoch_tokens),
        "max_epochs": float(fact.max_epochs),
        "dry": fact.dry,
        # What the cap leaves and no whole sample fits into is never trained on: said, not lost in silence.
        "unused": left if fact.dry != "repeat" and 0 < left < last.seq_length else 0,
    }


def _epochs(tokens: int, epoch_tokens: int) -> float:
    return tokens / epoch_tokens if epoch_tokens else 0.0
