"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from megatron.config.quantities import format_count
from megatron.metrics.in_loop import main_metric
from megatron.metrics.meters import Smoothed
from megatron.metrics.sinks import Row


class Console:
    """Shows rows, and says lines without breaking the bar. `total_tokens` is the length of the whole run."""

    def __init__(self, every: int, terminal: bool | None = None) -> None:
        self._every = every
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Any = None
        self._seconds_per_token = Smoothed()
        self._total = 0

    def begin(self, total_tokens: int, consumed_tokens: int) -> None:
        """Opens the bar at the resumed position."""
        self._total = total_tokens
        if self._terminal:
            self._bar = tqdm(
                total=total_tokens, initial=consumed_tokens, unit="tok", unit_scale=True, dynamic_ncols=True
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def write(self, row: Row) -> None:
        """Shows a training row, a validation row or an evaluation row."""
        if "validation" in row:
            masked = row.get("validation_masked")
            where = f" (of {', '.join(masked)} on masked targets)" if masked else ""
            self.say(f"step {row['step']}: validation {_losses(row['validation'])}{where}")
            return
        if "evaluation" in row:
            self.say(f"step {row['evaluated_step']} ({row['evaluated_stage']}) evaluated: {_figures(row)}")
            return
        tokens = row["tokens"]
        pace = self._seconds_per_token.add(row["step_seconds"] / max(tokens, 1))
        if row["skipped"] and not row.get("passed_over"):
            self.say(f"step {row['step']}: no update: {row['skip_reason']}")
        if self._bar is not None:
            self._bar.set_description_str(row["training_stage"], refresh=False)
            self._bar.set_postfix_str(_numbers(row), refresh=False)
            self._bar.update(row["consumed_tokens"] - self._bar.n)
        elif row["step"] % self._every == 0 or row["step"] == 1:
            left = time.strftime("%H:%M:%S", time.gmtime(pace * max(self._total - row["consumed_tokens"], 0)))
            padding = row.get("padding", 0) / max(tokens, 1)
            speed = format_count(round((1 - padding) / pace)) if pace else "?"
            speed += " tokens/s" + (f" and {padding:.0%} padding" if padding else "")
            self.say(f"{row['training_stage']} step {row['step']}: {_numbers(row)}, {speed}, {left} left")

    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _numbers(row: Row) -> str:
    if row.get("passed_over"):
        return f"passed over, lr {row['lr']:.3g}"
    if not row.get("valid_targets", 1):
        return f"no target, lr {row['lr']:.3g}"
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    return f"loss {loss} ({_losses(row['loss_by_source'])}), lr {row['lr']:.3g}"


def _figures(row: Row) -> str:
    """Of each task the figure that counts, with its standard error."""
    words = []
    for task, metrics in row["evaluation"].items():
        if (metric := main_metric(metrics)) is not None:
            error = row["evaluation_stderr"].get(task, {}).get(metric)
            words.append(f"{task} {metric} {metrics[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    return ", ".join(words) or "no figures"


def _losses(by_source: Row) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in by_source.items() if value is not None)
