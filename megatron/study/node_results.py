"""results.json of a study's node: every figure of its evaluations, and where each is from (docs/studies.md).

Paths in it are relative to the node's folder, so that a study can be moved. Items, for comparisons item by item, lie in
the files of its suites, which are results files of `stagemix evaluate` (evaluation/results.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.config.durable_files import write_whole
from megatron.config.errors import DataError

FORMAT = 1
LOSS = "loss"
"""The suite that losses by source are called by."""
WIN_RATE = "win-rate"
_LOWER = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Figure:
    """One number. task: of the suite; a source of suite "loss"; "[GROUP]" of a group's mean. group: the task's, or the
    source's. stderr: None where there is none. items: questions, documents, problems or prompts behind it."""

    suite: str
    task: str
    group: str
    metric: str
    value: float
    stderr: float | None
    items: int
    higher_is_better: bool

    @property
    def key(self) -> str:
        """ "SUITE/TASK/METRIC", as reports name it."""
        return f"{self.suite}/{self.task}/{self.metric}"


@dataclass(frozen=True)
class SuiteFile:
    """A results file of `stagemix evaluate` in the node's folder. model: what the node is called in it · sha256: of the
    file."""

    file: str
    model: str
    sha256: str


@dataclass(frozen=True)
class SourceLoss:
    """On held-out documents of a source: nats a token, bits a byte of text, and how many tokens were predicted.

    Of a source with a loss mask besides what the targets alone come to: targets_loss, targets (how many).
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    group: str = ""
    targets_loss: float | None = None
    targets: int = 0


@dataclass(frozen=True)
class NodeResults:
    """All of results.json.

    arms: that end at the node · tokens: trained on until its end, what is before it included · checkpoint, export,
    samples: paths · weights: fingerprint of the checkpoint's weights · suites: by name, suite "loss" among them ·
    loss: by source · win_rate: {"file", "against" (a node), "judge"} where a judge was asked · asked: what [results]
    said · missing: tasks by suite that had no data · left_out: sources by suite that could not be asked about, each
    with why · failed: parts of the evaluation that there are no figures of, each with why.
    """

    node: str
    label: str
    seed: int
    arms: tuple[str, ...]
    tokens: int
    checkpoint: str
    weights: str
    export: str | None
    metrics: tuple[Figure, ...]
    suites: Mapping[str, SuiteFile]
    loss: Mapping[str, SourceLoss]
    samples: str | None
    asked: Mapping[str, Any]
    win_rate: Mapping[str, Any] | None = None
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def figure(self, key: str) -> Figure | None:
        """The figure of a key, if there is one."""
        return next((one for one in self.metrics if one.key == key), None)


def write_results(path: Path, results: NodeResults) -> None:
    """Writes the file whole. OSError."""
    content = json.dumps({"format": FORMAT, **asdict(results)}, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, (content + "\n").encode())


def read_results(path: Path) -> NodeResults | None:
    """What stands in results.json; None where there is no such file. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (found := content.pop("format")) != FORMAT:
            raise DataError(f"{path}: format {found}, and this version reads {FORMAT}: update stagemix")
        content["arms"] = tuple(content["arms"])
        content["metrics"] = tuple(Figure(**row) for row in content["metrics"])
        content["suites"] = {name: SuiteFile(**row) for name, row in content["suites"].items()}
        content["loss"] = {name: SourceLoss(**row) for name, row in content["loss"].items()}
        content["missing"] = {name: tuple(tasks) for name, tasks in content.get("missing", {}).items()}
        return NodeResults(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: not a node's results ({error}): remove it, and stagemix study evaluate writes it again"
        ) from None


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better: of accuracies, pass@k, BLEU and win rates, not of losses and perplexities."""
    return metric.startswith("acc") or not any(word in metric for word in _LOWER)


def figures_of(record: Mapping[str, Any], suite: str, groups: Mapping[str, str]) -> list[Figure]:
    """The figures of a results file of one model: every task's metrics, then the means of its groups.

    groups: of sources, for tasks on held-out documents, which have a source and no group. What has no value, such as a
    perplexity that overflows, is left out.
    """
    (model,) = record["models"]
    about: Mapping[str, Any] = record.get("tasks", {})
    found = []
    for task, result in model["results"].items():
        known = about.get(task, {})
        group = known.get("group") or groups.get(known.get("source", ""), "")
        for metric, one in result["metrics"].items():
            if one["value"] is not None:
                better = higher_is_better(metric)
                found.append(
                    Figure(suite, task, group, metric, one["value"], one["stderr"], int(result["items"]), better)
                )
    for group, mean in model.get("groups", {}).items():
        names = [name for name, known in about.items() if known.get("group") == group and name in model["results"]]
        items = sum(int(model["results"][name]["items"]) for name in names)
        found.append(Figure(suite, f"[{group}]", group, "mean", mean["value"], mean["stderr"], items, True))
    return found
