"""Runs of instruction and padded stages at any layout, beside one process: a packed stage, then two of a test's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from layouts.cases import LAYOUTS, ONE_PROCESS, Key, LayoutCase, tolerance
from layouts.curves import MODEL, STAGES, STEPS, Curve, compare, whole_curves
from made_runs import run_config
from ranks import run_ranks

from megatron.config.schema import RunConfig

Configure = Callable[[Path], RunConfig]


def staged(corpora: Path, groups: Mapping[str, str], text: Mapping[str, Any], cooldown: Mapping[str, Any]) -> RunConfig:
    """The usual stages of the layouts' runs with other words in the last two. groups: of each source."""
    sources: dict[str, dict[str, Any]] = {
        name: {"group": group, "data": [str(corpora / name)], "max_epochs": 9} for name, group in groups.items()
    }
    return run_config(
        corpora,
        sources,
        [dict(STAGES[0]), STAGES[1] | text, STAGES[2] | cooldown],
        model=MODEL,
        data={"cache": str(corpora / "cache")},
        train={"global_batch_size": 8, "micro_batch_size": 1},
        validation={"fraction": "0.1", "every": 1000},
    )


@cache
def one_process(configure: Configure, corpora: Path, key: Key, layers: int) -> Curve:
    """The curve that all others are held against."""
    return whole_curves(ONE_PROCESS, corpora, [key], layers, configure=configure)[key]


def check(
    case: LayoutCase,
    corpora: Path,
    configure: Configure,
    keys: Mapping[str, Iterable[Key]],
    steps: Mapping[Key, int] | None = None,
) -> None:
    """The curve of a layout is that of one process. keys: by engine · steps: that are compared, where not all are."""
    chosen = case.only or tuple(keys[case.section.engine])
    by_rank = run_ranks(case.ranks, whole_curves, case, corpora, chosen, case.layers, None, configure, timeout=280)
    assert all(curves == by_rank[0] for curves in by_rank), "ranks report different steps"
    for key, curve in by_rank[0].items():
        assert len(curve) == STEPS and all(fact.updated and math.isfinite(fact.loss) for fact in curve)
        first = (steps or {}).get(key, STEPS)
        reference = one_process(configure, corpora, key, case.layers)
        assert compare(curve[:first], reference[:first]).worst <= tolerance(key)


def others(few: Iterable[str]) -> list[str]:
    """Names of all layouts but those, and but offload."""
    return sorted({case.name for case in LAYOUTS if not case.parallel.get("offload")} - {*few})
