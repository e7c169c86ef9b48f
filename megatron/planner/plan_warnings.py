"""What a reader of a plan should know before paying for the run, the gravest first; and what `train` will refuse.

A plan needs neither data nor a tokenizer, so that what only `train` needs is a warning here and no error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.config.quantities import format_count
from megatron.planner.repetition import MUCH_REPEATED

GRAVITIES = ("high", "medium", "low")
_JUMP = 0.01  # of the larger rate: less is rounding of a law's end
_ROUNDED = 0.05  # of the tokens asked for: more is another length than the one that was meant

Warned = dict[str, Any]


def warnings_of(plan: Mapping[str, Any], tokenizer: str, has_sentinels: bool = True) -> list[Warned]:
    """The warnings of a plan from `plan_of`, with `plan_layout`'s under "layout", by gravity: objects with "gravity",
    "kind", "text" and, where there are such, "stage", "source" and "exit_code" (of `train`, which would refuse).

    Args:
        tokenizer: `tokenizer.path`.
        has_sentinels: whether that tokenizer, where it is there, has sentinels for fill-in-the-middle.
    """
    found = [
        *_layout(plan.get("layout")),
        *_repeated(plan),
        *_missing_tokenizer(tokenizer),
        *_missing_takes(plan),
        *(() if has_sentinels else _without_sentinels(plan, tokenizer)),
        *_dry(plan),
        *_mixed(plan),
        *_never_used(plan),
        *_jumps(plan),
        *_stage_notes(plan),
        *_planned_only(plan),
    ]
    return sorted(found, key=lambda row: GRAVITIES.index(row["gravity"]))


def _layout(layout: Mapping[str, Any] | None) -> Iterator[Warned]:
    """What `train` will refuse of `[parallel]`, and what it will allow and is worth a word."""
    if layout is None:
        return
    over = f" over {layout['processes']} processes" if layout["processes"] > 1 else ""
    for row in layout["refusals"]:
        text = f"train will refuse the layout{over}: {row['text']}"
        yield {"gravity": "high", "kind": "train-refuses", "exit_code": row["exit_code"], "text": text}
    for note in layout["notes"]:
        yield {"gravity": "low", "kind": "layout", "text": f"layout: {note}"}


def _repeated(plan: Mapping[str, Any]) -> Iterator[Warned]:
    few = []
    for row in sorted(plan["sources"], key=lambda row: (-row["epochs_after"][-1], row["source"])):
        most = row["epochs_after"][-1]
        marks = {mark["epochs"]: mark for mark in row["passes"]}
        if MUCH_REPEATED in marks:
            mark = marks[MUCH_REPEATED]
            yield {
                "gravity": "high",
                "kind": "repetition",
                "source": row["source"],
                "text": f"{row['source']} is trained on for {_epochs(most)} epochs, above {MUCH_REPEATED} from token "
                f"{format_count(mark['token'])} (step {mark['step']:,}, stage {mark['stage']!r}) on: there repeated "
                "tokens are worth much less than new ones (arXiv 2305.16264)",
            }
        elif marks:
            few.append(f"{row['source']} for {_epochs(most)} epochs")
    if few:
        text = f"trained on more than once by the run's end: {', '.join(few)}"
        yield {"gravity": "low", "kind": "repetition", "text": text}


def _epochs(number: float) -> str:
    """With as many digits as it takes to be no whole number where it is none: a batch more than an epoch is 1.003."""
    return next((words for words in (f"{number:.2f}", f"{number:.4f}") if not words.endswith("00")), f"{number:.7g}")


def _mixed(plan: Mapping[str, Any]) -> Iterator[Warned]:
    """Sources that stages read in more than one way: what is skipped in between is known when their documents are."""
    ways: dict[str, set[str]] = {}
    for stage in plan["stages"]:
        for row in stage["sources"]:
            ways.setdefault(row["source"], set()).add(stage["packing"])
    names = [name for name, its in sorted(ways.items()) if len(its) > 1]
    if names:
        text = (
            f"{', '.join(names)}: read both packed and padded, or padded in two ways; what a stage skips of documents "
            "that another has begun is not in the epochs shown here (a run that it takes past a cap is refused)"
        )
        yield {"gravity": "low", "kind": "packing", "text": text}


def _missing_tokenizer(path: str) -> Iterator[Warned]:
    if path != "bytes" and not Path(path).exists():
        yield {
            "gravity": "medium",
            "kind": "train-refuses",
            "exit_code": 3,
            "text": f"train will refuse tokenizer.path = {path!r}: there is no such file yet; make it with "
            "train_tokenizer, or name another",
        }


def _missing_takes(plan: Mapping[str, Any]) -> Iterator[Warned]:
    for stage in plan["stages"]:
        for key, words in stage.get("take", {}).items():
            if words not in ("continue", "fresh") and not Path(words).is_dir():
                plain = '"continue"' if key == "cursors" else '"continue" nor "fresh"'
                yield {
                    "gravity": "high",
                    "kind": "train-refuses",
                    "exit_code": 2,
                    "stage": stage["name"],
                    "text": f"train will refuse take.{key} = {words!r} of stage {stage['name']!r}: it is "
                    f"{'not' if key == 'cursors' else 'neither'} {plain}, and there is no such folder of a checkpoint",
                }


def _without_sentinels(plan: Mapping[str, Any], path: str) -> Iterator[Warned]:
    for stage in plan["stages"]:
        if stage["fim"]:
            names = ", ".join(stage["fim"])
            yield {
                "gravity": "medium",
                "kind": "train-refuses",
                "exit_code": 2,
                "stage": stage["name"],
                "text": f"train will refuse fill-in-the-middle of {names} in stage {stage['name']!r}: "
                f"the tokenizer {path} has no sentinels for it",
            }


def _dry(plan: Mapping[str, Any]) -> Iterator[Warned]:
    after = {
        "renormalise": "the others share its weight from there on",
        "repeat": "it goes on past its cap",
        "error": "a stage that asked for more of it would be refused",
    }
    for row in sorted((row for row in plan["sources"] if "dry_at" in row), key=lambda row: row["dry_at"]["token"]):
        dry = row["dry_at"]
        yield {
            "gravity": "medium",
            "kind": "dry",
            "source": row["source"],
            "stage": dry["stage"],
            "text": f"{row['source']} runs dry at token {format_count(dry['token'])} (step {dry['step']:,}, stage "
            f"{dry['stage']!r}): its cap of {row['max_epochs']:g} epochs is used up; {after[dry['policy']]}",
        }


def _never_used(plan: Mapping[str, Any]) -> Iterator[Warned]:
    for row in plan["sources"]:
        if not row["tokens"]:
            yield {
                "gravity": "medium",
                "kind": "never-used",
                "source": row["source"],
                "text": f"{row['source']} is never used: no stage gives it a weight",
            }


def _jumps(plan: Mapping[str, Any]) -> Iterator[Warned]:
    for stage in plan["stages"]:
        before, after = stage["lr_before"], stage["lr_start"]
        if before is not None and abs(before - after) > _JUMP * max(before, after):
            name = stage["name"]
            text = f"the learning rate jumps from {before:.3g} to {after:.3g} where stage {name!r} begins "
            text += '(start = "current" goes on from where it was)'
            # moments that begin at zero want a rate that does, too
            meant = stage.get("fresh_optimizer") and after < before
            yield {"gravity": "low" if meant else "medium", "kind": "lr-jump", "stage": name, "text": text}


def _rounding(asked: int | None, tokens: int) -> str | None:
    """How grave it is that a length became whole batches; None where the table's two numbers are enough."""
    if asked is None:
        return "low"
    return "medium" if abs(tokens - asked) > _ROUNDED * asked else None


