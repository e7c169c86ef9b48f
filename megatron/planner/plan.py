"""The plan of a run: for each training stage and source the tokens, epochs and shortfall, and the learning rate at
each boundary. Plain values, so that the terminal, JSON and the report show the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.config.schema import StageSection
from megatron.data.document_stream import packing_words
from megatron.data.samples import leftover_bound
from megatron.data.schedule import TrainingStage
from megatron.planner.positions import stretches
from megatron.planner.repetition import repetition_row
from megatron.planner.resolve import ResolvedRun


def plan_of(run: ResolvedRun, sections: Sequence[StageSection] = (), run_tokens: int | None = None) -> dict[str, Any]:
    """The whole plan as JSON values.

    Keys: "steps", "samples", "tokens" (input positions), of which "padding" hold no token; "stages": one object each
    with its length, padding, notes, rates, "sources" and "groups" rows; "sources": each source's size, use over the
    run, epochs, cap, where it is repeated and runs dry, and what is left of it; "groups": tokens of each group over
    the run and by stage.

    Args:
        sections, run_tokens: `[[stages]]` and `train.tokens` as written, for "asked_tokens" (None where the length is
            not said in tokens, steps, samples or a share) and "fresh_optimizer".
    """
    schedule = run.schedule
    taken = [{name: stage.input_tokens(name) for name in stage.source_tokens} for stage in schedule.stages]
    asked = [
        asked_tokens(section, stage, run_tokens) for section, stage in zip(sections, schedule.stages, strict=False)
    ]
    plan: dict[str, Any] = {
        "steps": schedule.steps,
        "samples": schedule.samples,
        "tokens": schedule.tokens,
        "padding": schedule.tokens - sum(sum(tokens.values()) for tokens in taken),
        "stages": [_stage_row(run, stage, taken[stage.index]) for stage in schedule.stages],
        "sources": [_source_row(run, name, taken) for name in sorted(run.sources)],
    }
    for row, tokens, section in zip(plan["stages"], asked, sections, strict=False):
        row["asked_tokens"] = tokens
        row["fresh_optimizer"] = section.take.optimizer == "fresh"
        begun = row["name"] in (stage.name for stage in run.ledger.stages)
        row["take"] = {} if begun else section.take.model_dump()
    plan["groups"] = _groups_over_the_run(plan["sources"], schedule.tokens - plan["padding"])
    return plan


def asked_tokens(section: StageSection, stage: TrainingStage, run_tokens: int | None) -> int | None:
    """Tokens that a stage's words ask for, before they are rounded to whole batches; None where they say no number."""
    if section.tokens is not None:
        return section.tokens
    if section.steps is not None and len(stretches(stage)) == 1:
        return section.steps * stage.global_batch_size * stage.seq_length
    if section.samples is not None and len(stretches(stage)) == 1:
        return section.samples * stage.seq_length
    if section.share is not None and run_tokens is not None:
        return int(section.share * run_tokens)
    if section.mixture_tokens is not None and section.epochs is None:
        return sum(section.mixture_tokens.values())
    return None


def shapes_words(stage: Mapping[str, Any]) -> str:
    """Batch x sequence length of a stage's row; of the first and the last where they change within it."""
    words = [f"{batch} x {length}" for _, _, length, batch in stage["shapes"]]
    return words[0] if len(words) == 1 else f"{words[0]} → {words[-1]}"


def _stage_row(run: ResolvedRun, stage: TrainingStage, taken: Mapping[str, int]) -> dict[str, Any]:
    before = run.lr.law_at(stage.index - 1).rate(stage.start_token) if stage.index else None
    tokens = stage.tokens
    return {
        "name": stage.name,
        "steps": stage.steps,
        "samples": stage.samples,
        "tokens": tokens,
        "start_step": stage.start_step,
        "start_sample": stage.start_sample,
        "start_token": stage.start_token,
        "seq_length": stage.seq_length,
        "global_batch_size": stage.global_batch_size,
        "shapes": [list(part) for part in stretches(stage)],
        "cursor": stage.cursor,
        "packing": packing_words(stage.documents),
        "padding": tokens - sum(taken.values()),
        "fim": {name: [float(rates.rate), float(rates.spm)] for name, rates in stage.fim.items()},
        "lr_first": run.lr.rate(stage.start_token + stage.shapes.steps[0].batch_tokens),
        "lr_last": run.lr.rate(stage.start_token + tokens),
        "lr_before": before,
        "lr_start": run.lr.law_at(stage.index).rate(stage.start_token),
        "notes": list(stage.notes),
        "objective": stage.objective.to_json(),
        "weights": stage.weights.to_json(),
        "sources": [_use_row(stage, name, taken[name], max(1, sum(taken.values()))) for name in stage.weights.sources],
        "groups": _group_rows(stage, taken, max(1, sum(taken.values()))),
    }


