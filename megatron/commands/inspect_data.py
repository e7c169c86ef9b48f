"""`stagemix inspect_data`: the public witness of the mixture laws. Shows any samples of a run, before or after it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.commands.frame import config_arguments, load_from
from megatron.commands.inspect_loss import loss_lines, loss_rows, with_names
from megatron.commands.tables import clipped, console_for_tables, new_table
from megatron.config.errors import ConfigError, StagemixError
from megatron.config.quantities import format_count
from megatron.config.schema import RunConfig
from megatron.data.fim import sentinels_of
from megatron.data.samples import Sample
from megatron.data.sources import TokenizerIdentity
from megatron.planner.ledger_files import read_ledger
from megatron.planner.positions import batch_start, steps_at, tokens_at
from megatron.planner.range_summary import summary_of
from megatron.planner.resolve import ResolvedRun, resolve_run
from megatron.planner.sample_drawing import (
    Decode,
    Shown,
    abbreviated,
    document_rows,
    documents_asked,
    learned_tokens,
    sample_lines,
    target_counts,
    trained_ids,
    visible,
)
from megatron.planner.sample_places import sample_range
from megatron.tokenizers.load import load_tokenizer

EPILOG = """\
example:
  stagemix inspect_data CONFIG --samples 0:10                # one line a sample
  stagemix inspect_data CONFIG --samples 0:3 --pieces        # where each document begins, ends and is cut
  stagemix inspect_data CONFIG --samples 1000:1010 --text    # with the decoded text, head … tail; --full: all of it
  stagemix inspect_data CONFIG --at "2B tokens" --ids        # ten samples from a token on; also "500 steps", "50%"
  stagemix inspect_data CONFIG --samples "500 steps:+1 steps" --summary    # counts against targets, epochs
  stagemix inspect_data CONFIG --documents python:100:120    # a source's documents, used or not
  stagemix inspect_data CONFIG --documents chats:0:3 --loss  # conversations, with what the loss is on marked
  stagemix inspect_data CONFIG --samples 0:3 --loss          # the same of samples, as their training stage learns them
  stagemix inspect_data CONFIG --samples 0:2000 --jsonl      # one object a sample
  stagemix inspect_data CONFIG --ledger runs/mine            # of a run whose config was edited since it began

An object is {"sample", "stage", "source", "epoch", "epochs", "pieces"}, with "text" and "ids" of each piece where
they are asked for; with --loss "targets", how many of each piece count, and "learned" of each token. `pieces` are
[document, start, end]: half-open input positions within documents, which are numbered by position through the
source's data list. A:B are sample numbers of the whole run, or places as above; B may be left out, or +N. A place
anywhere in a run is reached at once, without reading what comes before. Text is shown on one line with escapes (\\n,
\\t, \\x07); U+FFFD stands for bytes that are no UTF-8, for example where a piece cuts a letter.
"""
_MANY = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    config_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--samples", metavar="A:B", help='sample numbers or places such as "2B tokens:+5", half-open (default 0:10)'
    )
    where.add_argument(
        "--at", metavar="PLACE", help='ten samples from a place on: "2B tokens", "500 steps", "50%%", 4096'
    )
    where.add_argument("--documents", metavar="SOURCE[:A:B]", help="the documents of a source (default its first 20)")
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="RUN",
        help="show what this run or checkpoint was and will be given, where its config was edited on the way",
    )
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a sample or document")
    parser.add_argument("--summary", action="store_true", help="totals of the range instead of its samples")
    parser.add_argument("--pieces", action="store_true", help="draw each sample piece by piece")
    parser.add_argument("--text", action="store_true", help="decode every piece with the config's tokenizer")
    parser.add_argument("--ids", action="store_true", help="show every piece's token ids")
    parser.add_argument(
        "--loss", action="store_true", help="all text of samples or documents, marked where the loss is on it"
    )
    parser.add_argument("--full", action="store_true", help="with --text, --ids: all of it instead of head … tail")


def main(argv: list[str] | None = None) -> int:
    """Prints samples or documents. Returns an exit code; raises StagemixError."""
    parser = argparse.ArgumentParser(
        prog="stagemix inspect_data",
        description="Shows which documents every sample of a run is made of, at any place of the run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    config = load_from(args)
    decodes = args.text or (args.loss and args.documents is None) or (args.ids and _rearranges(config))
    tokenizer = load_tokenizer(config.tokenizer.path) if decodes else None
    sentinels = sentinels_of(tokenizer, config.tokenizer.fim) if tokenizer is not None else None
    identity = TokenizerIdentity.of(tokenizer) if tokenizer is not None else None
    ledger = read_ledger(args.ledger) if args.ledger else None
    run = resolve_run(config, ledger=ledger, tokenizer=identity, fim_sentinels=sentinels)
    if args.documents is not None:
        _show_documents(config, run, args)
        return 0
    if args.at is not None:
        start, end = sample_range(f"{args.at}:+{_MANY}", run.schedule, "--at")
    else:
        start, end = sample_range(args.samples or f"0:{_MANY}", run.schedule)
    if args.summary:
        _show_summary(summary_of(run, start, end), args.jsonl)
        return 0
    decode = with_names(tokenizer) if args.loss and tokenizer is not None else None
    if tokenizer is not None and args.text and decode is None:
        decode = tokenizer.decode
    shown = Shown(decode, args.ids, args.full, args.loss)
    for sample in samples_between(run, start, end):
        _show_sample(run, sample, shown, args)
    return 0


def _rearranges(config: RunConfig) -> bool:
    """Whether fill-in-the-middle may act on a sample, so that its ids need the tokenizer's sentinels."""
    return any(stage.fim for stage in config.stages) or any(source.fim for source in config.sources.values())


