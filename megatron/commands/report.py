"""`stagemix report`: one self-contained HTML file about a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.commands.status_words import time_words
from megatron.config.errors import EXIT_DONE, CheckpointError, DataError, StagemixError
from megatron.config.load import load_config
from megatron.config.model_shape import ModelShape
from megatron.config.quantities import format_count
from megatron.config.schema import RunConfig
from megatron.data.ledger import Ledger, ledger_rows
from megatron.data.ledger_events import event_words, not_trained
from megatron.evaluation.requests import EvaluationBox
from megatron.launch.run_status import run_status
from megatron.metrics.report import render_report
from megatron.metrics.report_data import ReportData, layout_words, over_steps, read_metrics
from megatron.planner.ledger_files import checkpoint_folders, read_ledger
from megatron.planner.plan import plan_of
from megatron.planner.resolve import resolve_run

EXAMPLE = """examples:
  stagemix report --run runs/demo --output report.html
  stagemix report --run runs/demo --evaluation evaluation.json --output report.html

RUN is the folder that run.output names: its metrics.jsonl, config.toml and newest checkpoint are read. The file needs
nothing else: no network, no script; it follows the reader's light or dark setting and prints well.

exit codes: 0 done, 3 no metrics or a damaged file, 74 disk"""
_RECORDED = ("device", "precision", "attention", "kernels", "optimizer", "torch")
"""Labels of what each start records of itself, besides the layout's."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix report",
        description="Writes report.html: mixture planned and realised, loss by source, learning rate, throughput, the "
        "training ledger, evaluation, and what ran.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(built)
    return built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--run", type=Path, required=True, metavar="OUTPUT", help="the run's output folder")
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.json",
        help="results of stagemix evaluate; may be given more than once",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="report.html", help="the file to write")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    html = render_report(gather(args.run, args.evaluation))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    aside = args.output.with_name(f".{args.output.name}.tmp")
    aside.write_text(html, encoding="utf-8")
    aside.replace(args.output)
    print(f"{args.output}: {format_count(len(html.encode()))}B, opens in any browser")
    return EXIT_DONE


def gather(run: Path, evaluations: list[Path]) -> ReportData:
    """Reads everything that the report shows. Raises DataError for missing metrics and damaged files."""
    steps, validations = read_metrics(run / "metrics.jsonl")
    config_file = run / "config.toml"
    notes: list[str] = []
    config = load_config(config_file) if config_file.is_file() else None
    state, ledger = _checkpoint(run, notes)
    planned, groups = _planned(config, ledger, notes)
    for row in steps:
        for source in row.get("samples_by_source", {}):
            groups.setdefault(source, source)
    return ReportData(
        name=config.run.name if config else run.name,
        steps=steps,
        validations=validations,
        planned=planned,
        ledger=ledger_rows(ledger) if ledger else [],
        groups=groups,
        evaluations=[_evaluation(path) for path in evaluations],
        in_loop=_in_loop(run, notes),
        facts=_facts(config, state, ledger, steps) | _starts(run),
        config=config_file.read_text(encoding="utf-8") if config else "",
        parameters=ModelShape.from_json(state["model"]).parameter_count() if "model" in state else None,
        notes=notes,
    )


def _checkpoint(run: Path, notes: list[str]) -> tuple[dict[str, Any], Ledger | None]:
    """state.json and ledger of the newest checkpoint that has them whole; damaged ones are named in the notes."""
    for folder in reversed(checkpoint_folders(run)):
        try:
            ledger = read_ledger(folder)
            return json.loads((folder / "state.json").read_text(encoding="utf-8")), ledger
        except CheckpointError as error:
            notes.append(f"A damaged checkpoint was passed over: {error}")
    return {}, None


