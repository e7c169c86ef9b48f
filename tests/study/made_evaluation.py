"""A small study that is evaluated, and stand-ins for the process that evaluates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from study.made_studies import tables, write
from tiny_run import write_corpus

from megatron.study import node_evaluation
from megatron.study.node_folder import NodeFolder
from megatron.study.node_parts import Evaluated, Request
from megatron.study.plan import PlannedStudy, plan_study

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "examples" / "evaluation" / "data"
JUDGE = f"{sys.executable} {ROOT / 'examples' / 'evaluation' / 'longest_wins.py'}"
RESULTS: dict[str, Any] = {
    "loss": {"tokens": "2K"},
    "suites": [{"name": "stage-study", "data": str(BENCH), "tasks": ["logic"], "limit": 2}],
    "samples": {"prompts": ["ab", "cd"], "max_new_tokens": 5, "samples": 2},
    "win_rate": {"prompts": ["ab"], "max_new_tokens": 4, "judge": JUDGE},
}


def _stage(mixture: dict[str, int]) -> dict[str, Any]:
    return {"steps": 2, "mixture": mixture, "lr": {"peak": Decimal("0.01"), "horizon": "4 steps"}}


def study_words(folder: Path, results: dict[str, Any] = RESULTS) -> dict[str, Any]:
    """Two arms that share a stage: text, the baseline, and code."""
    base = {
        "tokenizer": {"path": "bytes"},
        "model": {
            "seq_length": 256,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "sources": {
            "python": {"data": [str(folder / "data/python")], "group": "code", "max_epochs": 9},
            "prose": {"data": [str(folder / "data/prose")], "group": "text", "max_epochs": 9},
        },
        "data": {"cache": str(folder / "data/cache")},
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
        "validation": {"fraction": Decimal("0.2")},
        "checkpoint": {"every": 2, "keep": 2},
    }
    stages = {"init": _stage({"prose": 1}), "code": _stage({"python": 1}), "text": _stage({"prose": 1})}
    arms = {"text": {"stages": ["init", "text"]}, "code": {"from": "text/init", "stages": ["code"]}}
    head = {"name": "evaluated", "output": str(folder / "out"), "baseline": "text", "seeds": [3]}
    return tables(arms, stages, study=head, base=base, results=results)


def planned_study(folder: Path, results: dict[str, Any] = RESULTS, name: str = "study.toml") -> PlannedStudy:
    """It, planned."""
    return plan_study(write(folder, study_words(folder, results), name))


def write_corpora(folder: Path) -> None:
    """Its data."""
    write_corpus(folder / "data/python", 1, highest=120)
    write_corpus(folder / "data/prose", 2, highest=120)


def end_of(planned: PlannedStudy, arm: str) -> str:
    """The node that an arm ends with."""
    return next(placed.path[-1] for placed in planned.graph.arms if placed.name == arm)


class Process:
    """Stands in for the process that evaluates: keeps what it is asked, and does what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[Request], int] = lambda request: 0) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self._act = act
        monkeypatch.setattr(node_evaluation._Evaluation, "_process", self._stand_in())

    def _stand_in(self) -> Callable[..., int]:
        def process(_: Any, requests: list[Request], nodes: object = ()) -> int:
            code = 0
            for request in requests:
                self.asked.append((request.name, tuple(part.name for part in request.parts)))
                code = self._act(request) or code
                if code > 128:
                    break
            return code

        return process


def do(request: Request) -> int:
    """Every part is done: its file is there, as it is or with something in it."""
    done = Evaluated(NodeFolder(Path(request.folder)))
    for part in request.parts:
        path = Path(request.folder) / part.file
        if not path.exists():
            path.write_text("{}\n")
        done.done(part, 1.0)
    return 0
