"""`stagemix preprocess_data`: raw corpora to the indexed dataset that training reads."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from megatron.commands.preprocess_progress import print_summary, shown
from megatron.corpora.chat_arguments import add_chat_arguments, with_chat
from megatron.corpora.cleaning_arguments import add_cleaning_arguments, cleaning_options
from megatron.corpora.read_options import ReadOptions
from megatron.corpora.reading_arguments import add_reading_arguments, read_options
from megatron.data.processors import available_processors
from megatron.preprocessing.options import PreprocessOptions, Shard
from megatron.preprocessing.run import preprocess

_EPILOG = """\
example:
  stagemix preprocess_data --input corpora/code.jsonl --output-prefix data/code --tokenizer data/tokenizer.model

An input is a file, a folder (every file below it is read) or a glob in quotes: JSON lines (one object a line, its text
in the field "text"), parquet, plain text and source code; .gz and .zst of them. Give several inputs to have them one
after another. The result is P.bin (token ids), P.idx (where documents lie; Megatron's format) and P.json (counts,
checksums, tokenizer), which appear together when all is done. Name P under [sources.NAME] data = ["P"] in a config.

Conversations for instruction tuning give P.mask too, which says what tokens the loss is on (docs/instruction-data.md):
  stagemix preprocess_data --format chat --chat-template chatml --max-tokens 2048 --too-long drop --input chats.jsonl …

The work is kept in parts in the folder P.parts. A run that was stopped, was killed, or ran out of memory or disk goes
on when the same command is run again, and the files are the same to the byte.

On several nodes, as a SLURM array (#SBATCH --array=1-32), each task makes one shard:
  stagemix preprocess_data … --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX
and when all are done, one command publishes:
  stagemix merge_data --output-prefix P
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="stagemix preprocess_data",
        description="Tokenize corpora into an indexed dataset (.bin/.idx).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", default=[], type=Path, metavar="PATH", help="files, folders or globs to read")
    add("--files-from", type=str, metavar="FILE", help="a list of inputs, one path a line; - is standard input")
    add("--output-prefix", required=True, type=_prefix, metavar="P", help="writes P.bin, P.idx and P.json")
    add("--tokenizer", required=True, metavar="T", help='.model, tokenizer.json, .tiktoken, or the word "bytes"')
    add("--workers", type=int, metavar="N", help="worker processes (default: the cores of this machine)")
    add("--overwrite", action="store_true", help="replace P.bin, P.idx and P.json if they exist")
    _add_reading(parser)
    add_chat_arguments(parser)
    _add_work(parser)
    add_cleaning_arguments(parser)
    return parser


def _prefix(words: str) -> Path:
    if words.endswith(os.sep):
        raise argparse.ArgumentTypeError(f"{words!r} is a folder: add the name that the files begin with, {words}NAME")
    return Path(words)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    add = group.add_argument
    add_reading_arguments(group)
    add("--id-field", default="id", metavar="F", help="field with the document's id (default: id)")
    add("--source-field", default="", metavar="F", help="field with the source, for counts in the manifest")
    add("--licence-field", default="", metavar="F", help="field with the SPDX licence, for --licence")
    add(
        "--licence",
        dest="licences",
        action="append",
        default=[],
        metavar="L",
        help="keep only documents under L, such as MIT",
    )
    add("--min-file-bytes", type=int, default=0, metavar="N", help="pass over smaller text and code files")
    add(
        "--max-document-bytes",
        type=int,
        default=ReadOptions().max_document_bytes,
        metavar="N",
        help="longer ones are bad records (default: 64 MiB)",
    )
    add(
        "--on-error",
        choices=("fail", "quarantine"),
        default="fail",
        help="at a bad record: end with its file and line, or write it to P.quarantine.jsonl (default: fail)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    add = group.add_argument
    add("--shard", metavar="I/N", help="make the I-th of N shards (I from 1) and publish nothing; see below")
    add("--restart", action="store_true", help="throw away the parts of an earlier run")
    add("--keep-parts", action="store_true", help="leave P.parts when the dataset is published")
    add(
        "--encoder",
        choices=("auto", "fast", "reference"),
        default="auto",
        help="auto: the fast library where it is proved equal to the tokenizer, and the tokenizer itself otherwise; "
        "samples of every part are encoded by both in any case (default: auto)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the dataset is published, or the shard complete."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.input and args.files_from is None:
        parser.error("give --input or --files-from")
    shard = None if args.shard is None else Shard.parse(args.shard)
    read, chat = with_chat(read_options(args), args)
    options = PreprocessOptions(read, cleaning_options(args), args.encoder, args.on_error, chat=chat)
    began = time.perf_counter()
    with shown() as show:
        outcome = preprocess(
            args.input,
            args.output_prefix,
            args.tokenizer,
            files_from=args.files_from,
            workers=available_processors() if args.workers is None else args.workers,
            options=options,
            shard=shard,
            overwrite=args.overwrite,
            restart=args.restart,
            keep_parts=args.keep_parts,
            progress=show,
        )
    seconds = time.perf_counter() - began
    for note in outcome.notes:
        print(f"  the fast encoder is not used: {note}")
    if outcome.manifest is not None:
        print_summary(args.output_prefix, outcome.manifest, seconds, outcome.peak_memory)
    else:
        print(
            f"{args.output_prefix}.parts: shard {shard} is complete: {outcome.parts_made} parts made, "
            f"{outcome.parts_kept} kept, {seconds:.1f} s\nwhen all shards are: stagemix merge_data --output-prefix "
            f"{args.output_prefix}"
        )
    return 0
