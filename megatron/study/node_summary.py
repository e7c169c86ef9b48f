"""results.json of a node, put together from what its evaluations left in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.config.errors import DataError
from megatron.evaluation.results import read_record
from megatron.study.graph import Graph
from megatron.study.node_config import node_folder
from megatron.study.node_parts import ANSWERS, EXPORT, SAMPLES, Evaluated, Part, weights_of
from megatron.study.node_questions import Questions
from megatron.study.node_results import (
    WIN_RATE,
    Figure,
    NodeResults,
    SourceLoss,
    SuiteFile,
    figures_of,
)
from megatron.study.node_state import trained_checkpoint
from megatron.study.plan import PlannedStudy
from megatron.study.steps import trained


def summary_of(
    planned: PlannedStudy, questions: Questions, name: str, checkpoint: Path, weights: str, parts: Sequence[Part]
) -> NodeResults:
    """The results of a node's parts, without the win rate; what of them is not done is named in `failed`. Raises
    DataError for a damaged file."""
    node, folder = planned.graph.nodes[name], node_folder(planned, name)
    done = Evaluated(folder)
    metrics: list[Figure] = []
    suites: dict[str, SuiteFile] = {}
    losses: dict[str, SourceLoss] = {}
    missing: dict[str, tuple[str, ...]] = {}
    left_out: dict[str, dict[str, str]] = {}
    failed = {part.name: done.failure(part) or "not tried" for part in parts if not done.holds(part)}
    parts = [part for part in parts if part.name not in failed]
    for part in parts:
        if part.kind not in ("loss", "suite"):
            continue
        record = read_record(folder.path / part.file)
        metrics += figures_of(record, part.name, questions.groups)
        suites[part.name] = SuiteFile(part.file, str(record["models"][0]["name"]), done.seal(part))
        if lacking := tuple(record.get("missing", ())):
            missing[part.name] = lacking
        if refused := record.get("left_out"):
            left_out[part.name] = dict(refused)
        if part.kind == "loss":
            losses = losses_of(record, questions.groups)
    stage = trained(node.step)[-1].stage
    names = {part.name: part.file for part in parts}
    return NodeResults(
        node=name,
        label=node.label,
        seed=node.seed,
        arms=tuple(arm.name for arm in planned.graph.arms if arm.path[-1] == name),
        tokens=stage.start_token + stage.tokens,
        checkpoint=checkpoint.relative_to(folder.path).as_posix(),
        weights=weights,
        export=names.get(EXPORT),
        metrics=tuple(metrics),
        suites=suites,
        loss=losses,
        samples=names.get(SAMPLES),
        asked=planned.study.words.results.model_dump(mode="json"),
        missing=missing,
        left_out=left_out,
        failed=failed,
    )


def losses_of(record: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, SourceLoss]:
    """Losses by source of the file of suite "loss"."""
    found = {}
    for source, result in record["models"][0]["results"].items():
        values = {metric: one["value"] for metric, one in result["metrics"].items()}
        kept = result["records"]
        found[source] = SourceLoss(
            loss=values["loss"],
            bits_per_byte=values.get("bits_per_byte"),
            tokens=sum(count for _, count in kept["token_loss"]),
            group=groups.get(source, source),
            targets_loss=values.get("targets_loss"),
            targets=sum(count for _, count in kept.get("targets", ())),
        )
    return found


def judging_part(planned: PlannedStudy, questions: Questions, name: str, against: str) -> Part | None:
    """The duel of two nodes, where the answers of both are there and as they are asked for now; else None."""
    parts, files = [], []
    for one in (name, against):
        seen = trained_checkpoint(planned, one)
        if seen is None:
            return None
        folder = node_folder(planned, one)
        asked = [part for part in questions.parts(one, weights_of(seen.path)) if part.name == ANSWERS]
        if not asked or not Evaluated(folder).holds(asked[0]):
            return None
        parts += asked
        files.append(folder.path / asked[0].file)
    own, other = questions.called(name), questions.called(against)
    names = (own, other if other != own else f"{other}-{against[:8]}")
    return questions.judging(parts[0], parts[1], names, (files[0], files[1]))


def with_win_rate(results: NodeResults, file: Path, graph: Graph, against: str) -> NodeResults:
    """The results with what `stagemix win_rate` wrote. Raises DataError for a damaged file.

    The standard error is that of a mean over pairs, each 1 where both orders are won, 0 where both are lost, else
    between.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        scores = [_score(one["verdicts"]) for one in record["items"]]
        rate = float(record["rate"])
        facts = {"judge": record["judge"], "models": list(record["models"]), "p": record["p"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a result of stagemix win_rate ({error}): remove it, and evaluate again") from None
    spread = sum((score - rate) ** 2 for score in scores)
    stderr = (spread / (len(scores) - 1) / len(scores)) ** 0.5 if len(scores) > 1 else None
    task = f"against {graph.nodes[against].label}"
    figure = Figure(WIN_RATE, task, "win rate", "win_rate", rate, stderr, len(scores), True)
    shown = {"file": file.name, "against": against, **facts}
    return replace(results, metrics=(*results.metrics, figure), win_rate=shown)


def _score(verdicts: Sequence[str]) -> float:
    """Of a pair judged in both orders."""
    points = {"a": 1.0, "tie": 0.5, "b": 0.0}
    first, second = verdicts
    return (points[first] + 1 - points[second]) / 2
