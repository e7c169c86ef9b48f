"""What happened to a run besides consuming samples: events of the ledger, made here and said in words here.

    lr-changed    a begun stage's learning rate was changed by permission
    spike         a step made no update: its samples were consumed, and not trained on
    rolled-back   training went on from an earlier step; the steps in between were taken back
    passed-over   batches that were consumed and not trained on, in one stage, as a roll-back said
    averaged      weights of several checkpoints were averaged, this ledger's among them; those of the others say what
                  they were trained on

Samples of "spike" and "passed-over" count in every table of the ledger: order, cursors and learning rate are those of
an undisturbed run. `not_trained` says how much of it the weights have not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.config.quantities import format_count

Event = dict[str, Any]
_UNTRAINED = ("spike", "passed-over")


def spike_event(stage: str, step: int, samples: tuple[int, int], tokens: Mapping[str, int], reason: str) -> Event:
    """A step that was skipped. samples: half-open. tokens: input positions by source."""
    return {**_batch_event("spike", stage, step, samples, tokens), "reason": reason}


def roll_back_event(roll_back: Mapping[str, Any]) -> Event:
    """A roll-back, from what the run's state keeps of it."""
    return {"event": "rolled-back", **roll_back}


def averaged_event(stage: str, step: int, sample: int, members: Sequence[Mapping[str, Any]]) -> Event:
    """Averaged checkpoints. stage, step, sample: where the first of them stands · members: of each "path", "step",
    "share" (a fraction in words) and "manifest" (its SHA-256)."""
    return {"event": "averaged", "stage": stage, "step": step, "sample": sample, "members": [dict(m) for m in members]}


def pass_over(
    events: list[Event], stage: str, step: int, samples: tuple[int, int], tokens: Mapping[str, int], spike: int
) -> None:
    """Enters a batch that is passed over for the spike at step `spike`: neighbours of one stage are one event."""
    last = events[-1] if events else {}
    follows = last.get("event") == "passed-over" and last["stage"] == stage and last["steps"][1] == step - 1
    if follows and last["spike"] == spike:
        sums = {name: last["tokens"].get(name, 0) + tokens.get(name, 0) for name in {*last["tokens"], *tokens}}
        grown = {"steps": [last["steps"][0], step], "samples": [last["samples"][0], samples[1]]}
        events[-1] = {**last, **grown, "tokens": dict(sorted(sums.items()))}
        return
    events.append({**_batch_event("passed-over", stage, step, samples, tokens), "spike": spike})


def _batch_event(kind: str, stage: str, step: int, samples: tuple[int, int], tokens: Mapping[str, int]) -> Event:
    return {
        "event": kind,
        "stage": stage,
        "steps": [step, step],
        "samples": list(samples),
        "tokens": dict(sorted(tokens.items())),
    }


def not_trained(events: Iterable[Event]) -> dict[str, int]:
    """Tokens by source that were consumed and not trained on, because of spikes; empty where there are none."""
    sums: dict[str, int] = {}
    for event in events:
        if event.get("event") in _UNTRAINED:
            for name, tokens in event["tokens"].items():
                sums[name] = sums.get(name, 0) + tokens
    return dict(sorted(sums.items()))


def event_words(event: Mapping[str, Any]) -> str:
    """An event in words; one of a kind that is not known here as it is kept."""
    kind, stage = event.get("event"), event.get("stage")
    if kind == "lr-changed":
        return f"lr-changed: the learning rate of stage {stage!r} is another from sample {event['sample']:,} on"
    if kind == "spike":
        return (
            f"step {event['steps'][0]:,} of stage {stage!r} made no update: {event['reason']}; its "
            f"{_samples(event)} were consumed and not trained on"
        )
    if kind == "rolled-back":
        return (
            f"at step {event['step']:,} of stage {stage!r} training went back to step {event['restart']:,} (by way of "
            f"the checkpoint of step {event['checkpoint']:,}): {event['reason']}"
        )
    if kind == "passed-over":
        first, last = event["steps"]
        return (
            f"steps {first:,} to {last:,} of stage {stage!r} were passed over because of the spike at step "
            f"{event['spike']:,}: their {_samples(event)} were consumed and not trained on"
        )
    if kind == "averaged":
        members = ", ".join(
            f"{member['share']} of {member['path']} (step {member['step']:,})" for member in event["members"]
        )
        return f"after step {event['step']:,} of stage {stage!r} the weights became an average: {members}"
    return ", ".join(f"{key} {value}" for key, value in event.items())


def _samples(event: Mapping[str, Any]) -> str:
    first, end = event["samples"]
    tokens = ", ".join(f"{name} {format_count(count)}" for name, count in event["tokens"].items())
    return f"samples {first:,}:{end:,} (tokens: {tokens})"
