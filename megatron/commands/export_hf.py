"""`stagemix export_hf`: a checkpoint as a Hugging Face folder that proves itself (law C3)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron.config.errors import EXIT_DONE, StagemixError
from megatron.config.quantities import format_count
from megatron.evaluation.held_out_text import held_out_tokens
from megatron.hf.checkpoint_source import CheckpointSource, open_source
from megatron.hf.export import DTYPES, check_free, export_checkpoint, folder_dtype, prove_folder
from megatron.hf.parity import TOLERANCE, Proof

EXAMPLE = """examples:
  stagemix export_hf --input runs/demo --output exports/demo
      exports the newest whole checkpoint of the run
  stagemix export_hf --input runs/demo/checkpoints/step-000001000 --output exports/step-1000 --dtype bfloat16
  stagemix export_hf --input runs/demo --output exports/demo --check
      proves a folder that is there already, and writes nothing

The folder holds config.json, safetensors, a fast tokenizer, README.md with the training ledger, and proof.json.
AutoModelForCausalLM and AutoTokenizer load it with no code of ours and no network.

exit codes: 0 done, 2 the model cannot be expressed, or the output exists, 4 the checkpoint is damaged or missing,
            6 transformers is not installed, 7 the proof failed (then nothing is written), 74 disk"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = argparse.ArgumentParser(
        prog="stagemix export_hf",
        description="Writes a checkpoint as a Hugging Face folder, loads the folder in transformers, and compares its "
        "fp32 logits with those of our own model on the same tokens.",
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
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the Hugging Face folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: float32)")
    parser.add_argument(
        "--prove",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare tokenizer, logits and every tensor before the folder is published (default: yes)",
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the logits (default: %(default)g)")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported folder at --output")
    parser.add_argument("--check", action="store_true", help="only prove the folder at --output against --input")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    if not args.check:
        check_free(args.output, args.overwrite)
    source = open_source(args.input)
    texts = _held_out(source) if args.prove or args.check else None
    if args.check:
        dtype = folder_dtype(args.output)
        _print_proof(prove_folder(args.output, source, dtype=dtype, texts=texts, tolerance=args.tolerance))
        return EXIT_DONE
    began = time.monotonic()
    print(f"exporting {source.name} to {args.output}", flush=True)
    exported = export_checkpoint(
        source,
        args.output,
        dtype=args.dtype,
        proven=args.prove,
        texts=texts,
        overwrite=args.overwrite,
        tolerance=args.tolerance,
    )
    if exported.proof is None:
        print("not proven (--no-prove)")
    else:
        print(f"tokenizer equal on {format_count(exported.tokenizer_bytes_compared)} bytes of code and prose")
        _print_proof(exported.proof)
    seconds = time.monotonic() - began
    print(
        f"{exported.architecture}, {format_count(exported.parameters)} parameters, {args.dtype}, in {seconds:.1f} s: "
        f"{exported.folder}"
    )
    return EXIT_DONE


def _held_out(source: CheckpointSource) -> dict[str, list[int]] | None:
    """Tokens of held-out documents to prove on; where the data are not at hand, None, and it is said."""
    try:
        found = held_out_tokens(source.config, source.tokenizer, documents=64)
    except StagemixError as error:
        print(f"proving on a built-in passage, as the run's held-out documents cannot be read: {error}")
        return None
    end = source.tokenizer.eod_id
    return {f"held-out {name}": [token for row in rows for token in (*row, end)] for name, rows in found.items()}


def _print_proof(proof: Proof) -> None:
    print(f"{'tokens':>7}  {'logit difference':>16}  {'NLL difference':>14}  {'greedy agrees':>13}  text")
    for item in proof.comparisons:
        print(
            f"{item.length:>7}  {item.largest_logit_difference:>16.3e}  {item.nll_difference:>14.3e}  "
            f"{100 * item.greedy_agreement:>11.1f} %  {item.text}"
        )
    print(
        f"largest fp32 logit difference to transformers {proof.transformers}: {proof.largest_logit_difference:.3e} "
        f"(tolerance {proof.tolerance:g}); {proof.tensors_compared} tensors read back bit for bit: proven"
    )
