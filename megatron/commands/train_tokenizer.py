"""`stagemix train_tokenizer`: a SentencePiece BPE tokenizer from raw corpora."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megatron.config.errors import ConfigError
from megatron.config.quantities import parse_count
from megatron.data.corpus import ReadOptions, read_corpus
from megatron.tokenizers.train import train_sentencepiece

_EPILOG = """\
example:
  stagemix train_tokenizer --input corpora/code.jsonl corpora/text.jsonl --output data/tokenizer.model --vocab-size 8192

The sample is shared out equally among the inputs, so that a small corpus is heard beside a large one; an input that
runs out leaves its share to the others. The tokenizer falls back to bytes for rare characters, keeps white space and
line ends as they are, and so gives every text back exactly. The same inputs and options give the same file.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="stagemix train_tokenizer",
        description="Train a SentencePiece BPE tokenizer with byte fallback.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="PATH", help="files or folders to read")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the tokenizer.model to write")
    parser.add_argument("--vocab-size", default="32000", metavar="N", help="pieces in the vocabulary (default: 32000)")
    parser.add_argument(
        "--sample-bytes", default="16M", metavar="N", help='text to train on at most, such as "16M" (default: 16M)'
    )
    parser.add_argument("--text-field", default="text", metavar="F", help="JSON field with the text (default: text)")
    parser.add_argument("--suffix", action="append", default=[], metavar="S", help="in folders, only files ending in S")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of the trainer (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the tokenizer is written."""
    args = build_parser().parse_args(argv)
    vocab_size, sample_bytes = _count("--vocab-size", args.vocab_size), _count("--sample-bytes", args.sample_bytes)
    if not 1 <= args.threads <= 1024:
        raise ConfigError(f"--threads {args.threads}: give 1 to 1024")
    if args.output.exists() and not args.overwrite:
        raise ConfigError(f"{args.output}: exists already: give another --output, or --overwrite to replace it")
    options = ReadOptions(text_field=args.text_field, suffixes=tuple(args.suffix))
    began = time.perf_counter()
    with tqdm(total=sample_bytes, unit="B", unit_scale=True, desc="read sample", file=sys.stderr) as bar:
        report = train_sentencepiece(
            _shown(shared_out(args.input, options), bar),
            args.output,
            vocab_size,
            sample_bytes=sample_bytes,
            num_threads=args.threads,
        )
    print(
        f"{args.output}: {report.vocab_size:,} pieces from {report.sample_bytes / 1e6:.1f} MB of "
        f"{report.documents:,} documents, {time.perf_counter() - began:.1f} s"
    )
    return 0


def shared_out(paths: list[Path], options: ReadOptions) -> Iterator[str]:
    """Texts of the corpora, always one from the corpus that has given the fewest characters so far."""
    streams = [read_corpus(path, options) for path in paths]
    given = dict.fromkeys(range(len(paths)), 0)
    while given:
        number = min(given, key=lambda n: (given[n], n))
        document = next(streams[number], None)
        if document is None:
            del given[number]
            continue
        given[number] += max(1, len(document.text))
        yield document.text


def _shown(texts: Iterator[str], bar: tqdm[None]) -> Iterator[str]:
    for text in texts:
        yield text
        bar.update(min(len(text), bar.total - bar.n))
    bar.set_description("train")


def _count(option: str, value: str) -> int:
    try:
        return parse_count(value)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
