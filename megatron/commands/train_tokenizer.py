"""`stagemix train_tokenizer`: a tokenizer from a weighted sample of raw corpora."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron.commands.tables import console_for_tables, new_table
from megatron.config.errors import ConfigError
from megatron.config.quantities import parse_count
from megatron.corpora.reading import read_documents
from megatron.corpora.reading_arguments import add_reading_arguments, read_options
from megatron.corpora.selection import ReadOptions
from megatron.tokenizers.encoder import open_encoder
from megatron.tokenizers.fim_tokens import STARCODER
from megatron.tokenizers.load import load_tokenizer
from megatron.tokenizers.train import train_byte_level_bpe, train_sentencepiece
from megatron.tokenizers.training_sample import SampleSource, SourceSample, first_sample, mingled, random_sample

_EPILOG = """\
example:
  stagemix train_tokenizer --input corpora/code.jsonl corpora/text.jsonl --output data/tokenizer.model --vocab-size 8192
  stagemix train_tokenizer --kind byte-level-bpe --output data/tokenizer.json --fim --sample random --sample-bytes 1G \\
    --source python=3:corpora/python --source web=6:'corpora/web-*.jsonl.zst' --source maths=1:corpora/maths.parquet

The sample is shared out among the sources by their weights, in bytes of text; the inputs of --input weigh the same. A
source that runs out is named, and leaves its share to the others by their weights; nothing is repeated. `--sample
first` takes the beginning of every source and reads no further; `--sample random` reads everything, and draws evenly
from the whole of each source by --seed. All kinds fall back to bytes, keep white space and line ends, cut numbers into
digits, and give every text back exactly. The same inputs and options give the same file. Beside it a file
NAME.training.json says what it was trained on and how many bytes a token holds in each source, measured on the sample.
"""
_KINDS = ("sentencepiece-bpe", "sentencepiece-unigram", "byte-level-bpe")
_MEASURED_BYTES = 4_000_000  # of each source


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="stagemix train_tokenizer",
        description="Train a SentencePiece or byte-level BPE tokenizer that gives every text back exactly.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", default=[], type=Path, metavar="PATH", help="files, folders or globs, of equal weight")
    add(
        "--source",
        action="append",
        default=[],
        metavar="NAME=WEIGHT:PATH[,PATH]",
        help="a source of the sample with its weight, instead of --input; may be given again",
    )
    add("--output", required=True, type=Path, metavar="FILE", help="the tokenizer.model or tokenizer.json to write")
    add("--kind", choices=_KINDS, default=_KINDS[0], help=f"(default: {_KINDS[0]})")
    add("--vocab-size", default="32000", metavar="N", help="pieces in the vocabulary (default: 32000)")
    add("--special", nargs="+", default=[], metavar="NAME", help="more special tokens, such as <repo_name>")
    add("--fim", action="store_true", help=f"the same as --special {' '.join(STARCODER.required)}")
    add("--sample-bytes", default="16M", metavar="N", help='text to train on at most, such as "16M" (default: 16M)')
    add("--sample", choices=("first", "random"), default="first", help="see below (default: first)")
    add("--seed", type=int, default=1234, metavar="N", help="of --sample random (default: 1234)")
    add("--threads", type=int, default=1, metavar="N", help="threads of SentencePiece's trainer (default: 1)")
    add("--overwrite", action="store_true", help="replace FILE if it exists")
    add_reading_arguments(parser.add_argument_group("reading, as preprocess_data reads"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the tokenizer is written."""
    args = build_parser().parse_args(argv)
    vocab_size, sample_bytes = _count("--vocab-size", args.vocab_size), _count("--sample-bytes", args.sample_bytes)
    if not 1 <= args.threads <= 1024:
        raise ConfigError(f"--threads {args.threads}: give 1 to 1024")
    if (args.output.suffix == ".json") != (args.kind == "byte-level-bpe"):
        wanted = ".json" if args.kind == "byte-level-bpe" else ".model"
        raise ConfigError(f"--output {args.output}: a tokenizer of --kind {args.kind} is a {wanted} file: name it so")
    _refuse_existing(args)
    sources = _sources(args)
    special = [*(STARCODER.required if args.fim else ()), *args.special]
    began = time.perf_counter()
    with tqdm(total=None, unit="B", unit_scale=True, desc="read sample", file=sys.stderr) as bar:
        if args.sample == "first":
            samples = first_sample(sources, sample_bytes, bar.update)
        else:
            samples = random_sample(sources, sample_bytes, args.seed, bar.update)
    taken = sum(sample.bytes for sample in samples.values())
    _train(args, samples, vocab_size, special)
    described = _described(args, vocab_size, special, sources, samples)
    _report_path(args.output).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    documents = sum(sample.documents for sample in samples.values())
    print(
        f"{args.output}: {vocab_size:,} pieces from {taken / 1e6:.1f} MB of {documents:,} documents, "
        f"{time.perf_counter() - began:.1f} s"
    )
    _print_sources(described["sources"])
    return 0


