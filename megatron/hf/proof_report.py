"""A parity proof for people: lines for the terminal, and the page proof.md of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.hf.proof_record import Comparison, GenerationComparison, LayerComparison, Proof

PROOF, PAGE = "proof.json", "proof.md"
_EXTENT = {"whole": "both models whole in memory", "layers": "layer by layer"}


def write_proof(folder: Path, proof: Proof, more: dict[str, Any]) -> None:
    """Writes proof.json, with `more` beside what the proof says, and proof.md. OSError."""
    record = proof.to_json() | more
    (folder / PROOF).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(proof_page(proof), encoding="utf-8")


def proof_lines(proof: Proof) -> list[str]:
    """For the terminal."""
    lines = [f"{_EXTENT[proof.extent]}: {proof.reason}", what_was_compared(proof)]
    lines += [f"{'tokens':>7}  {'logit difference':>16}  {'NLL difference':>14}  {'greedy agrees':>13}  text"]
    lines += [_line(item, "") for item in proof.comparisons]
    lines += [_line(item, ", in a padded batch") for item in proof.padded]
    if proof.layers:
        worst = max(proof.layers, key=_relative)
        lines.append(
            f"hidden states of {len(proof.layers) - 1} layers: the largest difference is {worst.own_difference:.3e}, "
            f"of {_place(worst)}, where they are up to {worst.largest:.3g}"
        )
    lines.append(_generated(proof.generation))
    lines += [f"  {words}" for words in _partings(proof.generation)]
    lines.append(
        f"largest fp32 logit difference to transformers {proof.transformers}: {proof.largest_logit_difference:.3e} "
        f"(tolerance {proof.tolerance:g}); {proof.tensors_compared} tensors read back bit for bit: "
        f"{'proven' if proof.passed else 'NOT proven'}"
    )
    return lines


def what_was_compared(proof: Proof) -> str:
    """In a sentence: which prompts, how laid out, and what of them."""
    lengths = sorted({item.length for item in proof.comparisons})
    count, sizes = len(proof.comparisons), ", ".join(map(str, lengths))
    generated = "none" if proof.generation is None else f"{proof.generation.new_tokens} new tokens"
    if proof.extent == "layers":
        return (
            f"compared: the hidden states behind every layer and the logits of {count} prompts of {sizes} tokens (a "
            "longer prompt is cut), all in one batch padded on the right; none by itself, and in a batch padded on the "
            f"left only cached generation ({generated}); --proof whole compares more where memory is enough"
        )
    return (
        f"compared: the logits of {count} prompts of {sizes} tokens, each by itself; {len(proof.padded)} of them again "
        f"in one batch padded on the left (a longer prompt is cut); cached generation ({generated})"
    )


def proof_page(proof: Proof) -> str:
    """Markdown."""
    verdict = "proven" if proof.passed else "not proven"
    lines = [
        "# Parity proof",
        "",
        f"These files against the training code, by transformers {proof.transformers}, in float32 with weights as they "
        f"are stored ({proof.dtype}): **{verdict}**. The largest difference of a logit is "
        f"{proof.largest_logit_difference:.3e}, the tolerance {proof.tolerance:g}. {proof.tensors_compared} tensors "
        f"were read back and are equal bit for bit. Compared {_EXTENT[proof.extent]}: {proof.reason}.",
        "",
        f"What was {what_was_compared(proof)}.",
        "",
        "## Logits",
        "",
        "| tokens | prompt | logit difference | NLL difference | NLL, nats a token | greedy tokens agree |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
        *map(_row, proof.comparisons),
        "",
    ]
    if proof.padded:
        lines += [
            "The same in one batch, padded on the left, with an attention mask on transformers' side:",
            "",
            "| tokens | prompt | logit difference | NLL difference | NLL, nats a token | greedy tokens agree |",
            "| ---: | --- | ---: | ---: | ---: | ---: |",
            *map(_row, proof.padded),
            "",
        ]
    lines += ["## Cached generation", "", _generated(proof.generation) + ".", ""]
    lines += [f"- {words}" for words in _partings(proof.generation)]
    return "\n".join([*lines, *_layer_table(proof.layers)]).rstrip("\n") + "\n"


def _layer_table(layers: list[LayerComparison]) -> Iterator[str]:
    if not layers:
        return
    yield from ("## Hidden states", "", "Difference: from the tokens on; own: of that layer, given the same input.", "")
    yield from ("| layer | difference | own difference | largest hidden state |", "| --- | ---: | ---: | ---: |")
    for item in layers:
        yield f"| {item.layer} | {item.difference:.3e} | {item.own_difference:.3e} | {item.largest:.3g} |"


def _line(item: Comparison, more: str) -> str:
    return (
        f"{item.length:>7}  {item.largest_logit_difference:>16.3e}  {item.nll_difference:>14.3e}  "
        f"{100 * item.greedy_agreement:>11.1f} %  {item.text}{more}"
    )


def _row(item: Comparison) -> str:
    name = item.text.replace("|", "\\|")
    return (
        f"| {item.length} | {name} | {item.largest_logit_difference:.3e} | {item.nll_difference:.3e} | "
        f"{item.nll:.4f} | {100 * item.greedy_agreement:.1f} % |"
    )


def _generated(found: GenerationComparison | None) -> str:
    if found is None:
        return "no cached generation: the model has too few positions for a prompt and a new token"
    total = found.new_tokens * len(found.prompts)
    return (
        f"cached generation, {found.new_tokens} greedy tokens for prompts of {', '.join(map(str, found.prompts))}: "
        f"{found.agreeing} of {total} agree, largest logit difference {found.largest_logit_difference:.3e}"
    )


def _partings(found: GenerationComparison | None) -> Iterator[str]:
    for item in () if found is None else found.partings:
        yield (
            f"{item.prompt}, new token {item.step + 1}: ours {item.ours}, transformers' {item.theirs}, whose logits "
            f"are {item.gap:.3e} apart"
        )


def _relative(layer: LayerComparison) -> tuple[bool, float]:
    difference = layer.own_difference / max(1.0, layer.largest)
    return difference != difference, difference


def _place(layer: LayerComparison) -> str:
    return "the embedding" if layer.layer == "embedding" else f"layer {layer.layer}"
