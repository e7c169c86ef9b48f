"""`stagemix merge_data`: publishes the dataset whose shards several processes have preprocessed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from megatron.commands.preprocess_progress import print_summary
from megatron.preprocessing.merge import merge
from megatron.preprocessing.processes import signals_stop

_EPILOG = """\
example:
  stagemix merge_data --output-prefix data/code

Run it once, when every `stagemix preprocess_data … --shard I/N` of the prefix is done. It needs neither the inputs nor
the tokenizer: all that was decided is in P.parts. Tokens are copied once, duplicates of all shards are left out, and
P.bin, P.json and P.idx appear. Shards that are missing are named, in the form that sbatch --array takes.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="stagemix merge_data",
        description="Publish the dataset (.bin/.idx) whose shards have been preprocessed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-prefix", required=True, type=Path, metavar="P", help="reads P.parts, writes P.bin, …")
    parser.add_argument("--overwrite", action="store_true", help="replace P.bin, P.idx and P.json if they exist")
    parser.add_argument("--keep-parts", action="store_true", help="leave P.parts when the dataset is published")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the dataset is published."""
    args = build_parser().parse_args(argv)
    began = time.perf_counter()
    with signals_stop(), tqdm(unit="token", unit_scale=True, desc="merge", file=sys.stderr, disable=None) as bar:

        def show(written: int, tokens: int) -> None:
            bar.total = tokens
            bar.update(written - bar.n)

        manifest = merge(args.output_prefix, overwrite=args.overwrite, keep_parts=args.keep_parts, progress=show)
    print_summary(args.output_prefix, manifest, time.perf_counter() - began, 0)
    return 0
