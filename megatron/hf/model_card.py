"""README.md of an exported folder: what the model is and, from the ledger, what it was trained on, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.checkpoint.imported import ORIGIN
from megatron.config.quantities import format_count
from megatron.config.version import VERSION
from megatron.data.ledger import Ledger, ledger_rows
from megatron.data.ledger_events import event_words, not_trained
from megatron.hf.card_evaluation import evaluation_lines, markdown_table
from megatron.hf.checkpoint_source import CheckpointSource
from megatron.hf.proof_record import Proof
from megatron.planner.ledger_files import read_ledger

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [stagemix]
{licence}
---

# {name}

{parameters} parameters, {architecture}, {dtype}. {trained}, with Stagemix {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH/OF/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/OF/THIS/FOLDER")
```
"""
_NO_LICENCE = "# license: say here under which licence you publish these weights; none was chosen for you"


@dataclass(frozen=True)
class CardWords:
    """What the user adds. notes: paragraphs of Markdown. licence: an identifier such as "apache-2.0". evaluation: a
    record that `stagemix evaluate` wrote."""

    notes: tuple[str, ...] = ()
    licence: str = ""
    evaluation: Mapping[str, Any] | None = None


def model_card(
    source: CheckpointSource,
    architecture: str,
    parameters: int,
    dtype: str,
    proof: Proof | None,
    words: CardWords | None = None,
) -> str:
    """The card as Markdown with a YAML head. The licence is left to the user. parameters: of the folder's files."""
    words, state = words or CardWords(), source.ref.state
    tokens = format_count(state.get("consumed_tokens", 0))
    head = _HEAD.format(
        licence=f"license: {words.licence}" if words.licence else _NO_LICENCE,
        name=source.config.run.name,
        parameters=format_count(parameters),
        architecture=architecture,
        dtype=dtype,
        trained="Converted" if ORIGIN in state else f"Trained for {source.ref.step} steps, {tokens} tokens",
        version=VERSION,
    )
    if source.tokenizer is None:
        head = "\n".join(line for line in head.split("\n") if not line.startswith("tokenizer = "))
        head = head.replace(", AutoTokenizer", "")
    own = ["## Notes of the publisher", "", *(line for note in words.notes for line in (note.strip(), ""))]
    parts = [own if words.notes else [], _training(source), evaluation_lines(words.evaluation), _notes(source)]
    return "\n".join([head, *(line for part in parts for line in part), *_proof(proof)]) + "\n"


def _training(source: CheckpointSource) -> list[str]:
    return [*_ledger(source), *_beginnings(source.ref.state)]


def _beginnings(state: Mapping[str, Any]) -> list[str]:
    """Where weights came from that were not trained from nothing."""
    lines = [
        f"- Training stage {stage} began from the weights at `{taken['weights']}`."
        for stage, taken in (state.get("taken") or {}).items()
        if taken.get("weights") not in (None, "fresh")
    ]
    if origin := state.get(ORIGIN):
        name = origin.get("folder") or origin.get("name") or origin.get("kind", "elsewhere")
        lines.append(f"- These weights were imported from `{name}` and not trained since; see `origin.json`.")
    return [*lines, ""] if lines else []


def _ledger(source: CheckpointSource) -> list[str]:
    if not source.ref.state.get("data"):
        return ["## Training", "", "This checkpoint keeps no ledger, so what it was trained on is not known here.", ""]
    ledger = read_ledger(source.ref.path)
    rows = ledger_rows(ledger)
    return [
        "## Training stages",
        "",
        *markdown_table(("stage", "tokens", "sequence length", *_groups(rows)), _stage_rows(ledger, rows)),
        "",
        "## Tokens by source",
        "",
        *markdown_table(
            ("stage", "source", "group", "samples", "tokens", "share", "epochs"), list(map(_source_row, rows))
        ),
        "",
        "Every source's tokens were trained on in one order that goes on across stages; order hash "
        f"`{ledger.order_hash}`, seed {ledger.seed}.",
        "",
        *_events(ledger),
    ]


def _events(ledger: Ledger) -> list[str]:
    """What happened besides, and how much of the tables the weights have not seen."""
    if not ledger.events:
        return []
    lost = ", ".join(f"{name} {count:,}" for name, count in not_trained(ledger.events).items())
    note = ["", f"Tokens of the tables above that were consumed and not trained on: {lost}."] if lost else []
    return ["## Events", "", *(f"- {event_words(event)}." for event in ledger.events), *note, ""]


def _groups(rows: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({row["group"] for row in rows})


def _stage_rows(ledger: Ledger, rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row a stage: its length, and the share of each group, code among them."""
    table = []
    for stage in ledger.stages:
        own = [row for row in rows if row["training_stage"] == stage.name]
        shares = [sum(row["share"] for row in own if row["group"] == group) for group in _groups(rows)]
        shapes = stage.stage_shapes
        lengths = dict.fromkeys(str(step.seq_length) for step in shapes.steps if step.start < stage.samples)
        cells = (f"{100 * share:.1f} %" for share in shares)
        table.append((stage.name, format_count(shapes.tokens_at(stage.samples)), ", ".join(lengths), *cells))
    return table


def _source_row(row: dict[str, Any]) -> tuple[str, ...]:
    share, epochs = f"{100 * row['share']:.2f} %", f"{row['epochs']:.3f}"
    count, tokens = f"{row['samples']:,}", format_count(row["tokens"])
    return (row["training_stage"], row["source"], row["group"], count, tokens, share, epochs)


def _notes(source: CheckpointSource) -> list[str]:
    notes = ["## Notes for use", ""]
    if source.tokenizer is None:
        notes.append("- No tokenizer came with these weights: this folder has none, and no ids for bos, eos and pad.")
    else:
        end = source.tokenizer.eod_id
        notes += [
            f"- Token {end} ends a document; it stands for bos, eos and pad. Training puts no token before a text.",
            '- `split_special_tokens` is on: names of special tokens inside a text (`"</s>"`) stay text, as in '
            "training. Load the tokenizer with `split_special_tokens=False` where they should become tokens.",
        ]
    if source.shape.document_mask and ORIGIN not in source.ref.state:
        notes.append("- In training attention never crossed a document's end, and positions began again with each.")
    return [*notes, ""]


def _proof(proof: Proof | None) -> list[str]:
    if proof is None:
        return ["The parity proof was left out (`--no-prove`).", ""]
    return [
        f"Parity with the training code: largest fp32 logit difference {proof.largest_logit_difference:.2e} "
        f"(tolerance {proof.tolerance:g}) against transformers {proof.transformers}, and {proof.tensors_compared} "
        "tensors read back bit for bit; see `proof.json`.",
        "",
    ]
