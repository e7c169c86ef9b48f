"""All parts to the published dataset: tokens are copied once, duplicates left out, `.idx` built from lengths."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.errors import DataError
from megatron.config.version import VERSION
from megatron.corpora.cleaning import CleaningOptions, Decider
from megatron.corpora.near_duplicates import NearOptions
from megatron.data.indexed_format import path_of
from megatron.data.indexed_writer import IndexedDatasetWriter, refuse_existing
from megatron.data.loss_mask import LossMaskWriter
from megatron.preprocessing.locks import locked
from megatron.preprocessing.parts import Part, PartKey, open_part
from megatron.preprocessing.shards import (
    IN_USE,
    current_encoder,
    quarantine_path,
    read_shard_marker,
)
from megatron.preprocessing.storage import storage_errors
from megatron.preprocessing.work_plan import PLAN_NAME, WorkPlan, parts_folder, read_plan

_SIGNATURES = ("exact", "near")
_GROUPS = ("languages", "sources")


def merge(
    output_prefix: str | Path,
    *,
    overwrite: bool = False,
    keep_parts: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Publish `P.bin`, `P.json` and `P.idx` from the parts that all shards wrote to `P.parts`; gives the manifest.

    The parts are removed then, unless kept. `progress(tokens written, tokens in all)`. Raises DataError where shards
    are missing (they are named), a shard still runs, or no text is left; ConfigError where the output exists.
    """
    refuse_published(Path(output_prefix), overwrite)
    folder = parts_folder(output_prefix)
    plan = read_plan(folder)
    if plan is None:
        raise DataError(f"{folder}: no parts are here to merge: run preprocess_data with this output prefix first")
    with locked(folder / IN_USE, shared=False) as lock:
        if lock is None:
            raise DataError(f"{folder}: a shard is still being made, or merged, by another process: wait for it")
        return merge_parts(output_prefix, plan, overwrite=overwrite, keep_parts=keep_parts, progress=progress)


def refuse_published(prefix: Path, overwrite: bool) -> None:
    """Raise ConfigError where a dataset of this name is there and may not be replaced.

    A `.bin` without its `.idx` beside a plan is what a merge left that was killed while it published: not a dataset.
    """
    unfinished = (parts_folder(prefix) / PLAN_NAME).exists() and not path_of(prefix, ".idx").exists()
    refuse_existing(prefix, overwrite or unfinished)


