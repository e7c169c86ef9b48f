"""From a checkpoint to a Hugging Face folder: streamed aside, proven (law C3), then published by one rename.

What a killed or failed export has written stays aside, and the same export goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.aside import made_aside, publish, remove
from megatron.checkpoint.imported import ORIGIN
from megatron.checkpoint.room import check_room
from megatron.checkpoint.storage import io_errors
from megatron.config.errors import StorageError
from megatron.config.version import VERSION
from megatron.hf.architecture import architecture_for, config_json
from megatron.hf.checkpoint_source import CheckpointSource
from megatron.hf.export_checks import DTYPES, check_free, check_names, dtype_named, folder_dtype
from megatron.hf.export_record import ExportRecord
from megatron.hf.import_weights import INDEX
from megatron.hf.model_card import CardWords, model_card
from megatron.hf.name_table import entries
from megatron.hf.parity import prove
from megatron.hf.proof_prompts import prompts_from
from megatron.hf.proof_record import TOLERANCE, Proof
from megatron.hf.proof_report import write_proof
from megatron.hf.shard_plan import DEFAULT_SHARD, ShardPlan, parse_size, plan_shards
from megatron.hf.shard_writer import Progress, Written, default_workers, write_shards
from megatron.hf.special_token_ids import token_ids
from megatron.hf.tokenizer_check import check_as_imported, check_equal, held_out_documents, sample_texts
from megatron.hf.tokenizer_files import keeps_its_habits, write_tokenizer
from megatron.hf.transformers_door import load_fast_tokenizer, require_transformers

TRAINING = "training_ledger.json"
SAMPLE = (
    "The committee met on a grey Tuesday, and nobody could say why the minutes had been kept in verse.\n\n"
    "def moving_average(values, width):\n    total = sum(values[:width])\n    yield total / width\n"
    "    for old, new in zip(values, values[width:]):\n        total += new - old\n        yield total / width\n"
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """An export that was published. `proof` is None with --no-prove; `kept` bytes were there from an earlier start."""

    folder: Path
    architecture: str
    parameters: int
    proof: Proof | None
    tokenizer_bytes_compared: int
    dtype: str = "float32"
    files: int = 1
    bytes: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Writing:
    """How the files are written. max_shard_size: bytes. workers: threads; None: by the cores."""

    max_shard_size: int = field(default_factory=lambda: parse_size(DEFAULT_SHARD))
    workers: int | None = None
    progress: Progress | None = None
    say: Say = lambda words: None


def export_checkpoint(
    source: CheckpointSource,
    output: Path,
    *,
    dtype: str = "float32",
    proven: bool = True,
    texts: Mapping[str, Sequence[int]] | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
    extent: str = "auto",
    writing: Writing | None = None,
    card: CardWords | None = None,
) -> Exported:
    """Writes, proves and publishes the folder `output`.

    dtype: a key of DTYPES, or "keep". texts: tokens to prove on, by where they come from; default a built-in passage.
    Raises ConfigError (the model cannot be expressed; output exists or is in use), CheckpointError (weights that are
    damaged, not finite, or not the shape's), ProofError (nothing is published then), UnavailableError, StorageError
    that says what is kept for the next start.
    """
    output, writing = Path(output), writing or Writing()
    architecture = architecture_for(source.shape)
    weights = source.ref.model()
    check_names(weights, source.shape)
    dtype = dtype_named(dtype, weights)
    if proven:
        require_transformers()
    table = list(entries(architecture.table, source.shape))
    plan = plan_shards(table, source.shape, DTYPES[dtype], writing.max_shard_size)
    with made_aside(output) as aside:
        check_free(output, overwrite)
        with _kept_aside(aside, _made_of(source, plan), plan.size, writing.say) as record:
            with io_errors(aside, "write"):
                _write_words(aside, source, dtype, plan)
            written = _write_tensors(aside, source, plan, record, writing)
            proof, compared = None, 0
            if proven:
                compared = _compare_tokenizer(aside, source, texts or {})
                proof = prove_folder(aside, source, dtype=dtype, texts=texts, tolerance=tolerance, extent=extent)
                write_proof(aside, proof, {"tokenizer_bytes_compared": compared})
            page = model_card(source, architecture.name, plan.parameters, dtype, proof, card)
            (aside / "README.md").write_text(page, encoding="utf-8")
            publish(aside, output, record.remove)
    return Exported(
        output,
        architecture.name,
        plan.parameters,
        proof,
        compared,
        dtype,
        len(plan.files),
        plan.bytes_of_tensors,
        written.kept,
    )


def prove_folder(
    folder: Path,
    source: CheckpointSource,
    *,
    dtype: str | None = None,
    texts: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = TOLERANCE,
    extent: str = "auto",
) -> Proof:
    """Law C3 for a folder on disk against the checkpoint it came from. Raises ProofError."""
    number = DTYPES[dtype or folder_dtype(folder)]
    tokens = texts or ({} if source.tokenizer is None else {"built-in text": source.tokenizer.encode(SAMPLE)})
    prompts = prompts_from(tokens, source.shape)
    weights = source.ref.model()
    return prove(folder, weights, source.shape, prompts, dtype=number, tolerance=tolerance, extent=extent)


def _made_of(source: CheckpointSource, plan: ShardPlan) -> dict[str, Any]:
    """All that decides the bytes of the files of tensors: an export of anything else begins anew."""
    return {"version": VERSION, "checkpoint": source.identity, "plan": plan.fingerprint}


@contextmanager
def _kept_aside(aside: Path, of: Mapping[str, Any], size: int, say: Say) -> Iterator[ExportRecord]:
    """The aside folder with its record. It stays where the disk failed or someone stopped the export, and goes where
    the export is wrong itself."""
    if aside.exists() and not ExportRecord.continues(aside, of):
        say(f"{aside}: an unfinished export of something else is removed")
        remove(aside)
    check_room(aside, size)
    with io_errors(aside, "create the folder"):
        aside.mkdir(exist_ok=True)
        record = ExportRecord(aside, of)
    if record.written:
        say(f"{aside}: going on from {len(record.written)} tensors of an unfinished export")
    try:
        yield record
    except KeyboardInterrupt:
        say(f"{aside}: keeps what is written: the same command goes on from it")
        raise
    except (StorageError, OSError):
        raise
    except BaseException:
        remove(aside)
        raise
    finally:
        record.close()


def _write_tensors(
    aside: Path, source: CheckpointSource, plan: ShardPlan, record: ExportRecord, writing: Writing
) -> Written:
    return write_shards(
        aside,
        plan,
        source.ref.model,
        source.shape,
        record,
        writing.workers or default_workers(),
        writing.progress,
        source.verify_bytes if source.unread else None,
    )


def _write_words(aside: Path, source: CheckpointSource, dtype: str, plan: ShardPlan) -> None:
    """Everything that is no tensor, no proof and no card."""
    tokenizer, origin = source.tokenizer, source.ref.state.get(ORIGIN)
    ids = token_ids(tokenizer, None if origin is None else origin.get("tokens"))
    end: Any = None
    config = config_json(source.shape, bos_token_id=end, eos_token_id=end, dtype=dtype)
    _write_json(aside / "config.json", config | ids.config)
    _write_json(aside / "generation_config.json", dict(ids.generation))
    if tokenizer is not None:
        write_tokenizer(aside, tokenizer, source.shape.max_position_embeddings, as_imported=origin is not None)
    if (index := plan.index()) is not None:
        _write_json(aside / INDEX, index)
    state = source.ref.state
    if state.get("data"):
        _write_json(aside / TRAINING, {"run": source.config.run.name, "step": source.ref.step} | state["data"])
    if ORIGIN in state:
        _write_json(aside / "origin.json", state[ORIGIN])


def _compare_tokenizer(aside: Path, source: CheckpointSource, texts: Mapping[str, Sequence[int]]) -> int:
    """Bytes of text on which the folder's tokenizer was compared. Raises ProofError."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        return 0
    fast = load_fast_tokenizer(aside)
    if ORIGIN in source.ref.state and keeps_its_habits(tokenizer):
        return check_as_imported(fast, tokenizer, sample_texts())
    return check_equal(fast, tokenizer, (*held_out_documents(texts, tokenizer), *sample_texts()))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
