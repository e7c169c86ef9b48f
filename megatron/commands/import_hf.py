"""`stagemix import_hf`: a Hugging Face folder as a checkpoint to train on from, to export or to evaluate."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from megatron.checkpoint.aside import check_apart
from megatron.commands.transfer_progress import shown
from megatron.config.errors import EXIT_DONE
from megatron.config.quantities import format_count
from megatron.hf.import_folder import DTYPES, Imported, import_folder

EXAMPLE = """examples:
  stagemix import_hf --input models/Llama-3.2-1B --output imports/llama-1b
  stagemix import_hf --input models/pythia-160m --output imports/pythia --dtype float32
  stagemix import_hf --input models/mine --output imports/mine --tokenizer data/tokenizer.model

Read are config.json, safetensors and tokenizer files. Code and pickle files in the folder are never read or run.
The checkpoint is of step 0. A training stage takes its weights by  take = { weights = "imports/llama-1b" } ; its
config.toml is a run to be filled in that does so.

exit codes: 0 done, 2 the decoder cannot express the model, or the output exists, 3 the tokenizer does not fit,
            4 files are missing, damaged or contradict config.json, 74 disk (then nothing is left)"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix import_hf",
        description="Writes the model in a Hugging Face folder as a checkpoint, tensor by tensor.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(built)
    return built


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--input", type=Path, required=True, metavar="HF_FOLDER", help="a folder with config.json")
    parser.add_argument("--output", type=Path, required=True, metavar="CHECKPOINT", help="the checkpoint to write")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="keep", help="of the weights; keep: each as it is (default)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="PATH", help="instead of the folder's own")
    which.add_argument("--no-tokenizer", action="store_true", help="take none along")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --output")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    check_apart(args.input, args.output)
    began = time.monotonic()
    print(f"importing {args.input} to {args.output}", flush=True)
    with shown("import") as progress:
        imported = import_folder(
            args.input,
            args.output,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            without_tokenizer=args.no_tokenizer,
            overwrite=args.overwrite,
            progress=progress,
        )
    print("\n".join(summary(imported, time.monotonic() - began)))
    return EXIT_DONE


def summary(imported: Imported, seconds: float) -> list[str]:
    """What was imported, and the next commands."""
    shape, tokenizer = imported.shape, imported.tokenizer
    lines = [
        f"{imported.architecture}, {format_count(imported.parameters)} parameters, {'/'.join(imported.dtypes)}, "
        f"{imported.bytes / 1e9:.2f} GB, in {seconds:.1f} s: {imported.checkpoint}",
        f"  {shape.num_hidden_layers} layers of width {shape.hidden_size}, {shape.vocab_size:,} words, up to "
        f"{shape.max_position_embeddings:,} positions",
    ]
    if tokenizer is not None:
        lines.append(f"  tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} ids; {tokenizer.eod_id} ends a document")
    lines += [f"  note: {note}" for note in imported.notes]
    place = shlex.quote(str(imported.checkpoint))
    files = tokenizer.files() if tokenizer else []
    path = "TOKENIZER" if tokenizer is None else f"{place}/tokenizer/{files[0].name}" if files else "bytes"
    command = "stagemix" if Path(sys.argv[0]).name == "stagemix" else "python tools/{}.py"
    return [
        *lines,
        "next:",
        f"  {_call(command, 'preprocess_data')} --input CORPUS --output-prefix data/mine --tokenizer {path}",
        f"  cp {place}/config.toml mine.toml    # fill in what is marked YOURS, then: "
        f"{_call(command, 'train')} mine.toml",
        f"  {_call(command, 'export_hf')} --input {place} --output {place}-hf --dtype keep",
    ]


def _call(command: str, name: str) -> str:
    return command.format(name) if "{" in command else f"{command} {name}"
