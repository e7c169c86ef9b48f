"""`stagemix import_megatron`: a checkpoint of Megatron-LM or GPT-NeoX as one of ours."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.aside import check_apart
from megatron.checkpoint.imported import write_imported
from megatron.checkpoint.weights_alone import check_free
from megatron.commands.transfer_progress import shown
from megatron.config.errors import EXIT_DONE, ConfigError, DataError
from megatron.config.model_shape import ModelShape
from megatron.config.quantities import format_count
from megatron.foreign.checkpoint import ForeignCheckpoint, foreign_shape, open_foreign, parse_overrides
from megatron.hf.continued_config import continued_config
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer

KIND = {"Megatron-LM": "megatron_lm", "GPT-NeoX": "gpt_neox"}
DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EXAMPLE = """examples:
  stagemix import_megatron --input megatron/gpt-1b --output imports/gpt-1b --tokenizer tokenizer.json --allow-pickle
      the iteration that latest_checkpointed_iteration.txt names, whatever its tensor and pipeline sizes
  stagemix import_megatron --input neox/global_step143000 --output imports/pythia --tokenizer 20B_tokenizer.json \\
                           --config neox/configs/pythia/160M.yml --allow-pickle
  stagemix import_megatron --input megatron/old --output imports/old --iteration 50000 --set bias_gelu_fusion=False \\
                           --vocab-size 50257 --no-tokenizer --allow-pickle

Read are mp_rank_XX[_YYY]/model_optim_rng.pt of Megatron-LM (legacy and mcore names, checkpoint_version 0 to 3), and
layer_XX-model_YY-model_states.pt or mp_rank_XX_model_states.pt of GPT-NeoX. These files are pickles: here they are read
as data and nothing in them is run, which --allow-pickle permits. See docs/megatron.md.

exit codes: 0 done, 2 not permitted, the decoder cannot express the model, or the output exists, 3 the tokenizer does
            not fit, 4 files are missing, damaged or contradict each other, 74 disk (then nothing is left)"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix import_megatron",
        description="Merges a checkpoint of Megatron-LM or GPT-NeoX, of any tensor and pipeline sizes, into a "
        "checkpoint to train on from, to export or to evaluate.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(built)
    return built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--input", type=Path, required=True, metavar="FOLDER", help="what the trainer saved into")
    parser.add_argument("--output", type=Path, required=True, metavar="CHECKPOINT", help="the checkpoint to write")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="permits reading pickles, as data: nothing in them is run"
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="default: the one that the folder says is newest")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", metavar="PATH", help="the model's own: it says how many words are real")
    which.add_argument("--no-tokenizer", action="store_true", help="take none along")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="real words (default: the tokenizer's ids; without one all rows)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="YML",
        help="GPT-NeoX' configs, if not in the folder",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument said anew, such as one that an older version did not keep; may be given more than once",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="keep", help="of the weights; keep: each as it is (default)"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the files with their own checksums first (default: yes; reads them once more)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --output")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    began = time.monotonic()
    check_apart(args.input, args.output)
    check_free(args.output, args.overwrite)
    opened = open_foreign(
        args.input,
        pickles_allowed=args.allow_pickle,
        iteration=args.iteration,
        configs=args.config,
        overrides=parse_overrides(args.overrides),
        verify=args.verify,
    )
    try:
        print("\n".join(found_lines(opened)), flush=True)
        tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
        shape = foreign_shape(opened, words_of(opened, tokenizer, args.vocab_size))
        if doubts := opened.padding.doubts(shape.vocab_size):
            print(f"  note: {doubts}", flush=True)
        with shown("import") as progress:
            write(opened, shape, tokenizer, args, progress)
        print("\n".join(done_lines(opened, shape, args, time.monotonic() - began)))
    finally:
        opened.close()
    return EXIT_DONE


def words_of(opened: ForeignCheckpoint, tokenizer: Tokenizer | None, said: int | None) -> int:
    """How many words are real. Raises DataError for a tokenizer of another model, ConfigError for a size."""
    if tokenizer is not None and tokenizer.vocab_size > (said or opened.words):
        raise DataError(
            f"the tokenizer {tokenizer.name} gives ids up to {tokenizer.vocab_size - 1}, and the embedding has "
            f"{said or opened.words} words: it is not this model's: name another with --tokenizer"
        )
    if said is not None and not 1 <= said <= opened.words:
        raise ConfigError(f"--vocab-size {said}: the embedding has {opened.words} rows, padding included")
    if said is None and tokenizer is not None:
        opened.padding.check(tokenizer.vocab_size, f"the tokenizer {tokenizer.name}")
    return said or (tokenizer.vocab_size if tokenizer else opened.words)


def write(
    opened: ForeignCheckpoint,
    shape: ModelShape,
    tokenizer: Tokenizer | None,
    args: argparse.Namespace,
    progress: Any,
) -> None:
    """Writes and publishes the checkpoint."""
    files = tokenizer.files() if tokenizer else []
    place = args.output.absolute()
    path = place / "tokenizer" / files[0].name if files else Path("bytes") if tokenizer else None
    name = opened.folder.resolve().parent.name or "imported"
    origin = opened.origin()
    text = continued_config(shape, name, f"{opened.trainer}, step {opened.step} of {name}", place, path)
    identity = None
    if tokenizer is not None:
        identity = {key: getattr(tokenizer, key) for key in ("name", "fingerprint", "vocab_size", "eod_id")}
    write_imported(
        args.output,
        opened.tensors(shape),
        shape.to_json(),
        files,
        text,
        {"kind": KIND[opened.trainer], **origin, "said_anew": parse_overrides(args.overrides)},
        tokenizer=identity,
        dtype=DTYPES[args.dtype],
        overwrite=args.overwrite,
        progress=progress,
    )


def found_lines(opened: ForeignCheckpoint) -> list[str]:
    """What the files say, and what of it is left behind."""
    size = sum(file.path.stat().st_size for file in opened.files)
    lines = [f"{opened.trainer}, step {opened.step}, {size / 1e9:.2f} GB: {opened.folder}"]
    lines += [f"  {line}" for line in opened.said]
    if opened.ignored:
        lines.append(f"  left behind: {', '.join(opened.ignored)}")
    return lines


def done_lines(opened: ForeignCheckpoint, shape: ModelShape, args: argparse.Namespace, seconds: float) -> list[str]:
    """What was written, and the next commands."""
    lines = [f"  note: {note}" for note in opened.notes()]
    padding = opened.words - shape.vocab_size
    words = f"{shape.vocab_size:,} words" + (f" ({padding:,} rows of padding left out)" if padding else "")
    lines.append(f"{format_count(shape.parameter_count())} parameters, {words}, in {seconds:.1f} s: {args.output}")
    if args.no_tokenizer:
        lines.append("  no tokenizer: name your data's in [tokenizer] path, and for export_hf with --tokenizer")
    call = "stagemix {}" if Path(sys.argv[0]).name == "stagemix" else "python tools/{}.py"
    return [
        *lines,
        "next:",
        f"  {call.format('export_hf')} --input {args.output} --output {args.output}-hf --dtype keep",
        f"  cp {args.output}/config.toml mine.toml    # fill in what is marked YOURS, then: "
        f"{call.format('train')} mine.toml",
    ]
