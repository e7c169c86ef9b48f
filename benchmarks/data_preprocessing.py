"""Rows 1 and 2 of the data benchmark: jsonl to `.bin/.idx`, byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

import hashlib
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_measure import Figure, Outcome, Row, in_turns
from data_setup import HERE, Setup, peaks_of, seconds_of

WORKERS = 2


@dataclass(frozen=True)
class Inputs:
    """What `data_ours.py prepare` made: corpora as dictionaries of their facts, and both tokenizers."""

    whole: dict[str, Any]
    part: dict[str, Any]
    byte_level: str
    sentencepiece: str
    words: str


def prepare(setup: Setup) -> Inputs:
    """Makes corpora and tokenizers where they are not there yet. Not timed."""
    sizes = setup.sizes
    outcome = setup.ours(
        "prepare",
        {
            "folder": str(setup.work),
            "size": sizes.corpus,
            "share": sizes.first_part,
            "vocabulary": sizes.vocabulary,
            "roots": [str(HERE.parent / name) for name in ("megatron", "docs", "csrc")] if setup.quick else None,
        },
    )
    return Inputs(**outcome.values)


def our_tool(setup: Setup, corpus: dict[str, Any], tokenizer: str, folder: Path) -> Outcome:
    """One run of tools/preprocess_data.py, as a user runs it."""
    from data_measure import measure

    command = [
        sys.executable, HERE.parent / "tools" / "preprocess_data.py",
        "--input", corpus["path"], "--output-prefix", folder / "out", "--tokenizer", tokenizer,
        "--workers", str(WORKERS),
    ]  # fmt: skip
    return measure(command, setup.limit)


def peer_arguments(corpus: dict[str, Any], kind: str, tokenizer: str, folder: Path, *more: str) -> list[str]:
    """The command line of its preprocessing tools."""
    return [
        "--input", corpus["path"], "--output-prefix", str(folder / "out"), "--append-eod",
        "--tokenizer-type", kind, "--tokenizer-model", tokenizer, *more,
    ]  # fmt: skip


def byte_level(setup: Setup) -> Row:
    """Row 1."""
    inputs = prepare(setup)
    row = Row("preprocess", f"jsonl to .bin/.idx, byte-level BPE of {setup.sizes.vocabulary:,}, {WORKERS} workers")
    row.remarks.append(f"corpus: {inputs.words}")
    fast = "tools/preprocess_data_fast.py"
    tokenizer = str(Path(inputs.byte_level) / "tokenizer.json")

    def ours(corpus: dict[str, Any]) -> Outcome:
        return our_tool(setup, corpus, tokenizer, setup.fresh("ours"))

    def theirs(corpus: dict[str, Any]) -> Outcome:
        arguments = peer_arguments(corpus, "HuggingFaceTokenizer", inputs.byte_level, setup.fresh("peer"))
        return setup.their_tool(fast, [*arguments, "--use-gigatoken"])

    part = in_turns(setup.sides(lambda n: ours(inputs.part), lambda n: theirs(inputs.part)), setup.repeat)
    whole = in_turns(setup.sides(lambda n: ours(inputs.whole), lambda n: theirs(inputs.whole)), setup.repeat)
    row.note_loads(part)
    row.note_loads(whole)
    row.figures = [
        Figure(f"whole job, {fast}", "s", seconds_of(whole, "peer"), seconds_of(whole, "ours"), "≥ 3x"),
        Figure(
            "steady state (from two sizes)", "MB/s",
            steady(part, whole, inputs, "peer"), steady(part, whole, inputs, "ours"), "≥ 1.3x", higher=True,
        ),
        Figure("peak memory of a process", "MB", peaks_of(whole, "peer"), peaks_of(whole, "ours"), "≤ 300 MB"),
    ]  # fmt: skip
    _same_bytes(setup, row, fast)
    if setup.peer is not None:
        _slow_tool(setup, row, inputs, statistics.median(seconds_of(whole, "ours")))
    else:
        outcome = _ids(setup, inputs.byte_level, inputs.whole)
        row.checks.append(f"ids equal to tokenizers' on each of {outcome['documents']:,} documents")
    return row


def _slow_tool(setup: Setup, row: Row, inputs: Inputs, our_seconds: float) -> None:
    """preprocess_data.py once over everything (it takes a minute), and with --use-gigatoken over the part."""
    tool, megabytes = "tools/preprocess_data.py", inputs.whole["bytes"] / 1e6
    workers = ["--workers", str(WORKERS)]
    for name, corpus, more in ((tool, inputs.whole, []), (f"{tool} --use-gigatoken", inputs.part, ["--use-gigatoken"])):
        folder = setup.fresh("peer")
        arguments = peer_arguments(corpus, "HuggingFaceTokenizer", inputs.byte_level, folder, *workers, *more)
        outcome = setup.their_tool(tool, arguments)
        row.note_loads({"peer": [outcome]})
        rate = corpus["bytes"] / 1e6 / outcome.seconds
        row.figures.append(
            Figure(f"whole job, {name}", "MB/s", [rate], [megabytes / our_seconds], higher=True),
        )
        if corpus is inputs.whole:
            _same_bytes(setup, row, f"{tool} (Hugging Face tokenizers, every document)")


def sentencepiece(setup: Setup) -> Row:
    """Row 2."""
    inputs = prepare(setup)
    row = Row("sentencepiece", f"the same with a SentencePiece BPE of {setup.sizes.vocabulary:,}, {WORKERS} workers")
    row.remarks.append(f"corpus: {inputs.words}")
    row.remarks.append(
        "no document holds a tokenizer's special words or U+2581, where ours departs from the libraries by intent"
    )
    tool = "tools/preprocess_data.py"
    workers = ["--workers", str(WORKERS)]

    def ours(number: int) -> Outcome:
        return our_tool(setup, inputs.whole, inputs.sentencepiece, setup.fresh("ours"))

    def theirs(number: int) -> Outcome:
        folder = setup.fresh("peer")
        kind = "GPTSentencePieceTokenizer"
        return setup.their_tool(tool, peer_arguments(inputs.whole, kind, inputs.sentencepiece, folder, *workers))

    # its job takes most of a minute: twice is enough
    taken = in_turns(setup.sides(ours, theirs), min(setup.repeat, 2))
    row.note_loads(taken)
    megabytes = inputs.whole["bytes"] / 1e6
    row.figures = [
        Figure(
            f"whole job, {tool}", "MB/s",
            [megabytes / seconds for seconds in seconds_of(taken, "peer")],
            [megabytes / seconds for seconds in seconds_of(taken, "ours")], "≥ 6x", higher=True,
        ),
        Figure("peak memory of a process", "MB", peaks_of(taken, "peer"), peaks_of(taken, "ours"), "≤ 300 MB"),
    ]  # fmt: skip
    _same_bytes(setup, row, tool)
    outcome = _ids(setup, inputs.sentencepiece, inputs.whole)
    row.checks.append(f"ids equal to sentencepiece's on each of {outcome['documents']:,} documents")
    return row


def steady(part: dict[str, list[Outcome]], whole: dict[str, list[Outcome]], inputs: Inputs, side: str) -> list[float]:
    """MB/s between two sizes: what start and end cost falls out of the difference of the medians."""
    if not part.get(side):
        return []
    difference = statistics.median(seconds_of(whole, side)) - statistics.median(seconds_of(part, side))
    return [(inputs.whole["bytes"] - inputs.part["bytes"]) / 1e6 / difference] if difference > 0 else []


def _ids(setup: Setup, tokenizer: str, corpus: dict[str, Any]) -> dict[str, Any]:
    prefix = setup.work / "fresh" / "ours" / "out"
    return setup.ours("compare_ids", {"prefix": str(prefix), "tokenizer": tokenizer, "corpus": corpus["path"]}).values


def _same_bytes(setup: Setup, row: Row, name: str) -> None:
    if setup.peer is None:
        return
    fresh = setup.work / "fresh"
    for suffix in (".bin", ".idx"):
        peer = _digest(fresh / "peer" / f"out_text_document{suffix}")
        ours = _digest(fresh / "ours" / f"out{suffix}")
        if peer != ours:
            raise SystemExit(f"error: {suffix} of {name} has sha256 {peer}, ours {ours}")
    row.checks.append(f".bin and .idx of {name} and ours have the same sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
