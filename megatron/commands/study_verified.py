"""What a study has trained, in words: ledgers beside the plan, what was trained twice, indexes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.quantities import format_count
from megatron.study.verification import IndexBuilding, Verification


def verified_words(found: Verification, indexes: IndexBuilding, since: str = "") -> Iterator[str]:
    """Lines for people. since: of what time the indexes are, in words."""
    if found.arms:
        arms = f"{found.arms} of {found.of} arms done"
        ratio = "" if found.ratio is None else f" = {found.ratio:.3f}"
        plan = "" if found.planned_ratio is None else f" (the plan: {found.planned_ratio:.3f})"
        trained, naive = format_count(found.trained), format_count(found.naive)
        yield f"verified from ledgers, {arms}: {trained} tokens trained of {naive} naive{ratio}{plan}"
    for fault in found.faults:
        yield f"not as planned: {fault}"
    if found.redone_steps:
        yield (
            f"trained twice, after kills: {found.redone_steps:,} steps, {format_count(found.redone_tokens)} tokens: "
            "what was not saved yet"
        )
    files = f"{indexes.files} built in {indexes.seconds:.2g} s" if indexes.files else "none built, 0 s"
    yield f"epoch indexes{since}: {files}"
