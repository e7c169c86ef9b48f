"""What a study has trained, in words: ledgers beside the plan, what was trained twice, indexes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.quantities import format_count
from megatron.study.verification import IndexBuilding, Verification


def verified_words(found: Verification, indexes: IndexBuilding, since: str = "") -> Iterator[str]:
    """Lines for people. since: of what time the indexes are, in words."""
    if found.arms:
        arms = f"{found.arms} of {found.of} arms trained"
        ratio = "" if found.ratio is None else f" = {found.ratio:.3f}"
        plan = "" if found.planned_ratio is None else f" (the plan: {found.planned_ratio:.3f})"
        trained, naive = format_count(found.trained), format_count(found.naive)
        padding = f"; {format_count(found.padding)} of the trained are padding" if found.padding else ""
        yield f"verified from ledgers, {arms}: {trained} tokens trained of {naive} naive{ratio}{plan}{padding}"
    for fault in found.faults:
        yield f"not as planned: {fault}"
    for words in found.skipped:
        yield f"steps without an update (not finite, or a spike): {words}"
    for words in found.skipped:
        yield f"steps without an update, their gradients not finite or spikes: {words}"
    if found.redone_steps:
        yield (
            f"trained twice: {found.redone_steps:,} steps, {format_count(found.redone_tokens)} tokens that no whole "
            "checkpoint held after a stop, a kill or damage"
        )
    files = f"{indexes.files} built in {indexes.seconds:.2g} s" if indexes.files else "none built, 0 s"
    yield f"epoch indexes{since}: {files}"
