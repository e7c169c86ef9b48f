"""A run folder as training leaves it, with made-up losses: three training stages over two or more sources."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import build_manifest, manifest_bytes
from megatron.config.load import config_from_tables, config_to_toml
from megatron.config.model_shape import resolve_model
from megatron.data.ledger import Ledger, SourceRecord, SourceUse, StageRecord
from megatron.data.mixture import open_mixture
from megatron.planner.resolve import ResolvedRun, resolve_run

SEQ, BATCH, STEP_SECONDS = 512, 32, 0.62


def make_run(folder: Path, upto: float = 1.0, sources: dict[str, str] | None = None) -> Path:
    """Writes the folder of a run that has come so far (a share of its steps) and gives its path.

    sources: group by source; default code and text.
    """
    groups = sources or {"code": "code", "text": "text"}
    tables: dict[str, Any] = {
        "run": {"name": "demo: balanced to text", "output": str(folder)},
        "tokenizer": {"path": "demo/tokenizer.model"},
        "model": {"preset": "llama-demo", "seq_length": SEQ},
        "sources": {name: {"group": group, "tokens": "40M"} for name, group in groups.items()},
        "train": {"global_batch_size": BATCH, "micro_batch_size": 8},
        "stages": [
            {
                "name": "balanced",
                "tokens": "5M",
                "mixture": {"code": "0.5", "text": "0.5"},
                "lr": {"warmup": "40 steps", "peak": 3e-3, "shape": "cosine", "final": 1e-3, "horizon": "10M"},
            },
            {"name": "text", "tokens": "5M", "mixture": {"code": "0.1", "text": "0.9"}},
            {
                "name": "cooldown",
                "tokens": "2.5M",
                "mixture": {"code": "0.1", "text": "0.9"},
                "ramp_to": {"code": "0.3", "text": "0.7"},
                "lr": {"start": "current", "shape": "linear", "final": 1e-5},
            },
        ],
    }
    config = config_from_tables(tables)
    run = resolve_run(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config_to_toml(config))
    steps = int(run.schedule.steps * upto)
    with (folder / "metrics.jsonl").open("w") as file:
        for row in _rows(run, steps):
            file.write(json.dumps(row) + "\n")
    checkpoint = folder / "checkpoints" / f"step-{steps:09d}"
    checkpoint.mkdir(parents=True)
    shape = resolve_model(config.model, 8192)
    state = {
        "format": 1,
        "version": "0.1.0",
        "run_id": "5d1c",
        "step": steps,
        "model": shape.to_json(),
        "precision": {"name": "bf16", "reason": "a step took 0.58 s in bf16, 1.21 s in fp32"},
        "tokenizer": {"name": "tokenizer.model", "fingerprint": "9f" * 32, "files": ["tokenizer/tokenizer.model"]},
        "data": _ledger(run, steps).to_json(),
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").write_bytes(manifest_bytes(build_manifest(checkpoint, steps, True)))
    return folder


def _rows(run: ResolvedRun, steps: int) -> list[dict[str, Any]]:
    chance = random.Random(1)
    rows: list[dict[str, Any]] = []
    step = tokens = 0
    for stage in run.schedule.stages:
        mixture = open_mixture(stage.weights, stage.groups())
        for _ in range(stage.steps):
            if step == steps:
                return rows
            step, tokens = step + 1, tokens + BATCH * SEQ
            taken = [stage.weights.sources[i] for i in mixture.take(BATCH).tolist()]
            level = {name: 2.3 + 0.5 * i + 6.4 * math.exp(-((step / 60) ** 0.55)) for i, name in enumerate(run.sources)}
            losses = {name: level[name] + chance.gauss(0, 0.09) for name in sorted(set(taken))}
            rate = run.lr.rate(tokens)
            seconds = STEP_SECONDS * (1 + abs(chance.gauss(0, 0.04)))
            common = {"step": step, "training_stage": stage.name, "consumed_tokens": tokens}
            rows.append(
                common
                | {
                    "consumed_samples": step * BATCH,
                    "loss": sum(losses.values()) / len(losses),
                    "loss_by_source": losses,
                    "lr": rate,
                    "grad_norm": 0.3 + 2.5 * math.exp(-step / 30) + abs(chance.gauss(0, 0.05)),
                    "skipped": False,
                    "tokens_per_second": BATCH * SEQ / seconds,
                    "step_seconds": seconds,
                    "samples_by_source": {name: taken.count(name) for name in sorted(set(taken))},
                }
            )
            if step % 50 == 0 or step == run.schedule.steps:
                rows.append(common | {"validation": {name: value + 0.06 for name, value in level.items()}})
    return rows


def _ledger(run: ResolvedRun, steps: int) -> Ledger:
    ledger = Ledger(seed=1234, tokenizer="", validation="fraction 0.005")
    for name, source in run.sources.items():
        ledger.sources[name] = SourceRecord(**source.identity())
    for stage in run.schedule.stages:
        samples = min(stage.samples, max(0, steps - stage.start_step) * BATCH)
        if samples == 0:
            continue
        chosen = [stage.weights.sources[i] for i in open_mixture(stage.weights, stage.groups()).take(samples).tolist()]
        use = {n: SourceUse(chosen.count(n), chosen.count(n) * SEQ) for n in stage.weights.sources}
        place = (stage.name, stage.start_sample, stage.start_token, stage.samples, [[0, SEQ, BATCH]], "", stage.cursor)
        caps = {n: [str(fact.max_epochs), fact.dry] for n, fact in stage.facts.items()}
        sizes = {n: fact.epoch_tokens for n, fact in stage.facts.items()}
        law = run.lr.laws[stage.index].to_json()
        weights = stage.weights.to_json()
        used = dict(stage.used_before)
        ledger.stages.append(StageRecord(*place, weights, sizes, used, caps, {}, law, samples=samples, use=use))
    return ledger


def make_evaluation(path: Path) -> Path:
    """Results as `stagemix evaluate` writes them, of three models on two sources."""
    models = []
    for number, name in enumerate(("after balanced", "after text", "after cooldown")):
        results: dict[str, Any] = {}
        for source, base in (("code", 0.58 - 0.03 * number), ("text", 0.46 + 0.05 * number)):
            error = math.sqrt(base * (1 - base) / 200)
            results[f"heldout_{source}"] = {
                "metrics": {
                    "acc": {"value": base, "stderr": error},
                    "acc_norm": {"value": base + 0.02, "stderr": error},
                },
                "items": 200,
            }
            results[f"heldout_{source}_loss"] = {
                "metrics": {
                    "bits_per_byte": {"value": 1.5 - 0.05 * number, "stderr": 0.02},
                    "word_perplexity": {"value": 1e7, "stderr": None},
                },
                "items": 88,
            }
        models.append({"name": name, "path": name, "seconds": 9.0, "results": results})
    tasks = {
        f"heldout_{s}{end}": {"source": s, "kind": kind, "chance": chance}
        for s in ("code", "text")
        for end, kind, chance in (("", "multiple choice", 0.25), ("_loss", "held-out loss", None))
    }
    record = {"format": 1, "suite": "heldout", "harness": "lm_eval 0.4.13", "dtype": "bfloat16", "device": "cpu"}
    path.write_text(json.dumps(record | {"tasks": tasks, "models": models}))
    return path
