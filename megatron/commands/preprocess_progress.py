"""What the preprocessing commands show: a bar, or a line every ten seconds where no one watches; and the summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.config.quantities import format_count
from megatron.preprocessing.block_queue import Progress

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """A function that shows progress on standard error: MB/s and time left of the input, tokens, tokens/s."""
    if sys.stderr.isatty():
        with tqdm(total=0, unit="B", unit_scale=True, desc="preprocess", file=sys.stderr) as bar:
            yield _Bar(bar)
    else:
        yield _Lines()


class _Bar:
    def __init__(self, bar: tqdm[None]) -> None:
        self._bar, self._began = bar, time.perf_counter()

    def __call__(self, now: Progress) -> None:
        bar = self._bar
        if bar.total != now.bytes_total:
            bar.reset(now.bytes_total)
        bar.initial = now.kept_bytes  # what was there already tells nothing about speed
        bar.set_postfix_str(_postfix(now, time.perf_counter() - self._began), refresh=False)
        bar.update(now.bytes_done - bar.n)


class _Lines:
    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()

    def __call__(self, now: Progress) -> None:
        moment = time.perf_counter()
        if moment - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = moment
        seconds = moment - self._began
        rate = max(1.0, (now.bytes_done - now.kept_bytes) / seconds)
        left = (now.bytes_total - now.bytes_done) / rate
        print(
            f"preprocess: {now.bytes_done / 1e6:,.0f} of {now.bytes_total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
            f"{_postfix(now, seconds)}, {left:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def _postfix(now: Progress, seconds: float) -> str:
    rate = int(now.new_tokens / max(seconds, 1e-3))
    return f"{format_count(now.documents)} documents, {format_count(now.tokens)} tokens, {format_count(rate)} tokens/s"


def print_summary(prefix: Path, manifest: dict[str, Any], seconds: float, peak_memory: int) -> None:
    """What was published, in a few lines on standard output. `peak_memory` in bytes, 0 where it is not known."""
    text_bytes = manifest["bytes_of_text"]
    memory = f", at most {peak_memory / 1e6:.0f} MB a process" if peak_memory else ""
    print(
        f"{prefix}.bin/.idx: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({manifest['dtype']}), "
        f"{text_bytes / 1e6:.1f} MB of text, {manifest['bytes_per_token']:.2f} bytes a token, "
        f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s, {manifest['encoder']['backend']}{memory}"
    )
    counts = manifest["counts"]
    if (mask := manifest.get("loss_mask")) is not None:
        share = mask["target_tokens"] / manifest["tokens"]
        print(
            f"{prefix}.mask: the loss is on {mask['target_tokens']:,} of them ({share:.1%}), told by "
            f"{manifest['chat']['loss_from']}; template: {manifest['chat']['template']['origin']}"
        )
        for note in manifest["chat"]["notes"]:
            print(f"  note: {note}")
    for title, reasons in (
        ("skipped", manifest["skipped"]),
        ("conversations", counts.get("chat", {})),
        ("rejected", counts["rejected"]),
        ("dropped", counts["duplicates"]),
        (f"quarantined in {prefix}.quarantine.jsonl", counts["quarantined"]),
    ):
        for reason, count in reasons.items():
            print(f"  {title}: {reason}: {count:,}")