def samples_between(run: ResolvedRun, start: int, end: int) -> Iterator[Sample]:
    """Samples start … end − 1 of a run, wherever they lie, without loading what comes before."""
    stage, offset = run.schedule.locate(start)
    stream = run.stream_from_start()
    stream.seek(stage.start_sample + batch_start(stage, offset))
    while stream.consumed_samples < end:
        for sample in stream.next_batch():
            if start <= sample.number < end:
                yield sample


def sample_row(sample: Sample) -> dict[str, Any]:
    """The public form of a sample; `fim`, the numbers of its rearranged pieces, only where there are any;
    `padded` where it is one document."""
    row = {
        "sample": sample.number,
        "stage": sample.training_stage,
        "source": sample.source,
        "epoch": sample.pieces[0].epoch,
        "epochs": [piece.epoch for piece in sample.pieces],
        "pieces": [[piece.document, piece.start, piece.end] for piece in sample.pieces],
    }
    row |= {"fim": list(sample.fim)} if sample.fim else {}
    return row | ({"padded": True} if sample.padded else {})


def _show_sample(run: ResolvedRun, sample: Sample, shown: Shown, args: argparse.Namespace) -> None:
    source = run.sources[sample.source]
    if args.jsonl:
        row = sample_row(sample)
        if shown.decode is not None:
            row["text"] = [shown.decode(ids) for ids in trained_ids(sample, source)]
        if shown.ids:
            row["ids"] = trained_ids(sample, source)
        if shown.loss:
            row |= {"targets": target_counts(sample, source), "learned": learned_tokens(sample, source)}
        print(json.dumps(row, ensure_ascii=False))
    elif args.pieces or args.text or args.ids or args.loss:
        stage, offset = run.schedule.locate(sample.number)
        step = stage.start_step + steps_at(stage, offset)
        token = stage.start_token + tokens_at(stage, offset)
        where = f"stage {stage.name}, its sample {offset:,} · step {step:,} · token {token:,}"
        print("\n".join(sample_lines(sample, source, where, shown)))
    else:
        row = sample_row(sample)
        pieces = ", ".join(f"{document}[{start}:{end}]" for document, start, end in row["pieces"])
        print(f"{sample.number:>8}  {row['stage']:<16} {row['source']:<16} epoch {row['epoch']}  documents {pieces}")


def _show_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    console = console_for_tables()
    first, last = summary["from"], summary["to"]
    console.print(
        f"samples {summary['first']:,} to {summary['last'] - 1:,}: {summary['last'] - summary['first']:,} samples, "
        f"{format_count(last['token'] - first['token'])} tokens, steps {first['step']:,} to {last['step']:,}"
    )
    table = new_table("", "stage", "source", "samples", "target", "error (M1)", "tokens", "epochs")
    previous = ""
    for row in summary["rows"]:
        if previous and row["stage"] != previous:
            table.add_section()
        table.add_row(
            clipped(row["stage"], 20) if row["stage"] != previous else "",
            clipped(row["source"], 24),
            f"{row['samples']:,}",
            f"{row['target']:,.3f}",
            f"{row['error']:+.3f}",
            format_count(row["tokens"]),
            " to ".join(str(epoch) for epoch in dict.fromkeys(row["epochs"])),
        )
        previous = row["stage"]
    console.print(table)
    for group in summary["groups"]:
        counts = f"{group['samples']:,} samples, target {group['target']:,.3f}"
        console.print(f"  stage {group['stage']}, group {group['group']}: {counts}, error {group['error']:+.3f}")
    worst = max((abs(row["error"]) for row in summary["rows"]), default=0.0)
    console.print(f"  error: samples less target since the stage began, where the range ends; the largest: {worst:.3f}")


def _show_documents(config: RunConfig, run: ResolvedRun, args: argparse.Namespace) -> None:
    name, first, last = documents_asked(args.documents, list(run.sources))
    source = run.sources[name]
    count = source.opened().files.document_count
    if first >= count:
        raise ConfigError(f"--documents {args.documents}: source {name!r} has documents 0 to {count - 1}")
    last = first + 20 if last is None else last
    if args.loss:
        for row in loss_rows(source, first, last, load_tokenizer(config.tokenizer.path)):
            print(json.dumps(row, ensure_ascii=False) if args.jsonl else "\n".join(loss_lines(row)))
        return
    decode: Decode | None = None
    try:
        decode = load_tokenizer(config.tokenizer.path).decode
    except StagemixError as error:
        if args.text:
            raise
        print(f"without text: {error}", file=sys.stderr)
    rows = document_rows(source, first, last, decode)
    if args.jsonl:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    console = console_for_tables()
    table = new_table("", "document", "file", "number", "tokens", "in slice", "held out", "begins")
    for row in rows:
        table.add_row(
            str(row["document"]),
            row["file"],
            str(row["number"]),
            f"{row['tokens']:,}",
            "yes" if row["in_slice"] else "no",
            {True: "yes", False: "no", None: "–"}[row["held_out"]],
            clipped(abbreviated(visible(row.get("text", "")), 40, 0), 48),
        )
    console.print(table)
    console.print(f"  {name}: {count:,} documents, {format_count(source.epoch_tokens)} tokens an epoch")
