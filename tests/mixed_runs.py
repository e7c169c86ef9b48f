"""Runs over four small sources in two groups, for the tests of the mixture laws."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from made_runs import run_config, write_corpus

from megatron.config.schema import RunConfig
from megatron.data.ledger import Ledger
from megatron.data.samples import Sample
from megatron.planner.resolve import ResolvedRun, resolve_run

NAMES = ("a", "b", "c", "d")
GROUPS = {"a": "code", "b": "code", "c": "text", "d": "text"}
SIZES = {"a": 40, "b": 9, "c": 60, "d": 25}


def sources_of(corpora: Path, **over: Any) -> dict[str, dict[str, Any]]:
    base = {"dry": "repeat"}
    return {n: {"group": GROUPS[n], "data": [str(corpora / n)]} | base | over.get(n, {}) for n in NAMES}


def config_of(corpora: Path, stages: list[dict[str, Any]], **over: Any) -> RunConfig:
    cache = {"data": {"cache": str(corpora / "cache")}}
    return run_config(corpora, over.pop("sources", None) or sources_of(corpora), stages, **(cache | over))


def samples_of(run: ResolvedRun, limit: int | None = None) -> list[Sample]:
    stream = run.stream()
    result: list[Sample] = []
    while not stream.finished and (limit is None or len(result) < limit):
        result += stream.next_batch()
    return result


def write_corpora(folder: Path) -> Path:
    """The four sources' files, in one folder."""
    for seed, (name, documents) in enumerate(SIZES.items()):
        write_corpus(folder / name, documents, seed)
    return folder


def begun(corpora: Path, stages: list[dict[str, Any]], samples: int, **over: Any) -> Ledger:
    run = resolve_run(config_of(corpora, [dict(stage) for stage in stages], **over))
    samples_of(run, samples)
    return Ledger.from_json(json.loads(json.dumps(run.ledger.to_json())))


TWO = [
    {"name": "one", "samples": 40, "mixture": {"code": 0.5, "text": 0.5}},
    {"name": "two", "samples": 40, "mixture": {"code": 0.1, "text": 0.9}},
]


def edited(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage | change for stage, change in itertools.zip_longest(TWO, changes, fillvalue={})]