def _planned(
    config: RunConfig | None, ledger: Ledger | None, notes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The planned stages and every source's group: of the whole plan, or of the ledger where the data have gone."""
    if config is not None:
        groups = {name: section.group or name for name, section in config.sources.items()}
        try:
            return list(plan_of(resolve_run(config, ledger=ledger))["stages"]), groups
        except StagemixError as error:
            notes.append(f"The plan is shown as far as the ledger knows it, as it cannot be resolved here: {error}")
    else:
        groups = {}
        notes.append("The run has no config.toml.")
    if ledger is None:
        return [], groups
    groups = {name: record.group for name, record in ledger.sources.items()} | groups
    return [
        {
            "name": stage.name,
            "start_token": stage.start_token,
            "tokens": stage.stage_shapes.tokens_at(stage.planned_samples),
            "samples": stage.planned_samples,
            "weights": stage.weights,
        }
        for stage in ledger.stages
    ], groups


def _in_loop(run: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Results of evaluations while the run trained, by step; what failed is named in the notes."""
    box = EvaluationBox(run)
    for step, failure in box.failures().items():
        notes.append(f"Step {step} could not be evaluated (exit code {failure.get('code')}): {failure.get('reason')}")
    return list(box.results(notes.append).values())


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for model in record["models"]:
            for result in model["results"].values():
                _ = [(found["value"], found["stderr"]) for found in result["metrics"].values()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: make it with stagemix evaluate --output {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a result of stagemix evaluate: {error!r}") from None
    return record


def _starts(run: Path) -> dict[str, str]:
    """How often it was started, and where its wall time went; nothing where no start is on record."""
    status = run_status(run)
    if not status["attempts"]:
        return {}
    return {"starts": str(len(status["attempts"])), "wall time": time_words(status)}


def _recorded(label: str, start: Mapping[str, str]) -> str:
    return start.get(label, "")


def _facts(
    config: RunConfig | None, state: dict[str, Any], ledger: Ledger | None, steps: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """What ran, label by label; only what is known. What may change at a resume is given with its steps."""
    facts: dict[str, str] = {}
    if "model" in state:
        shape = ModelShape.from_json(state["model"])
        facts["parameters"] = f"{shape.parameter_count():,} (vocabulary padding included)"
        facts["decoder"] = (
            f"{shape.num_hidden_layers} layers, width {shape.hidden_size}, {shape.num_attention_heads} heads "
            f"({shape.num_key_value_heads} for keys and values), MLP {shape.intermediate_size}, {shape.norm}, "
            f"{'tied' if shape.tie_word_embeddings else 'untied'} head, vocabulary {shape.vocab_size}"
        )
    if layout := over_steps(steps, layout_words):
        facts["layout"] = layout
    elif config is not None:
        facts["engine"] = config.parallel.engine
    facts |= {label: words for label in _RECORDED if (words := over_steps(steps, partial(_recorded, label)))}
    if config is not None:
        batch = config.train
        facts["batch"] = f"{batch.global_batch_size} sequences of {config.model.seq_length} tokens a step"
        facts.setdefault("optimizer", config.optimizer.name)
        facts["seed"] = str(config.run.seed)
    for label in ("precision", "kernels"):
        choice = state.get(label) or {}
        if "name" in choice:
            facts.setdefault(label, str(choice["name"]))
        if reason := choice.get("reason"):
            facts[f"why this choice of {label}"] = str(reason)
    if tokenizer := state.get("tokenizer"):
        facts["tokenizer"] = f"{tokenizer.get('name', '')} {str(tokenizer.get('fingerprint', ''))[:16]}".strip()
    if ledger is not None:
        facts["order hash"] = ledger.order_hash
        if lost := not_trained(ledger.events):
            by_source = ", ".join(f"{name} {count:,}" for name, count in lost.items())
            facts["consumed and not trained on, because of spikes"] = f"{by_source} tokens"
        if ledger.events:
            facts["events"] = "; ".join(map(event_words, ledger.events))
    for key, label in (("version", "Stagemix"), ("run_id", "run id"), ("step", "newest checkpoint, step")):
        if state.get(key) is not None:
            facts[label] = str(state[key])
    return facts
