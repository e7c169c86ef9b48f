"""Loss by source on held-out documents, each document by itself: nats a token, bits a byte, and every item.

A document begins its own context, as under a document mask: its first token is not predicted, its end-of-document token
is. Documents longer than a sequence are cut into sequences as training cuts them. So what is measured depends on the
documents alone, not on what a packed window happens to hold beside them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.errors import CheckpointError
from megatron.evaluation.harness_results import ratio_stderr
from megatron.evaluation.held_out_text import HeldOutDocument
from megatron.kernels.cross_entropy import linear_losses
from megatron.models.decoder import Decoder
from megatron.tokenizers.base import Tokenizer

FORMAT = 1
"""To be raised where the same weights, documents and settings give other figures."""


@dataclass(frozen=True)
class DocumentLoss:
    """Sums over a document's predicted tokens, and over those of them that its mask marks. nats: natural logarithms."""

    tokens: int
    nats: float
    learned: int = 0
    learned_nats: float = 0.0


@torch.no_grad()
def document_losses(
    model: Decoder, documents: Sequence[HeldOutDocument], seq_length: int, batch_size: int
) -> list[DocumentLoss]:
    """The loss of each document under a whole model in one process, on the model's device, in its dtype.

    seq_length: input positions of a sequence. batch_size: sequences at a time, of like lengths. Documents of one token
    have no loss. Raises CheckpointError where a loss is not finite.
    """
    places = [
        (number, begin, min(begin + seq_length, len(document.tokens) - 1))
        for number, document in enumerate(documents)
        for begin in range(0, len(document.tokens) - 1, seq_length)
    ]
    places.sort(key=lambda place: place[1] - place[2])
    sums = [[0.0, 0.0] for _ in documents]
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        for (number, begin, end), losses in zip(chosen, _losses(model, documents, chosen), strict=True):
            sums[number][0] += float(losses.sum())
            if (learned := documents[number].learned) is not None:
                sums[number][1] += float(losses[torch.from_numpy(learned[begin + 1 : end + 1])].sum())
    if not all(math.isfinite(nats) for nats, _ in sums):
        raise CheckpointError("the loss on held-out documents is not finite: the weights hold NaN or infinity")
    return [
        DocumentLoss(len(one.tokens) - 1, nats, 0 if one.learned is None else int(one.learned[1:].sum()), of_learned)
        for one, (nats, of_learned) in zip(documents, sums, strict=True)
    ]


def _losses(
    model: Decoder, documents: Sequence[HeldOutDocument], places: Sequence[tuple[int, int, int]]
) -> Iterator[Tensor]:
    """Float64 losses of each place (document, begin, end): of predicting tokens begin + 1 .. end from those before."""
    lengths = [end - begin for _, begin, end in places]
    tokens = torch.zeros(len(places), max(lengths), dtype=torch.int64)
    targets = []
    for row, (number, begin, end) in enumerate(places):
        ids = torch.from_numpy(documents[number].tokens[begin : end + 1])
        tokens[row, : end - begin] = ids[:-1]
        targets.append(ids[1:])
    device = model.head_weight.device
    tokens = tokens.to(device)
    hidden = model(tokens, torch.zeros_like(tokens, dtype=torch.int32))
    assert isinstance(hidden, Tensor)
    kept = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)])
    losses = linear_losses(kept, model.head_weight, torch.cat(targets).to(device), model.shape.vocab_size)
    yield from losses.double().cpu().split(lengths)


def loss_record(
    name: str,
    documents: Mapping[str, Sequence[HeldOutDocument]],
    losses: Mapping[str, Sequence[DocumentLoss]],
    tokenizer: Tokenizer,
    groups: Mapping[str, str],
) -> dict[str, Any]:
    """The record of a results file (evaluation/results.py), without its head: a task for each source, an item for each
    document. Metrics: loss (nats a token), bits_per_byte (of text; absent where a tokenizer gives none), and of sources
    with a mask targets_loss (nats a marked token).

    Kept of each document: "token_loss", [nats, tokens]; "loss", [log-likelihood, bytes]; "targets", [nats, tokens].
    """
    tasks, results = {}, {}
    for source, rows in documents.items():
        found = losses[source]
        tasks[source] = {"source": source, "kind": "held-out loss", "chance": None, "group": groups.get(source, source)}
        results[source] = _result(rows, found, [_bytes(row, tokenizer) for row in rows])
    return {"tasks": tasks, "models": [{"name": name, "results": results}]}


def _result(rows: Sequence[HeldOutDocument], found: Sequence[DocumentLoss], sizes: Sequence[int]) -> dict[str, Any]:
    by_token = [[one.nats, float(one.tokens)] for one in found]
    metrics = {"loss": _ratio(by_token)}
    records: dict[str, Any] = {"digest": _digest(rows), "token_loss": _rounded(by_token)}
    if sum(sizes):
        bits = [[one.nats / math.log(2), float(size)] for one, size in zip(found, sizes, strict=True)]
        metrics["bits_per_byte"] = _ratio(bits)
        records["loss"] = [[round(-one.nats, 4), size] for one, size in zip(found, sizes, strict=True)]
    if sum(one.learned for one in found):
        marked = [[one.learned_nats, float(one.learned)] for one in found]
        metrics["targets_loss"] = _ratio(marked)
        records["targets"] = _rounded(marked)
    return {"metrics": metrics, "items": len(found), "metric": "loss", "records": records}


def _ratio(pairs: Sequence[Sequence[float]]) -> dict[str, float | None]:
    above, below = (math.fsum(pair[place] for pair in pairs) for place in (0, 1))
    return {"value": above / below if below else None, "stderr": ratio_stderr(pairs)}


def _rounded(pairs: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(nats, 4), int(count)] for nats, count in pairs]


def _bytes(document: HeldOutDocument, tokenizer: Tokenizer) -> int:
    """Bytes of the text that is predicted: all of it but the first token's."""
    ids = document.tokens.tolist()
    whole, first = (len(tokenizer.decode(part).encode("utf-8", "surrogatepass")) for part in (ids, ids[:1]))
    return max(0, whole - first)


def _digest(rows: Sequence[HeldOutDocument]) -> str:
    """Of all tokens that are asked, in order."""
    asked = hashlib.sha256()
    for row in rows:
        asked.update(row.tokens.tobytes() + b"\x1e")
    return asked.hexdigest()[:32]
