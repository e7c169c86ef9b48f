"""`stagemix export_megatron`: a checkpoint as Megatron-LM's classic files, at any tensor and pipeline sizes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron.checkpoint.aside import check_apart
from megatron.commands.transfer_progress import shown
from megatron.config.errors import EXIT_DONE
from megatron.config.quantities import format_count
from megatron.foreign.megatron_args_written import flags_for
from megatron.foreign.megatron_export import MegatronLayout, check_free, check_layout, export_megatron
from megatron.hf.checkpoint_source import open_source
from megatron.hf.export_checks import DTYPES, KEEP

EXAMPLE = """examples:
  stagemix export_megatron --input runs/demo --output megatron/demo --tensor 2 --pipeline 2 --dtype bfloat16
      the newest whole checkpoint of the run, for --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
  stagemix export_megatron --input imports/gpt2 --output megatron/gpt2 --format legacy

Formats: mcore (names of Transformer Engine's fused layers, Megatron-LM's default), mcore-local (--transformer-impl
local), legacy (--use-legacy-models, until 2025). The files hold weights and args, no optimizer and no random states:
load them with --load FOLDER --use-checkpoint-args --no-load-optim --no-load-rng --finetune. See docs/megatron.md.

exit codes: 0 done, 2 Megatron-LM cannot express the model at these sizes, or the output exists, 4 the checkpoint is
            damaged or missing, 74 disk (then nothing is left)"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix export_megatron",
        description="Writes a checkpoint's weights as mp_rank_XX[_YYY]/model_optim_rng.pt, one rank at a time.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(built)
    return built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--input", type=Path, required=True, metavar="CHECKPOINT", help="a checkpoint folder, or a run folder"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for Megatron-LM's --load")
    parser.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor-parallel ranks (default: 1)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="P", help="pipeline ranks (default: 1)")
    parser.add_argument(
        "--format",
        choices=["mcore", "mcore-local", "legacy"],
        default="mcore",
        help="whose names (default: %(default)s)",
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        dest="divisible_by",
        type=int,
        default=128,
        metavar="N",
        help="as Megatron-LM will be told: the vocabulary is padded to a multiple of N x T (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=[*DTYPES, KEEP], default=KEEP, help="of the weights; keep: as they are stored (default)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint of Megatron-LM at --output")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    began = time.monotonic()
    check_apart(args.input, args.output)
    check_free(args.output, args.overwrite)
    source = open_source(args.input)
    layout = MegatronLayout(args.tensor, args.pipeline, args.format, args.divisible_by)
    check_layout(source.shape, layout)
    words = f"{source.shape.vocab_size:,} words padded to {layout.words(source.shape):,}"
    print(f"exporting {source.name} to {args.output}: {words}", flush=True)
    dtype = None if args.dtype == KEEP else DTYPES[args.dtype]
    with shown("export") as progress:
        size = export_megatron(
            source.weights.source,
            source.shape,
            args.output,
            layout,
            iteration=source.ref.step,
            dtype=dtype,
            overwrite=args.overwrite,
            progress=progress,
        )
    flags = flags_for(source.shape, args.format, args.divisible_by)
    print(
        f"{format_count(source.shape.parameter_count())} parameters, {args.format}, {args.tensor} tensor x "
        f"{args.pipeline} pipeline ranks, {size / 1e9:.2f} GB, in {time.monotonic() - began:.1f} s: {args.output}\n"
        "load it with:\n"
        f"  --load {args.output} --use-checkpoint-args --ckpt-format torch --no-load-optim --no-load-rng --finetune "
        f"{' '.join(flags)}"
    )
    return EXIT_DONE