def _use_row(stage: TrainingStage, name: str, tokens: int, stage_tokens: int) -> dict[str, Any]:
    fact = stage.facts[name]
    before, moved = stage.used_before.get(name, 0), stage.source_tokens.get(name, 0)
    padded = stage.padded.get(name)
    return {
        "source": name,
        "group": fact.group,
        "samples": stage.counts.get(name, 0),
        "target": float(stage.weights.target(name, stage.samples)),
        "tokens": tokens,
        "share": tokens / stage_tokens,
        "epochs": _epochs(moved, fact.epoch_tokens),
        "epochs_before": _epochs(before, fact.epoch_tokens),
        "epochs_after": _epochs(before + moved, fact.epoch_tokens),
        "shortfall": max(0, before + moved - fact.cap_tokens),
        **({"padding": stage.counts.get(name, 0) * stage.seq_length - tokens} if padded else {}),
        **({"documents": padded._asdict()} if padded else {}),
        "weight_first": float(stage.weights.weight(name, 0)),
        "weight_last": float(stage.weights.weight(name, max(0, stage.samples - 1))),
    }


def _group_rows(stage: TrainingStage, taken: Mapping[str, int], stage_tokens: int) -> list[dict[str, Any]]:
    """Law M1 is for sources; a group's error is the sum of its sources' and, since all errors sum to zero, minus the
    sum of the others': after any number of samples it is below the smaller of both numbers of sources."""
    rows = []
    for group in sorted({fact.group for fact in stage.facts.values()}):
        members = [name for name in stage.weights.sources if stage.facts[name].group == group]
        if not members:
            continue
        count = sum(stage.counts.get(name, 0) for name in members)
        target = sum(stage.weights.target(name, stage.samples) for name in members)
        tokens = sum(taken[name] for name in members)
        rows.append(
            {
                "group": group,
                "samples": count,
                "tokens": tokens,
                "share": tokens / stage_tokens,
                "target": float(target),
                "error": float(count - target),
                "error_below": min(len(members), len(stage.weights.sources) - len(members)),
            }
        )
    return rows


def _source_row(run: ResolvedRun, name: str, taken: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    last = run.schedule.stages[-1]
    fact = last.facts[name]
    source = run.sources[name]
    used = sum(tokens.get(name, 0) for tokens in taken)
    # Of its lifetime, which `take.cursors` may have begun before this run.
    lifetime = last.used_before.get(name, 0) + last.source_tokens.get(name, 0)
    left = fact.cap_tokens - lifetime
    return {
        "source": name,
        "group": fact.group,
        "epoch_tokens": source.epoch_tokens,
        "planned_only": source.order is None,
        "tokens": used,
        "tokens_by_stage": [tokens.get(name, 0) for tokens in taken],
        "epochs": _epochs(sum(stage.source_tokens.get(name, 0) for stage in run.schedule.stages), source.epoch_tokens),
        "max_epochs": float(fact.max_epochs),
        "dry": fact.dry,
        # What the cap leaves and no whole sample fits into is never trained on: said, not lost in silence.
        "unused": left if fact.dry != "repeat" and not last.padded and 0 < left < leftover_bound(last.shapes) else 0,
        "never_seen": max(0, source.epoch_tokens - lifetime),
        "left_to_cap": max(0, left),
        **repetition_row(run.schedule, source),
    }


def _groups_over_the_run(sources: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    rows = []
    for group in sorted({row["group"] for row in sources}):
        members = [row for row in sources if row["group"] == group]
        used = sum(row["tokens"] for row in members)
        size = sum(row["epoch_tokens"] for row in members)
        by_stage = [sum(parts) for parts in zip(*(row["tokens_by_stage"] for row in members), strict=True)]
        rows.append(
            {
                "group": group,
                "sources": [row["source"] for row in members],
                "tokens": used,
                "tokens_by_stage": by_stage,
                "share": used / tokens if tokens else 0.0,
                "epoch_tokens": size,
                "epochs": _epochs(used, size),
            }
        )
    return rows


def _epochs(tokens: int, epoch_tokens: int) -> float:
    return tokens / epoch_tokens if epoch_tokens else 0.0
