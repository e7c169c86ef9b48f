"""README.md of an exported folder: what the model is and, from the ledger, what it was trained on, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.config.quantities import format_count
from megatron.config.version import VERSION
from megatron.data.ledger import Ledger, ledger_rows
from megatron.hf.checkpoint_source import CheckpointSource
from megatron.hf.parity import Proof
from megatron.planner.ledger_files import read_ledger

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [stagemix]
# license: say here under which licence you publish these weights; none was chosen for you
---

# {name}

{parameters} parameters, {architecture}, {dtype}. Trained for {steps} steps, {tokens} tokens, with Stagemix {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH/OF/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/OF/THIS/FOLDER")
```
"""


def model_card(source: CheckpointSource, architecture: str, dtype: str, proof: Proof | None) -> str:
    """The card as Markdown with a YAML head. The licence is left to the user."""
    state, shape = source.ref.state, source.shape
    head = _HEAD.format(
        name=source.config.run.name,
        parameters=format_count(shape.parameter_count()),
        architecture=architecture,
        dtype=dtype,
        steps=state.get("step", source.ref.step),
        tokens=format_count(state.get("consumed_tokens", 0)),
        version=VERSION,
    )
    return "\n".join([head, *_ledger(source), *_evaluation(), *_notes(source), *_proof(proof)]) + "\n"


def _ledger(source: CheckpointSource) -> list[str]:
    if not source.ref.state.get("data"):
        return ["## Training", "", "This checkpoint keeps no ledger, so what it was trained on is not known here.", ""]
    ledger = read_ledger(source.ref.path)
    rows = ledger_rows(ledger)
    return [
        "## Training stages",
        "",
        *_table(("stage", "tokens", "sequence length", *_groups(rows)), _stage_rows(ledger, rows)),
        "",
        "## Tokens by source",
        "",
        *_table(("stage", "source", "group", "samples", "tokens", "share", "epochs"), map(_source_row, rows)),
        "",
        "Every source's tokens were trained on in one order that goes on across stages; order hash "
        f"`{ledger.order_hash}`, seed {ledger.seed}.",
        "",
    ]


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


def _table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _evaluation() -> list[str]:
    return ["## Evaluation", "", "None yet: run `stagemix evaluate --model` on this folder.", ""]


def _notes(source: CheckpointSource) -> list[str]:
    end = source.tokenizer.eod_id
    notes = [
        "## Notes for use",
        "",
        f"- Token {end} ends a document; it stands for bos, eos and pad. Training puts no token before a text.",
        '- `split_special_tokens` is on: names of special tokens inside a text (`"</s>"`) stay text, as in training. '
        "Load the tokenizer with `split_special_tokens=False` where they should become tokens.",
    ]
    if source.shape.document_mask:
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
