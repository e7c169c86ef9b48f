"""One sample, or the documents of a source, as lines of text: pieces, what they are cut from, decoded text, ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np

from megatron.config.errors import ConfigError
from megatron.data.assembly import assemble
from megatron.data.samples import Sample
from megatron.data.source_stream import EpochSpan
from megatron.data.sources import OpenSource

Decode = Callable[[Sequence[int]], str]
HEAD, TAIL = 120, 60
LEARNED, OTHER = "█ ", "  "
HEAD_IDS, TAIL_IDS = 16, 8
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}


@dataclass(frozen=True)
class Shown:
    """What is shown of a piece beside its place. full: whole, not head … tail · loss: all text, with what is learned
    behind a bar."""

    decode: Decode | None = None
    ids: bool = False
    full: bool = False
    loss: bool = False


def visible(text: str) -> str:
    r"""The text on one line: line ends, tabs, backslashes and what cannot be seen as escapes (\n, \t, \\, \x07)."""
    return "".join(_NAMED.get(letter) or (letter if letter.isprintable() else _escaped(ord(letter))) for letter in text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def abbreviated(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """Beginning and end of a long text, and how much was left out between them."""
    left = len(text) - head - tail
    return text if left <= 24 else f"{text[:head]} … {left:,} characters … {text[-tail:]}"


def trained_ids(sample: Sample, source: OpenSource) -> list[list[int]]:
    """Ids of every piece's input positions as they are trained on: fill-in-the-middle pieces rearranged.

    Raises ConfigError where those need sentinels that the tokenizer does not have.
    """
    if not sample.fim:
        return [source.tokens_for(piece)[: piece.end - piece.start].tolist() for piece in sample.pieces]
    if sample.fim_rule is None or sample.fim_rule.sentinels is None:
        raise ConfigError(
            f"sample {sample.number} has a piece that fill-in-the-middle rearranges, and the tokenizer has no "
            "sentinels for it: train one with train_tokenizer --fim, or name its sentinels in tokenizer.fim"
        )
    tokens = assemble(sample, source, sum(piece.end - piece.start for piece in sample.pieces)).tokens.tolist()
    ends = list(accumulate((piece.end - piece.start for piece in sample.pieces), initial=0))
    return [tokens[start:end] for start, end in pairwise(ends)]


def learned_tokens(sample: Sample, source: OpenSource) -> list[list[bool]]:
    """For every piece of a sample, which of its tokens are learned when they are predicted: all but a document's first,
    or what the source's loss mask marks of these. The first of a piece that begins within a document is predicted by
    the piece before it."""
    return [
        [place > 0 and bit for place, bit in enumerate(_bits(sample, source, piece.start, piece), piece.start)]
        for piece in sample.pieces
    ]


def target_counts(sample: Sample, source: OpenSource) -> list[int]:
    """How many targets of every piece of a sample count. What fill-in-the-middle rearranges has none for its last."""
    counts = [sum(_bits(sample, source, piece.start + 1, piece, 1)) for piece in sample.pieces]
    files = source.opened().files
    for number in sample.fim:
        piece = sample.pieces[number]
        counts[number] -= piece.end < files.document_length(piece.document)
    return counts


def _bits(sample: Sample, source: OpenSource, start: int, piece: EpochSpan, beyond: int = 0) -> list[bool]:
    """Whether tokens from `start` to the end of a piece, and so many beyond it, of its document may be learned."""
    files = source.opened().files
    if sample.masked:
        bits: list[bool] = files.learned(piece.document, start, piece.end + beyond).tolist()
        return bits
    return [True] * (min(piece.end + beyond, files.document_length(piece.document)) - start)


def sample_lines(sample: Sample, source: OpenSource, where: str, shown: Shown) -> list[str]:
    """A sample piece by piece: position in the window, document and range, epoch, whether it begins and ends inside."""
    lines = [f"sample {sample.number} · {where} · source {sample.source}"]
    files = source.opened().files
    ids = trained_ids(sample, source) if shown.ids or shown.decode else []
    says = sample.masked or shown.loss
    counts, learned = (target_counts(sample, source), learned_tokens(sample, source)) if says else ([], [])
    at = 0
    for number, piece in enumerate(sample.pieces):
        length = files.document_length(piece.document)
        begins = "begins here" if piece.start == 0 else f"from token {piece.start:,}"
        ends = "ends here" if piece.end == length else "is cut here" if sample.padded else "goes on"
        edge = "┌" if number == 0 else "├"
        lines.append(
            f"{at:>8} {edge}─ document {piece.document} [{piece.start}:{piece.end}] of {length:,} tokens · "
            f"epoch {piece.epoch} · {begins}, {ends} · {piece.end - piece.start:,} tokens"
            + (" · fill-in-the-middle" if number in sample.fim else "")
            + (f" · the loss is on {counts[number]:,}" if says else "")
        )
        if shown.loss and shown.decode:
            runs = marked_runs(ids[number], learned[number], shown.decode)
            lines += [f"{'':>8} │  {LEARNED if key else OTHER}{visible(text)}" for key, text in runs]
        elif shown.ids or shown.decode:
            lines += [f"{'':>8} │  {line}" for line in _content(ids[number], shown)]
        at += piece.end - piece.start
    ends = f": the loss is on {sum(counts):,} of its targets" if says else ""
    lines.append(f"{at:>8} └─ {'padding from here on' if sample.padded else 'the window ends'}{ends}")
    return lines


def marked_runs(ids: Sequence[int], learned: Sequence[bool], decode: Decode) -> list[tuple[bool, str]]:
    """Texts of tokens that follow each other and are all learned or all not."""
    pairs = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
    return [(key, decode([token for token, _ in group])) for key, group in pairs]


def _content(ids: Sequence[int], shown: Shown) -> list[str]:
    lines = []
    if shown.decode:
        text = shown.decode(ids)
        if shown.full:
            lines += [visible(line) for line in text.splitlines(keepends=True)] or [""]
        else:
            lines.append(abbreviated(visible(text)))
    if shown.ids:
        words = [str(token) for token in ids]
        if not shown.full and len(words) > HEAD_IDS + TAIL_IDS + 2:
            left = len(words) - HEAD_IDS - TAIL_IDS
            words = [*words[:HEAD_IDS], f"… {left:,} ids …", *words[-TAIL_IDS:]]
        lines.append("ids " + " ".join(words))
    return lines


def document_rows(source: OpenSource, first: int, last: int, decode: Decode | None) -> list[dict[str, Any]]:
    """Documents first … last − 1 of a source: "document", "file", "number" in it, "tokens", "in_slice", "held_out"
    (None outside the slice) and, where `decode` is given, "text": of its first tokens."""
    order = source.opened()
    files = order.files
    held = order.held_out_documents()
    rows = []
    for document in range(first, min(last, files.document_count)):
        number, local = files.locate(document)
        inside = files.first <= document < files.last
        place = int(np.searchsorted(held, document))
        length = files.document_length(document)
        row: dict[str, Any] = {
            "document": document,
            "file": source.section.data[number],
            "number": local,
            "tokens": length,
            "in_slice": inside,
            "held_out": (place < len(held) and int(held[place]) == document) if inside else None,
        }
        if decode is not None:
            row["text"] = decode(files.tokens(document, 0, min(length, 64)).tolist())
        rows.append(row)
    return rows


def documents_asked(words: str, sources: Sequence[str]) -> tuple[str, int, int | None]:
    """SOURCE[:A:B] as (source, A, B); a source's name may hold colons itself. Raises ConfigError."""
    matches = [name for name in sources if words == name or words.startswith(f"{name}:")]
    if not matches:
        raise ConfigError(f"--documents {words}: no source is called so; there are: {', '.join(sorted(sources))}")
    name = max(matches, key=len)
    start, colon, end = words[len(name) + 1 :].partition(":")
    if words == name:
        return name, 0, None
    if not colon or not start.isdecimal() or not (end.isdecimal() or not end):
        raise ConfigError(
            f"--documents {words}: write SOURCE or SOURCE:A:B, two document numbers, for example {name}:0:20"
        )
    if end and int(end) <= int(start):
        raise ConfigError(f"--documents {words}: is empty: A must be below B")
    return name, int(start), int(end) if end else None