def merge_parts(
    output_prefix: str | Path,
    plan: WorkPlan,
    *,
    overwrite: bool,
    keep_parts: bool,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """`merge` for a caller that holds the folder's lock."""
    prefix, folder = Path(output_prefix), parts_folder(output_prefix)
    parts = _parts_in_order(folder, plan)
    totals = _Totals()
    refuse_published(prefix, overwrite)
    with (
        storage_errors(path_of(prefix, ".bin.partial")),
        IndexedDatasetWriter(prefix, plan.content["dtype"], overwrite=True) as writer,
    ):
        if "chat" in plan.content["options"]:
            writer.mask = LossMaskWriter(prefix)
        dropped, duplicates = _duplicates(folder, parts, plan)
        all_tokens = sum(part.summary["tokens"] for part in parts)
        place = 0
        for part in parts:
            rows = int(part.summary["documents"])
            _copy(part, ~dropped[place : place + rows] if len(dropped) else None, writer, totals)
            place += rows
            if progress is not None:
                progress(writer.token_count, all_tokens)
        if writer.token_count == 0:
            raise DataError(f"{', '.join(plan.content['inputs'])}: {_nothing_left(totals, duplicates)}")
        writer.manifest_fields = _manifest_fields(folder, plan, writer, totals, duplicates)
        _publish_quarantine(prefix, folder, plan, totals)
        manifest = writer.finish()
    if not keep_parts:
        shutil.rmtree(folder)
    return manifest


@dataclass
class _Totals:
    """What the parts add up to."""

    records: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    chat: Counter[str] = field(default_factory=Counter)
    groups: dict[str, dict[str, NDArray[np.int64]]] = field(default_factory=dict)

    def add_group(self, kind: str, names: list[str], codes: NDArray[np.int32], *columns: NDArray[np.int64]) -> None:
        """Add documents, bytes and tokens of a part's documents to those of their language or source."""
        sums = [np.bincount(codes, minlength=len(names))]
        # float64 weights are exact here: a part has far less than 2^53 bytes
        sums += [np.bincount(codes, column, minlength=len(names)).astype(np.int64) for column in columns]
        table = self.groups.setdefault(kind, {})
        for name, row in zip(names, np.stack(sums, axis=1), strict=True):
            if row[0]:
                table[name] = table.get(name, np.zeros(3, np.int64)) + row


def _parts_in_order(folder: Path, plan: WorkPlan) -> list[Part]:
    encoder = current_encoder(folder, plan)
    markers = {n: read_shard_marker(folder, n, plan, encoder.backend) for n in range(1, plan.shards + 1)}
    if missing := [number for number, marker in markers.items() if marker is None]:
        if plan.shards == 1:
            raise DataError(f"{folder}: not all parts are made yet: run the preprocessing command again")
        raise DataError(
            f"{folder}: {len(missing)} of {plan.shards} shards are not complete: {_ranges(missing)}. Run "
            f"preprocess_data --shard {missing[0]}/{plan.shards} with the other options as before; then merge"
        )
    parts: list[Part] = []
    for number, marker in markers.items():
        for file_number, block_number in marker or ():
            part = open_part(folder, PartKey(file_number, block_number))
            if part is None or (part.summary["plan"], part.summary["backend"]) != (plan.fingerprint, encoder.backend):
                raise DataError(
                    f"{folder / PartKey(file_number, block_number).name}: the part is missing or damaged: run "
                    f"the preprocessing command (shard {number}/{plan.shards}) again, which makes what is missing"
                )
            parts.append(part)
    return parts


def _ranges(numbers: list[int]) -> str:
    """ "1, 4-6, 9", which is also what `sbatch --array` takes."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _duplicates(folder: Path, parts: list[Part], plan: WorkPlan) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Which documents of all parts to leave out (empty: none was looked for), and how many by reason."""
    cleaning = plan.content["options"]["cleaning"]
    near = cleaning["near_duplicates"]
    options = CleaningOptions(
        exact=cleaning["exact_duplicates"] or "", near=None if near is None else _near_options(near)
    )
    if not options.finds_duplicates or not any(part.summary["documents"] for part in parts):
        return np.zeros(0, np.bool_), {}
    decider = Decider(options)
    arrays: dict[str, NDArray[Any]] = {}
    scratch: list[Path] = []
    try:
        for name in _SIGNATURES:
            holders = [part for part in parts if part.has(name)]
            if not holders:
                continue
            # One file of all: mapped, it costs no memory, and a process may only map some 65,000 files.
            path = folder / f"{name}.signatures"
            scratch.append(path)
            first = holders[0].summary["sections"][name]
            with path.open("wb") as file:
                for part in holders:
                    file.write(part.array(name).tobytes())
            arrays[name] = np.memmap(path, first["dtype"], "r").reshape(-1, *first["shape"][1:])
        decider.add(arrays)
        return decider.finish()
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)


def _near_options(described: dict[str, Any]) -> NearOptions:
    return NearOptions(**{name: value for name, value in described.items() if name != "library"})


def _copy(part: Part, keep: NDArray[np.bool_] | None, writer: IndexedDatasetWriter, totals: _Totals) -> None:
    """The part's documents to the dataset, without those that are not kept."""
    summary = part.summary
    totals.records += summary["records"]
    for name in ("skipped", "rejected", "quarantined", "chat"):
        getattr(totals, name).update(summary.get(name, {}))
    lengths, text_bytes = part.array("lengths"), part.array("text_bytes")
    chunks = _ahead(part.id_chunks(writer.dtype))
    if keep is None or keep.all():
        keep = None
        for chunk in chunks:
            writer.write_tokens(chunk, summary["max_token_id"])
    else:
        for chunk in _kept(chunks, lengths, keep):
            writer.write_tokens(chunk, int(chunk.max()) if len(chunk) else -1)
    for kind in _GROUPS:
        codes = part.array(kind) if part.has(kind) else np.zeros(len(lengths), np.int32)
        names = summary[kind] if part.has(kind) else [""]
        chosen = slice(None) if keep is None else keep
        totals.add_group(kind, names, codes[chosen], text_bytes[chosen], lengths[chosen])
    writer.end_documents(lengths if keep is None else lengths[keep])
    if writer.mask is not None and part.has("loss_mask"):
        targets = np.unpackbits(part.array("loss_mask"), count=int(lengths.sum()), bitorder="little")
        writer.mask.add(targets if keep is None else targets[np.repeat(keep, lengths)])
    totals.text_bytes += int(text_bytes.sum() if keep is None else text_bytes[keep].sum())


