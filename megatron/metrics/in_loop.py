"""Evaluations of a run's own checkpoints while it trains: a result as a row of metrics, and the figure that counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

_FIRST = ("acc_mutual_info", "acc_perplexity", "acc", "exact_match", "pass@1", "bleu", "bits_per_byte")


def main_metric(metrics: Iterable[str], said: str | None = None) -> str | None:
    """The metric of a task to be shown where there is room for one: `said`, what the suite says, where it is there;
    else the first of the usual ones; else any."""
    names = list(metrics)
    if said in names:
        return said
    return next((name for name in _FIRST if name in names), names[0] if names else None)


def evaluation_row(step: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a result. step: the run's, when it learnt of the result, so that steps of rows never fall back.

    "evaluation" and "evaluation_stderr": values and standard errors by task and metric. Figures that are no numbers are
    left out.
    """
    about = record["evaluated"]
    values: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, result in record["models"][0]["results"].items():
        for metric, found in result["metrics"].items():
            for into, number in ((values, found["value"]), (errors, found["stderr"])):
                if number is not None and math.isfinite(number):
                    into.setdefault(task, {})[metric] = number
    return {
        "step": step,
        "evaluated_step": about["step"],
        "evaluated_stage": about["training_stage"],
        "evaluated_samples": about["consumed_samples"],
        "evaluated_tokens": about["consumed_tokens"],
        "evaluation": values,
        "evaluation_stderr": errors,
        "evaluation_seconds": record["models"][0].get("seconds"),
    }
