"""Held-out texts as local tasks of lm-evaluation-harness: JSONL beside YAML, usable with `lm_eval` itself too.

For each source two tasks: `heldout_SOURCE`, multiple choice (chance 0.25), and `heldout_SOURCE_loss`, bits a byte and
perplexity over whole passages.

Of the accuracies, `acc_mutual_info` is the one to read: it takes the continuation whose likelihood the context raises
most, log P(choice | context) - log P(choice) (Holtzman et al. 2021, "Surface form competition"). Plain `acc` mostly
asks which of four passages is the most common text, whatever stood before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.errors import DataError
from megatron.evaluation.multiple_choice import CHOICES, Question, make_questions

CHANCE = 1 / CHOICES


@dataclass(frozen=True)
class HeldOutTask:
    """A task that was written: its name for the harness, its source, how many items, and chance level if any."""

    name: str
    source: str
    kind: str
    items: int
    chance: float | None
    characters: int


def write_held_out_tasks(
    folder: Path,
    texts: Mapping[str, Sequence[str]],
    questions: int,
    passage_characters: int,
    seed: int = 0,
    left_out: dict[str, str] | None = None,
) -> list[HeldOutTask]:
    """Writes the tasks of every source into `folder` and names them.

    left_out: receives the sources that cannot be asked about, each with why: too few documents, or too short ones.
    Raises DataError for such a source where that is None, and where no source is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks: list[HeldOutTask] = []
    names: set[str] = set()
    refused: dict[str, str] = {}
    for source, documents in sorted(texts.items()):
        try:
            made = make_questions(source, documents, questions, seed)
        except DataError as error:
            if left_out is None:
                raise
            refused[source] = str(error)
            continue
        name = _task_name(source, names)
        rows = [_question_row(question) for question in made]
        _write_task(folder, name, rows, _choice_yaml())
        tasks.append(HeldOutTask(name, source, "multiple choice", len(rows), CHANCE, 0))
        passages = _passages(documents, passage_characters)
        _write_task(folder, f"{name}_loss", [{"text": text} for text in passages], _loss_yaml())
        size = sum(map(len, passages))
        tasks.append(HeldOutTask(f"{name}_loss", source, "held-out loss", len(passages), None, size))
    if refused and not tasks:
        raise DataError("nothing can be asked of held-out documents: " + "; ".join(refused.values()))
    if left_out is not None:
        left_out.update(refused)
    return tasks


def _task_name(source: str, taken: set[str]) -> str:
    name = "heldout_" + (re.sub(r"[^A-Za-z0-9]+", "_", source).strip("_") or "source")
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _question_row(question: Question) -> dict[str, Any]:
    return {
        "context": question.context,
        "choices": list(question.choices),
        "answer": question.answer,
        "document": question.document,
    }


def _passages(documents: Sequence[str], characters: int) -> list[str]:
    """The beginnings of the documents, so that many take part, until `characters` are together."""
    a_document = max(400, characters // max(1, len(documents)))
    passages: list[str] = []
    left = characters
    for text in documents:
        passage = text[: min(a_document, left)]
        if passage.strip():
            passages.append(passage)
            left -= len(passage)
        if left <= 0:
            break
    return passages


def _write_task(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data.resolve())},
            "cache_dir": str((folder / ".cache").resolve()),
        },
        "test_split": "test",
        **settings,
        "metadata": {"version": 1},
    }
    # JSON is YAML, and needs no quoting rules.
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _choice_yaml() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def _loss_yaml() -> dict[str, Any]:
    metrics = ("bits_per_byte", "byte_perplexity", "word_perplexity")
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": name} for name in metrics],
    }