def _stage_notes(plan: Mapping[str, Any]) -> Iterator[Warned]:
    """What resolution noted, without what other warnings and "asked_tokens" say better."""
    for stage in plan["stages"]:
        where = f"stage {stage['name']!r}"
        for note in stage["notes"]:
            if "normalised" in note:
                yield {"gravity": "low", "kind": "normalised", "stage": stage["name"], "text": f"{where}: {note}"}
            elif "tokens asked" in note:
                gravity = _rounding(stage.get("asked_tokens"), stage["tokens"])
                if gravity is not None:
                    yield {"gravity": gravity, "kind": "rounded", "stage": stage["name"], "text": f"{where}: {note}"}
            elif "runs dry" not in note or " at sample 0 " in note:
                yield {"gravity": "low", "kind": "note", "stage": stage["name"], "text": f"{where}: {note}"}
        if stage["cursor"] == "restart":
            text = f"{where}: every source starts from its beginning: tokens are trained on again"
            yield {"gravity": "medium", "kind": "restart", "stage": stage["name"], "text": text}


def _planned_only(plan: Mapping[str, Any]) -> Iterator[Warned]:
    names = [row["source"] for row in plan["sources"] if row["planned_only"]]
    if names:
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        yield {
            "gravity": "low",
            "kind": "train-refuses",
            "exit_code": 3,
            "text": f"planned by size, without data yet, which train needs where they are used: {shown}",
        }
