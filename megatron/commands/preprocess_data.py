"""`stagemix preprocess_data`: raw corpora to the indexed dataset that training reads."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron.config.quantities import format_count
from megatron.data.corpus import ReadOptions, corpus_bytes
from megatron.data.preprocess import Progress, preprocess

_EPILOG = """\
example:
  stagemix preprocess_data --input corpora/code.jsonl --output-prefix data/code --tokenizer data/tokenizer.model

An input is a .jsonl file (one JSON object a line, its text in the field "text"), a .jsonl.gz file, a text file (one
document), or a folder, of which every file is read (--suffix takes only some). Give several inputs to have them one
after another. The result is P.bin (token ids), P.idx (where documents lie; Megatron's format) and P.json (counts,
checksums, tokenizer). They appear together when all is done: an interrupted run publishes nothing.

Name P under [sources.NAME] data = ["P"] in a run's config.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="stagemix preprocess_data",
        description="Tokenize corpora into an indexed dataset (.bin/.idx).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="PATH", help="files or folders to read")
    parser.add_argument("--output-prefix", required=True, type=Path, metavar="P", help="writes P.bin, P.idx and P.json")
    parser.add_argument(
        "--tokenizer", required=True, metavar="T", help='SentencePiece .model, tokenizer.json, or the word "bytes"'
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="worker processes (default: the cores of this machine)"
    )
    parser.add_argument("--text-field", default="text", metavar="F", help="JSON field with the text (default: text)")
    parser.add_argument("--id-field", default="id", metavar="F", help="JSON field with the document's id (default: id)")
    parser.add_argument(
        "--suffix", action="append", default=[], metavar="S", help="in folders, only files that end in S, such as .py"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace P.bin, P.idx and P.json if they exist")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the dataset is published."""
    args = build_parser().parse_args(argv)
    options = ReadOptions(args.text_field, args.id_field, tuple(args.suffix))
    began = time.perf_counter()
    with tqdm(
        total=corpus_bytes(args.input, options), unit="B", unit_scale=True, desc="preprocess", file=sys.stderr
    ) as bar:

        def show(now: Progress) -> None:
            bar.set_postfix_str(f"{format_count(now.documents)} documents, {format_count(now.tokens)} tokens", False)
            bar.update(now.bytes_read - bar.n)

        manifest = preprocess(
            args.input,
            args.output_prefix,
            args.tokenizer,
            workers=_cores() if args.workers is None else args.workers,
            options=options,
            overwrite=args.overwrite,
            progress=show,
        )
        bar.update(bar.total - bar.n)
    _print_summary(args.output_prefix, manifest, time.perf_counter() - began)
    return 0


def _cores() -> int:
    """Cores that this process may use; not every system has affinities."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_summary(prefix: Path, manifest: dict[str, Any], seconds: float) -> None:
    text_bytes = manifest["bytes_of_text"]
    print(
        f"{prefix}.bin/.idx: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({manifest['dtype']}), "
        f"{text_bytes / 1e6:.1f} MB of text, {manifest['bytes_per_token']:.2f} bytes a token, "
        f"{seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s"
    )
    for reason, count in manifest["skipped"].items():
        print(f"  skipped: {reason}: {count:,}")
