"""A study whose nodes are trained and evaluated, as far as files go: ledgers, metrics, results and items, made up.

Items have a difficulty, models an ability that grows with the share of code in their tokens, and seeds add noise, so
that what a report should find is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from study.made_studies import BASE, planned, stage, tables

from megatron.checkpoint.manifest import build_manifest, manifest_bytes, sha256_of
from megatron.config.load import config_to_toml
from megatron.data.mixture import open_mixture
from megatron.evaluation.results import group_means, write_record
from megatron.study.node_config import end_checkpoint, node_folder, start_step
from megatron.study.node_results import NodeResults, SourceLoss, SuiteFile, figures_of, write_results
from megatron.study.plan import PlannedStudy
from megatron.study.steps import TrainStep, planned_ledger, trained

ITEMS = 200
TASKS = {"logic": "text", "reading": "text", "programs": "code", "choice": "code"}


def words(folder: Path, seeds: list[int], **over: Any) -> dict[str, Any]:
    """Four arms of two stages, of which two share a trunk; and a sweep of shares."""
    long = {"steps": 40}
    stages = {
        "init-text": stage(**long, mixture={"web": 1}),
        "init-half": stage(**long, mixture={"web": "0.5", "code": "0.5"}),
        "on-text": stage(steps=40, mixture={"web": 1}),
        "on-half": stage(steps=40, mixture={"web": "0.5", "code": "0.5"}),
        "to-text": stage(steps=40, mixture={"web": "0.9", "code": "0.1"}),
        "cooldown": stage(
            steps=16, mixture={"web": "0.6", "python": "0.4"}, lr={"start": "current", "shape": "linear", "final": 0}
        ),
        "sweep": stage(**long, mixture={"web": "0.5", "code": "0.5"}),
    }
    arms = {
        "text": {"stages": ["init-text", "on-text"]},
        "balanced": {"stages": ["init-half", "on-half"]},
        "balanced-to-text": {"from": "balanced/init-half", "stages": ["to-text"]},
        "cooled": {"from": "balanced-to-text", "stages": ["cooldown"]},
        "share": {"stages": ["sweep"], "axes": ["code"], "experiment": "shares"},
    }
    axes = {
        "code": {
            "set": ["stages.sweep.mixture.web", "stages.sweep.mixture.code"],
            "rows": [[1, 0], ["0.75", "0.25"], ["0.5", "0.5"], ["0.25", "0.75"], [0, 1]],
            "labels": ["0", "25", "50", "75", "100"],
        }
    }
    head = {"name": "made", "output": str(folder / "runs"), "baseline": "text", "seeds": seeds}
    base = BASE | {"checkpoint": {"every": 4, "keep": 4}}
    return tables(arms, stages, study=head, axes=axes, base=base, **over)


def make_study(
    folder: Path,
    seeds: list[int],
    untrained: Collection[str] = (),
    unevaluated: Collection[str] = (),
    noise: float = 0.15,
    tables: Mapping[str, Any] | None = None,
    **over: Any,
) -> PlannedStudy:
    """Writes the study and what its nodes would leave. untrained, unevaluated: labels of stages."""
    folder.mkdir(parents=True, exist_ok=True)
    study = planned(folder, dict(tables) if tables is not None else words(folder, seeds, **over))
    for name, node in study.graph.nodes.items():
        if node.label in untrained:
            continue
        make_trained(study, name)
        if node.label not in unevaluated:
            make_evaluated(study, name, noise)
    return study


def make_trained(study: PlannedStudy, name: str) -> None:
    """Config, metrics and the checkpoint at the end of a node, with the ledger that its plan gives."""
    node, folder = study.graph.nodes[name], node_folder(study, name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.identity.write_text(json.dumps({"id": name, "seed": node.seed, "label": node.label}))
    if node.kind == "train":
        text = config_to_toml(study.graph.run_config(name, study.study.words.study.output))
        folder.config.write_text(text)
        (folder.path / "config.toml").write_text(text)
        _metrics(study, name)
    ledger = planned_ledger(trained(node.step))
    assert ledger is not None
    ledger.seed, ledger.order = node.seed, [int(name, 16), 1]
    reached: dict[str, int] = {}
    for record in ledger.stages:
        for source, use in record.use.items():
            use.start = {"cursor": reached.get(source, 0)}
            reached[source] = reached.get(source, 0) + use.tokens
    place = end_checkpoint(study, name)
    place.mkdir(parents=True, exist_ok=True)
    state = {"format": 1, "version": "0.1.0", "step": int(place.name[5:]), "data": ledger.to_json()}
    (place / "state.json").write_text(json.dumps(state))
    (place / "manifest.json").write_bytes(manifest_bytes(build_manifest(place, state["step"], True)))


def _metrics(study: PlannedStudy, name: str) -> None:
    node = study.graph.nodes[name]
    assert isinstance(node.step, TrainStep)
    stage_, generator = node.step.stage, np.random.default_rng([node.seed, int(name[:8], 16)])
    mixture = open_mixture(stage_.weights, stage_.groups())
    rows, step, tokens = [], start_step(node.step), stage_.start_token
    batch = stage_.samples // stage_.steps
    for number in range(stage_.steps):
        taken = [stage_.weights.sources[place] for place in mixture.take(batch).tolist()]
        step, tokens = step + 1, tokens + stage_.tokens // stage_.steps
        level = {
            source: 2.2 + 0.4 * place + 6 * math.exp(-((step / 6) ** 0.55))
            for place, source in enumerate(BASE["sources"])
        }
        common = {"step": step, "training_stage": node.label, "consumed_tokens": tokens}
        rows.append(
            common
            | {
                "consumed_samples": step * batch,
                "loss": 3.0,
                "loss_by_source": {one: level[one] + generator.normal(0, 0.08) for one in sorted(set(taken))},
                "samples_by_source": {one: taken.count(one) for one in sorted(set(taken))},
                "lr": 1e-3,
                "tokens_per_second": 1000.0,
                "step_seconds": 0.1,
                "grad_norm": 1.0,
                "skipped": False,
                "skipped_total": 0,
            }
        )
        if number % 10 == 9:
            rows.append(common | {"validation": {one: value + 0.1 for one, value in level.items()}})
    path = node_folder(study, name).path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_evaluated(study: PlannedStudy, name: str, noise: float = 0.15, items: int = ITEMS) -> None:
    """results.json and the files of two suites: shares of items by task, and losses by source."""
    node, folder = study.graph.nodes[name], node_folder(study, name)
    share = _share(study, name)
    suites, metrics, losses = {}, [], {}
    for suite, record in (
        ("bench", bench_record(node.seed, share, noise, items, int(name[:6], 16))),
        ("loss", loss_record(node.seed, share, salt=int(name[:6], 16))),
    ):
        path = folder.evaluation(suite)
        write_record(path, record)
        suites[suite] = SuiteFile(path.name, "node", sha256_of(path))
        metrics += figures_of(record, suite, {"web": "text", "python": "code", "rust": "code"})
    for source, result in record["models"][0]["results"].items():
        found = result["metrics"]["loss"]["value"]
        losses[source] = SourceLoss(found, None, 4000, "text" if source == "web" else "code")
    ends = tuple(dict.fromkeys(arm.name for arm in study.graph.arms if arm.path[-1] == name))
    folder.export.mkdir(exist_ok=True)
    tokens = sum(one.stage.tokens for one in trained(node.step))
    results = NodeResults(
        name, node.label, node.seed, ends, tokens, f"checkpoints/{end_checkpoint(study, name).name}", f"w{name}",
        "export", tuple(metrics), suites, losses, None, {},
    )  # fmt: skip
    write_results(folder.results, results)


def bench_record(seed: int, share: float, noise: float, items: int = ITEMS, salt: int = 0) -> dict[str, Any]:
    """A results file of one model: items are right where ability is above their difficulty."""
    results: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for number, (task, group) in enumerate(TASKS.items()):
        difficulty = np.random.default_rng(100 + number).normal(0, 1, items)
        own = np.random.default_rng([seed, number, round(1000 * share), salt])
        ability = (
            (1.6 * share if group == "code" else 0.5 * share * (1.2 - 1.6 * share))
            - 0.2 * number
            + own.normal(0, noise)
        )
        right = ability + own.normal(0, 0.5, items) > difficulty
        value = float(right.mean())
        results[task] = {
            "metrics": {"acc": {"value": value, "stderr": math.sqrt(value * (1 - value) / (items - 1))}},
            "items": items,
            "metric": "acc",
            "records": {"digest": f"{task}-{items}", "correct": {"acc": "".join("01"[int(one)] for one in right)}},
        }
        about[task] = {"group": group, "metric": "acc", "chance": 0.25}
    model = {
        "name": "node",
        "path": "export",
        "seconds": 1.0,
        "results": results,
        "groups": group_means(results, about),
    }
    return {
        "format": 2, "suite": "bench", "harness": "made up", "dtype": "float32", "device": "cpu", "limit": None,
        "tasks": about, "models": [model],
    }  # fmt: skip


def loss_record(seed: int, share: float, documents: int = 60, salt: int = 0) -> dict[str, Any]:
    """Losses by source of one model: [nats, tokens] of each document."""
    results: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for number, source in enumerate(BASE["sources"]):
        fixed = np.random.default_rng(200 + number)
        sizes, level = fixed.integers(40, 120, documents), 2.5 + 0.3 * number + fixed.normal(0, 0.3, documents)
        own = np.random.default_rng([seed, number, round(1000 * share), salt])
        gain = 0.6 * (share if number else 1 - share)
        nats = np.round(sizes * (level - gain + own.normal(0, 0.02) + own.normal(0, 0.05, documents)), 4)
        value = float(nats.sum() / sizes.sum())
        results[source] = {
            "metrics": {"loss": {"value": value, "stderr": 0.04}},
            "items": documents,
            "metric": "loss",
            "records": {
                "digest": source,
                "token_loss": [[float(a), int(b)] for a, b in zip(nats, sizes, strict=True)],
            },
        }
        about[source] = {"source": source, "group": "code" if number else "text", "chance": None}
    model = {"name": "node", "path": "checkpoint", "seconds": 1.0, "results": results}
    return {"format": 2, "suite": "loss", "harness": "", "dtype": "float32", "tasks": about, "models": [model]}


def _share(study: PlannedStudy, name: str) -> float:
    node = study.graph.nodes[name]
    tokens = [one.stage.source_tokens for one in trained(node.step)]
    total = sum(sum(row.values()) for row in tokens)
    return sum(count for row in tokens for source, count in row.items() if source != "web") / total
