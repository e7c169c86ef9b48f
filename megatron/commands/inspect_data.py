"""`stagemix inspect_data`: the public witness of the mixture laws. Shows any samples of a run, before or after it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.commands.frame import config_arguments, load_from
from megatron.config.errors import ConfigError
from megatron.data.samples import Sample
from megatron.data.sources import OpenSource
from megatron.planner.ledger_files import read_ledger
from megatron.planner.resolve import ResolvedRun, resolve_run
from megatron.tokenizers.load import load_tokenizer

EPILOG = """\
example:
  stagemix inspect_data CONFIG --samples 0:10                # one line a sample
  stagemix inspect_data CONFIG --samples 1000:1010 --text    # with the decoded text
  stagemix inspect_data CONFIG --samples 0:2000 --jsonl      # one object a sample
  stagemix inspect_data CONFIG --ledger runs/mine            # of a run whose config was edited since it began

An object is {"sample", "stage", "source", "epoch", "epochs", "pieces"}. `pieces` are [document, start, end]:
half-open input positions within documents, which are numbered by position through the source's data list. A:B are
sample numbers of the whole run; B may be left out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    config_arguments(parser)
    parser.add_argument(
        "--samples", default="0:10", metavar="A:B", help="global sample numbers, half-open (default 0:10)"
    )
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="RUN",
        help="show what this run or checkpoint was and will be given, where its config was edited on the way",
    )
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a sample")
    parser.add_argument("--text", action="store_true", help="decode every piece with the config's tokenizer")


def main(argv: list[str] | None = None) -> int:
    """Prints samples. Returns an exit code; raises StagemixError."""
    parser = argparse.ArgumentParser(
        prog="stagemix inspect_data",
        description="Shows which documents every sample of a run is made of, at any place of the run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    config = load_from(args)
    run = resolve_run(config, ledger=read_ledger(args.ledger) if args.ledger else None)
    start, end = _range(args.samples, run.schedule.samples)
    decode = load_tokenizer(config.tokenizer.path).decode if args.text else None
    for sample in samples_between(run, start, end):
        row = sample_row(sample)
        if decode is not None:
            source = run.sources[sample.source]
            row["text"] = [decode(_ids(source, piece)) for piece in sample.pieces]
        print(json.dumps(row, ensure_ascii=False) if args.jsonl else _words(row))
    return 0


def samples_between(run: ResolvedRun, start: int, end: int) -> Iterator[Sample]:
    """Samples start … end − 1 of a run, wherever they lie, without loading what comes before."""
    stage, offset = run.schedule.locate(start)
    stream = run.stream_from_start()
    stream.seek(start - offset % stage.global_batch_size)
    while stream.consumed_samples < end:
        for sample in stream.next_batch():
            if start <= sample.number < end:
                yield sample


def sample_row(sample: Sample) -> dict[str, Any]:
    """The public form of a sample."""
    return {
        "sample": sample.number,
        "stage": sample.training_stage,
        "source": sample.source,
        "epoch": sample.pieces[0].epoch,
        "epochs": [piece.epoch for piece in sample.pieces],
        "pieces": [[piece.document, piece.start, piece.end] for piece in sample.pieces],
    }


def _ids(source: OpenSource, piece: Any) -> list[int]:
    ids: list[int] = source.tokens_for(piece)[: piece.end - piece.start].tolist()
    return ids


def _range(words: str, total: int) -> tuple[int, int]:
    start, colon, end = words.partition(":")
    if not colon or not start.isdigit() or (end and not end.isdigit()):
        raise ConfigError(f"--samples {words}: write A:B, two sample numbers with A below B, for example 0:10")
    first, last = int(start), min(int(end), total) if end else total
    if first >= last:
        raise ConfigError(f"--samples {words}: no sample lies there; the run has samples 0 to {total - 1}")
    return first, last


def _words(row: dict[str, Any]) -> str:
    pieces = ", ".join(f"{document}[{start}:{end}]" for document, start, end in row["pieces"])
    line = f"{row['sample']:>8}  {row['stage']:<16} {row['source']:<16} epoch {row['epoch']}  documents {pieces}"
    if "text" in row:
        line += "\n" + "\n".join(f"          | {part}" for text in row["text"] for part in text.splitlines())
    return line
