"""`stagemix export_hf`: a checkpoint as a Hugging Face folder that proves itself (law C3)."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from megatron.checkpoint.aside import check_apart
from megatron.checkpoint.imported import ORIGIN
from megatron.commands.transfer_progress import shown
from megatron.config.errors import EXIT_DONE, ConfigError, StagemixError
from megatron.config.quantities import format_count
from megatron.evaluation.held_out_text import held_out_tokens
from megatron.hf.card_evaluation import read_evaluation
from megatron.hf.checkpoint_source import CheckpointSource, open_source
from megatron.hf.export import Exported, Writing, export_checkpoint, prove_folder
from megatron.hf.export_checks import DTYPES, KEEP, check_free, folder_dtype
from megatron.hf.model_card import CardWords
from megatron.hf.proof_record import TOLERANCE, Proof
from megatron.hf.proof_report import proof_lines
from megatron.hf.shard_plan import DEFAULT_SHARD, parse_size

EXAMPLE = """examples:
  stagemix export_hf --input runs/demo --output exports/demo
      exports the newest whole checkpoint of the run
  stagemix export_hf --input runs/demo/checkpoints/step-000001000 --output exports/step-1000 --dtype bfloat16 \\
                     --max-shard-size 2GB
  stagemix export_hf --input runs/demo --output exports/demo --evaluation evaluation.json \\
                     --license apache-2.0 --card-note "Trained on permissively licensed code alone."
      results of `stagemix evaluate` and your own words in the model card
  stagemix export_hf --input runs/demo --output exports/demo --check
      proves a folder that is there already, and writes nothing

The folder holds config.json, safetensors, a fast tokenizer, README.md with the training ledger, and proof.json.
AutoModelForCausalLM and AutoTokenizer load it with no code of ours and no network. It is made aside, in
.NAME.partial beside it: an export that was stopped goes on from there when the same command is given again.

exit codes: 0 done, 2 the model cannot be expressed, or the output exists or is in use, 3 a tokenizer of another model,
            4 the checkpoint is damaged or missing, 6 transformers is not installed, 7 the proof failed (then nothing
            is written), 74 disk"""


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
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, KEEP],
        default="float32",
        help="of the weights; keep: as they are stored (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", default=DEFAULT_SHARD, metavar="SIZE", help="of a file, as 500MB (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads that write (default: one a core, at most 4)")
    parser.add_argument("--tokenizer", metavar="PATH", help="instead of the checkpoint's own")
    parser.add_argument(
        "--prove",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare tokenizer, logits and every tensor before the folder is published (default: yes)",
    )
    parser.add_argument(
        "--proof",
        choices=["auto", "whole", "layers"],
        default="auto",
        help="both models whole in memory, or layer by layer; auto: by the memory there is",
    )
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the logits (default: %(default)g)")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported folder at --output")
    parser.add_argument("--check", action="store_true", help="only prove the folder at --output against --input")
    card = parser.add_argument_group("model card")
    card.add_argument("--evaluation", type=Path, metavar="FILE.json", help="what `stagemix evaluate --output` wrote")
    card.add_argument("--license", default="", metavar="ID", help='identifier of a licence, such as "apache-2.0"')
    card.add_argument(
        "--card-note",
        dest="notes",
        action="append",
        default=[],
        metavar="TEXT",
        help="a paragraph on licence, data or use; @FILE reads it from a file; may be given more than once",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code."""
    args = parser().parse_args(argv)
    size, card = parse_size(args.max_shard_size), _card(args)
    _check_numbers(args)
    if not args.check:
        check_apart(args.input, args.output)
        check_free(args.output, args.overwrite)
    source = open_source(args.input, args.tokenizer, later=not args.check)
    _note_small_tokenizer(args.tokenizer, source)
    texts = _held_out(source) if args.prove or args.check else None
    if args.check:
        dtype = folder_dtype(args.output)
        proof = prove_folder(args.output, source, dtype=dtype, texts=texts, tolerance=args.tolerance, extent=args.proof)
        _print_proof(proof)
        return EXIT_DONE
    began = time.monotonic()
    print(f"exporting {source.name} to {args.output}", flush=True)
    with shown("export") as progress:
        exported = export_checkpoint(
            source,
            args.output,
            dtype=args.dtype,
            proven=args.prove,
            texts=texts,
            overwrite=args.overwrite,
            tolerance=args.tolerance,
            extent=args.proof,
            writing=Writing(size, args.workers, progress, _note),
            card=card,
        )
    _print_exported(exported, time.monotonic() - began)
    return EXIT_DONE


def _check_numbers(args: argparse.Namespace) -> None:
    """Raises ConfigError for what no export can be made or proven with."""
    if args.workers is not None and args.workers < 1:
        raise ConfigError(
            f"--workers {args.workers}: at least one thread writes: give 1 or more, or leave it out for one a core"
        )
    if not (math.isfinite(args.tolerance) and args.tolerance >= 0):
        raise ConfigError(
            f"--tolerance {args.tolerance}: is the largest difference of a logit that passes: give a number such as "
            f"{TOLERANCE:g}, or leave it out"
        )


def _note_small_tokenizer(path: str | None, source: CheckpointSource) -> None:
    """A named tokenizer with fewer ids than the model has words may be another model's: no proof sees it."""
    given, words = source.tokenizer, source.shape.vocab_size
    if path and given is not None and given.vocab_size < words:
        _note(
            f"note: --tokenizer {path} has {given.vocab_size:,} ids and the model {words:,} words: the others are "
            "never given to it. The proof compares the models id by id, and cannot show that a tokenizer is the one "
            "that the model was trained with"
        )


def _note(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _card(args: argparse.Namespace) -> CardWords:
    evaluation = read_evaluation(args.evaluation) if args.evaluation else None
    return CardWords(tuple(map(_note_words, args.notes)), args.license, evaluation)


def _note_words(words: str) -> str:
    if not words.startswith("@"):
        return words
    try:
        return Path(words[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--card-note {words}: cannot be read: {error}") from None


def _held_out(source: CheckpointSource) -> dict[str, list[int]] | None:
    """Tokens of held-out documents to prove on; where the data are not at hand, None, and it is said."""
    if source.tokenizer is None:
        print("proving on random ids, as the checkpoint has no tokenizer")
        return None
    if ORIGIN in source.ref.state:
        print("proving on a built-in passage, as an imported model has no held-out documents")
        return None
    try:
        found = held_out_tokens(source.config, source.tokenizer, documents=64)
    except StagemixError as error:
        print(f"proving on a built-in passage, as the run's held-out documents cannot be read: {error}")
        return None
    end = source.tokenizer.eod_id
    return {f"held-out {name}": [token for row in rows for token in (*row, end)] for name, rows in found.items()}


def _print_exported(exported: Exported, seconds: float) -> None:
    if exported.tokenizer_bytes_compared:
        print(f"tokenizer equal on {format_count(exported.tokenizer_bytes_compared)} bytes of code and prose")
    if exported.proof is None:
        print("not proven (--no-prove)")
    else:
        _print_proof(exported.proof)
    kept = f", {exported.kept / 1e9:.2f} GB of them from an earlier start" if exported.kept else ""
    files = f"{exported.files} file{'s' if exported.files > 1 else ''} of tensors"
    print(
        f"{exported.architecture}, {format_count(exported.parameters)} parameters, {exported.dtype}, "
        f"{exported.bytes / 1e9:.2f} GB in {files}{kept}, in {seconds:.1f} s: {exported.folder}"
    )


def _print_proof(proof: Proof) -> None:
    print("\n".join(proof_lines(proof)))
