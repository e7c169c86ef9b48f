"""A suite's tasks as task files of lm-evaluation-harness: JSON lines beside YAML, usable with `lm_eval` itself too.

Tasks of the harness keep its own prompts: the file includes the harness' and changes where the data come from. A choice
in the prompt is the harness' form "many inputs, one target", the one that its WinoGrande has: a context a choice, one
continuation for all. The same text has the same words and bytes after every context, so that the greatest likelihood,
which the harness compares, and the lowest perplexity, which the paper compares, name the same choice; where a tokenizer
cuts the fixed text into different numbers of tokens, `acc_perplexity` counts by the token, and the results say so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.evaluation.suite import SuiteTask
from megatron.evaluation.suite_data import Row

_PLACE = re.compile(r"\{(\w+)\}")


def write_suite_task(folder: Path, task: SuiteTask, rows: Sequence[Row] | None, own_file: Path | None) -> None:
    """Writes NAME.yaml, and NAME.jsonl with the rows; without rows the harness fetches its own.

    own_file: the harness' task file of a task of kind "harness".
    """
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"task": task.name, "num_fewshot": task.shots, "metadata": {"version": 1}}
    if task.kind == "choice-in-prompt":
        assert rows is not None
        rows = [inverted(task, row) for row in rows]
        content |= {
            "output_type": "multiple_choice",
            "doc_to_text": "answer",
            "doc_to_choice": "contexts",
            "doc_to_target": "scored",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        content |= {"include": str(own_file)}
        if task.max_new_tokens:
            content["metadata"]["max_new_tokens"] = task.max_new_tokens
    if rows is not None:
        content |= _local(folder / f"{task.name}.jsonl", rows, task.shots)
    # JSON is YAML, and needs no quoting rules.
    (folder / f"{task.name}.yaml").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _local(data: Path, rows: Sequence[Row], shots: int) -> dict[str, Any]:
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"test": str(data.resolve())},
            "cache_dir": str((data.parent / ".cache").resolve()),
        },
        "training_split": None,
        "validation_split": None,
        "fewshot_split": "test" if shots else None,  # the harness leaves out the item that is asked
        "test_split": "test",
    }


def inverted(task: SuiteTask, row: Mapping[str, Any]) -> Row:
    """{"contexts": one a choice, "scored": the fixed text, "answer": which is right} of a row of the data file."""
    choices = row[task.choices] if isinstance(task.choices, str) else task.choices
    return {
        "contexts": [filled(task.prompt, {**row, "choice": choice}) for choice in choices],
        "scored": filled(task.scored, row),
        "answer": row[task.answer],
    }


def filled(words: str, row: Mapping[str, Any]) -> str:
    """`words` with each {field} replaced, once: braces in the data stay as they are. KeyError for an unknown one."""
    return _PLACE.sub(lambda found: str(row[found[1]]), words)
