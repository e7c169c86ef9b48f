"""`stagemix inspect_data … --documents SOURCE --loss`: documents with the tokens that the loss is on marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from megatron.config.errors import ConfigError
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.loss_mask import LossMask, has_loss_mask
from megatron.data.sources import OpenSource
from megatron.planner.sample_drawing import LEARNED, OTHER, Decode, marked_runs, visible
from megatron.tokenizers.base import Tokenizer


def loss_rows(source: OpenSource, first: int, last: int, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Documents first … last - 1: "document", "tokens", "target_tokens" and "runs", [[learned, text], …] of tokens that
    follow each other and are all learned or all not; special tokens by their names.

    Raises ConfigError where the source's data have no loss mask; DataError where a mask is missing or damaged.
    """
    files = source.opened().files
    masks: dict[int, LossMask] = {}
    for document in range(first, min(last, files.document_count)):
        number, local = files.locate(document)
        dataset = files.files[number]
        if not isinstance(dataset, IndexedDataset) or not has_loss_mask(dataset.manifest):
            raise ConfigError(
                f"--loss: {source.section.data[number]} has no loss mask: make it with preprocess_data --format chat"
            )
        if number not in masks:
            masks[number] = LossMask.open(dataset.prefix, dataset.manifest or {})
        start = int(dataset.document_starts()[local])
        ids = dataset.tokens(local).tolist()
        learned = masks[number].bits(start, start + len(ids)).tolist()
        runs = [[key, text] for key, text in marked_runs(ids, learned, with_names(tokenizer))]
        yield {"document": document, "tokens": len(ids), "target_tokens": sum(learned), "runs": runs}


def loss_lines(row: dict[str, Any]) -> list[str]:
    """A document of `loss_rows` for people: one line a run, those with loss behind a bar."""
    head = f"document {row['document']}: the loss is on {row['target_tokens']:,} of {row['tokens']:,} tokens"
    return [head, *(f"{LEARNED if learned else OTHER}{visible(text)}" for learned, text in row["runs"])]


def with_names(tokenizer: Tokenizer) -> Decode:
    """A decoder that shows special tokens by their names."""
    names = {token: name for name, token in tokenizer.special_ids.items()}

    def decode(ids: Sequence[int]) -> str:
        pieces = []
        for special, group in groupby(ids, key=lambda token: token in names):
            tokens = list(group)
            pieces.append("".join(names[token] for token in tokens) if special else tokenizer.decode(tokens))
        return "".join(pieces)

    return decode