def _ahead(chunks: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The same, the next one being read and summed while one is hashed and written."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = reader.submit(next, chunks, None)
            yield chunk


def _kept(
    chunks: Iterator[NDArray[Any]], lengths: NDArray[np.int64], keep: NDArray[np.bool_]
) -> Iterator[NDArray[Any]]:
    """The ids of the documents that are kept, chunk by chunk; documents may span chunks."""
    ends = np.cumsum(lengths)
    at = 0
    for chunk in chunks:
        low, high = np.searchsorted(ends, (at, at + len(chunk) - 1), side="right")
        begins = np.maximum(ends[low : high + 1] - lengths[low : high + 1], at)
        inside = np.minimum(ends[low : high + 1], at + len(chunk)) - begins
        yield chunk[np.repeat(keep[low : high + 1], inside)]
        at += len(chunk)


def _nothing_left(totals: _Totals, duplicates: dict[str, int]) -> str:
    reasons = totals.skipped + totals.rejected + totals.quarantined + Counter(duplicates)
    told = ", ".join(f"{name}: {count:,}" for name, count in sorted(reasons.items())) or "no record was found"
    if set(reasons) <= {"empty document", "blank line"}:
        return f"every document is empty: there is nothing to train on ({told})"
    return f"no document is left: there is nothing to train on ({told})"


def _manifest_fields(
    folder: Path, plan: WorkPlan, writer: IndexedDatasetWriter, totals: _Totals, duplicates: dict[str, int]
) -> dict[str, Any]:
    content = plan.content
    skipped = totals.skipped + Counter(content["skipped"])
    encoder = current_encoder(folder, plan)
    fields: dict[str, Any] = {
        "bytes_of_text": totals.text_bytes,
        "bytes_per_token": round(totals.text_bytes / writer.token_count, 4),
        "tokenizer": content["tokenizer"],
        "encoder": {"backend": encoder.backend, "note": encoder.note},
        "options": {**content["options"]["read"], "cleaning": content["options"]["cleaning"], "append_eod": True},
        "inputs": content["inputs"],
        "input_files": content["input_files"],
        "counts": {
            "records": totals.records,
            "kept": writer.document_count,
            "rejected": dict(sorted(totals.rejected.items())),
            "duplicates": duplicates,
            "quarantined": dict(sorted(totals.quarantined.items())),
        },
        "skipped": dict(sorted(skipped.items())),
        "versions": {"stagemix": VERSION},
    }
    if "chat" in content["options"]:
        fields["chat"] = content["options"]["chat"]
        fields["counts"]["chat"] = dict(sorted(totals.chat.items()))
    for kind, table in sorted(totals.groups.items()):
        if any(table):  # where no document names one there is nothing to tell
            fields[kind] = {name: _group(*table[name].tolist()) for name in sorted(table)}
    return fields


def _group(documents: int, text_bytes: int, tokens: int) -> dict[str, Any]:
    return {
        "documents": documents,
        "bytes_of_text": text_bytes,
        "tokens": tokens,
        "bytes_per_token": round(text_bytes / tokens, 4),
    }


def _publish_quarantine(prefix: Path, folder: Path, plan: WorkPlan, totals: _Totals) -> None:
    """`P.quarantine.jsonl`, in the order of the corpus; none where nothing was set aside."""
    target = path_of(prefix, ".quarantine.jsonl")
    if not totals.quarantined:
        target.unlink(missing_ok=True)
        return
    partial = path_of(prefix, ".quarantine.jsonl.partial")
    with partial.open("wb") as output:
        for number in range(1, plan.shards + 1):
            with quarantine_path(folder, number, plan).open("rb") as source:
                shutil.copyfileobj(source, output)
        output.flush()
        os.fsync(output.fileno())
    os.replace(partial, target)