def _train(args: argparse.Namespace, samples: Mapping[str, SourceSample], vocab_size: int, special: list[str]) -> None:
    texts, everything = mingled(samples), sys.maxsize
    if args.kind == "byte-level-bpe":
        train_byte_level_bpe(texts, args.output, vocab_size, sample_bytes=everything, special=special)
        return
    train_sentencepiece(
        texts,
        args.output,
        vocab_size,
        sample_bytes=everything,
        num_threads=args.threads,
        model_type="unigram" if args.kind == "sentencepiece-unigram" else "bpe",
        special=special,
    )


def _sources(args: argparse.Namespace) -> dict[str, SampleSource]:
    if bool(args.input) == bool(args.source):
        raise ConfigError("give either --input PATH... or --source NAME=WEIGHT:PATH[,PATH], the one or the other")
    options = read_options(args)
    found: dict[str, SampleSource] = {}
    for name, weight, paths in [(str(path), 1.0, [str(path)]) for path in args.input] or map(_parsed, args.source):
        if name in found:
            raise ConfigError(f"source {name!r} is given twice: give its paths in one, with commas")
        found[name] = SampleSource(weight, _reader(paths, options))
    return found


def _parsed(said: str) -> tuple[str, float, list[str]]:
    name, equals, rest = said.partition("=")
    weight, colon, paths = rest.partition(":")
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not (name and equals and colon and all(paths.split(","))) or not 0 < value < float("inf"):
        raise ConfigError(
            f"--source {said}: NAME=WEIGHT:PATH[,PATH] is expected, the weight a number above 0, such as "
            "python=0.3:corpora/python"
        )
    return name, value, paths.split(",")


def _reader(paths: list[str], options: ReadOptions) -> Callable[[], Iterator[str]]:
    return lambda: (document.text for document in read_documents(paths, options))


def _described(
    args: argparse.Namespace,
    vocab_size: int,
    special: list[str],
    sources: Mapping[str, SampleSource],
    samples: Mapping[str, SourceSample],
) -> dict[str, Any]:
    """What the report beside the tokenizer says. Nothing in it depends on the time or the machine."""
    tokenizer = load_tokenizer(args.output)
    encoder = open_encoder(tokenizer, np.int32)
    taken = max(1, sum(sample.bytes for sample in samples.values()))
    rows: dict[str, Any] = {}
    for name, sample in samples.items():
        size = tokens = 0
        for first in range(0, len(sample.chunks), 64):
            chunks = sample.chunks[first : first + 64]
            tokens += len(encoder.encode_documents(chunks)[0]) - len(chunks)
            size += sum(len(chunk.encode()) for chunk in chunks)
            if size >= _MEASURED_BYTES:
                break
        rows[name] = {
            "weight": sources[name].weight,
            "share": round(sample.bytes / taken, 6),
            "bytes": sample.bytes,
            "documents": sample.documents,
            "ran_dry": sample.dry,
            "bytes_per_token": round(size / tokens, 4) if tokens else None,
        }
    return {
        "kind": args.kind,
        "trained_by": tokenizer.library,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": vocab_size,
        "special": special,
        "sample": args.sample,
        "seed": args.seed if args.sample == "random" else None,
        "sample_bytes": sum(sample.bytes for sample in samples.values()),
        "sources": rows,
    }


def _print_sources(rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = new_table("", "source", "weight", "share of the sample", "MB", "documents", "bytes a token")
    for name, row in rows.items():
        held = "–" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.3f}"
        table.add_row(
            name,
            f"{row['weight']:g}",
            f"{row['share']:.2%}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['documents']:,}",
            held,
        )
    console_for_tables().print(table)
    if dry := [name for name, row in rows.items() if row["ran_dry"]]:
        rest = "the other sources took the rest of its share" if len(dry) < len(rows) else "all text there is was taken"
        print(f"ran dry: {', '.join(dry)}: {rest}")


def _refuse_existing(args: argparse.Namespace) -> None:
    written = [args.output, _report_path(args.output)]
    if args.kind == "byte-level-bpe":
        written.append(args.output.parent / "tokenizer_config.json")
    for path in written:
        if path.exists() and not args.overwrite:
            raise ConfigError(f"{path}: exists already: give another --output, or --overwrite to replace it")


def _report_path(output: Path) -> Path:
    return output.with_suffix(".training.json")


def _count(option: str, value: str) -> int:
    try:
        return parse_count(value)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
