"""What the harness found, task by task, as it stands in a results file: metrics with standard errors, and every item.

Records of items make later comparisons possible without another run: right or wrong by metric, log-likelihoods of the
choices, nats and bytes of passages, answers. `digest` is of the items themselves, so that two files can be known to be
about the same questions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The accuracy of a task that is shown first and compared: the first of these that the task has.
ACCURACIES = ("acc_mutual_info", "acc_perplexity", "acc", "exact_match")
_BY_ITEM = (*ACCURACIES, "acc_norm", "acc_bytes")
_LONGEST_ANSWER = 200

Metric = dict[str, float | None]


def task_result(
    raw: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    tokens: Callable[[str, str], int | None],
    cut: Callable[[str, str], bool],
) -> dict[str, Any]:
    """{"metrics": {name: {"value", "stderr"}}, "items", "correct", "records"} of one task.

    raw: the harness' aggregated metrics. tokens, cut: of a (context, continuation), how many tokens were scored, and
    whether the context was cut on the left to fit the model. `correct` is a string of 0 and 1, item by item, for the
    first of ACCURACIES that the task has. Standard errors are the harness' own; for bits a byte, where it gives none,
    of the ratio estimator over documents; of perplexities by the delta method.
    """
    metrics = _metrics(raw)
    kept = [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]
    records: dict[str, Any] = {"digest": _digest(kept)} if kept else {}
    if (loss := metrics.get("bits_per_byte")) and kept and "bits_per_byte" in kept[0]:
        pairs = [[float(part) for part in sample["bits_per_byte"]] for sample in kept]
        if loss["stderr"] is None:
            nats = ratio_stderr(pairs)
            loss["stderr"] = None if nats is None else nats / math.log(2)
        for name in ("byte_perplexity", "word_perplexity"):
            _perplexity_stderr(metrics.get(name), kept, name)
        records["loss"] = [[round(nats, 4), int(size)] for nats, size in pairs]
    scores = [_log_likelihoods(sample) for sample in kept]
    right = {metric: _right(kept, metric) for metric in _BY_ITEM if kept and metric in kept[0]}
    if kept and _inverted(kept[0]):
        right["acc_perplexity"], uneven = _by_token(kept, scores, tokens)
        metrics["acc_perplexity"] = share(right["acc_perplexity"])
        if uneven:
            records["uneven_items"] = uneven
    if any(scores):
        records["log_likelihoods"] = [[round(score, 4) for score in row] for row in scores]
    elif kept and isinstance(kept[0]["filtered_resps"][0], str):
        records["answers"] = [str(sample["filtered_resps"][0])[:_LONGEST_ANSWER] for sample in kept]
    if shortened := sum(any(cut(*pair[:2]) for pair in _pairs(sample)) for sample in kept):
        records["cut_items"] = shortened
    result: dict[str, Any] = {"metrics": metrics, "items": len(kept)}
    if first := next((metric for metric in ACCURACIES if metric in right), None):
        result["correct"] = right[first]
        records["correct"] = right
    if records:
        result["records"] = records
    return result


def _metrics(raw: Mapping[str, Any]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for key, value in raw.items():
        metric, _, _filter = key.partition(",")
        if not isinstance(value, int | float) or metric in ("alias", "name") or "_stderr" in metric or "," not in key:
            continue
        error = raw.get(key.replace(metric, f"{metric}_stderr", 1))
        metrics[metric] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    return metrics


def share(right: str) -> Metric:
    """A share of ones, with the standard error of a mean (sample deviation / sqrt(n), as the harness has it)."""
    count, value = len(right), right.count("1") / len(right)
    return {"value": value, "stderr": math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None}


def ratio_stderr(pairs: Sequence[Sequence[float]]) -> float | None:
    """Standard error of sum(a) / sum(b) over pairs (a, b), by linearisation (Cochran, Sampling Techniques, 6.4)."""
    count = len(pairs)
    below = sum(b for _, b in pairs)
    if count < 2 or below <= 0:
        return None
    ratio = sum(a for a, _ in pairs) / below
    squares = sum((a - ratio * b) ** 2 for a, b in pairs)
    return math.sqrt(count / (count - 1) * squares) / below


def _perplexity_stderr(metric: Metric | None, samples: Sequence[Mapping[str, Any]], name: str) -> None:
    """Of exp(-sum(a) / sum(b)), by the delta method from the ratio's own; infinite perplexities have none."""
    if metric is None or metric["stderr"] is not None or metric["value"] is None or not math.isfinite(metric["value"]):
        return
    nats = ratio_stderr([[float(part) for part in sample[name]] for sample in samples])
    metric["stderr"] = None if nats is None else metric["value"] * nats


def _right(samples: Sequence[Mapping[str, Any]], metric: str) -> str:
    return "".join("1" if sample[metric] else "0" for sample in samples)


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """Of everything that was asked and of the right answers, in order; of nothing that a model said."""
    asked = hashlib.sha256()
    for sample in samples:
        for argument in (*sample["arguments"], (str(sample["target"]),)):
            texts = [part for part in argument if isinstance(part, str)] if isinstance(argument, tuple | list) else []
            asked.update("\x1f".join(texts).encode("utf-8", "surrogatepass") + b"\x1e")
    return asked.hexdigest()[:32]


def _pairs(sample: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [pair for pair in sample["arguments"] if len(pair) >= 2 and all(isinstance(part, str) for part in pair[:2])]


def _log_likelihoods(sample: Mapping[str, Any]) -> list[float]:
    found = sample["filtered_resps"]
    return [float(one[0]) for one in found if isinstance(one, list | tuple) and len(one) == 2]


def _inverted(sample: Mapping[str, Any]) -> bool:
    """Whether this is a choice in the prompt, written by suite_tasks.py: several contexts, one continuation."""
    return {"contexts", "scored", "answer"} <= set(sample["doc"])


def _by_token(
    samples: Sequence[Mapping[str, Any]], scores: Sequence[Sequence[float]], tokens: Callable[[str, str], int | None]
) -> tuple[str, int]:
    """Right or wrong by the lowest perplexity a token, and of how many items the choices have unlike token counts."""
    right, uneven = "", 0
    for sample, row in zip(samples, scores, strict=True):
        counts = [tokens(*pair[:2]) or 1 for pair in _pairs(sample)]
        losses = [-score / count for score, count in zip(row, counts, strict=True)]
        right += str(int(losses.index(min(losses)) == sample["doc"]["answer"]))
        uneven += len(set(counts)) > 1
    return right, uneven
