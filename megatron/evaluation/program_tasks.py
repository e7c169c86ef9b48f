"""Code tasks from prompt to figure: samples of the model, each run in the sandbox, pass@k; BLEU against a solution."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.evaluation.bleu import bleu_counts, bleu_of
from megatron.evaluation.harness import Sampling
from megatron.evaluation.pass_at_k import mean_pass_at_k
from megatron.evaluation.programs import Problem, answer_of
from megatron.evaluation.sandbox import Outcome, SandboxLimits, run_programs

Generate = Callable[[Sequence[str], Sampling], list[str]]
_RESAMPLES = 1000


@dataclass(frozen=True)
class ProgramSettings:
    """samples: of each problem. at: the k of pass@k, each at most `samples`. jobs: programs that run at a time."""

    samples: int = 1
    at: tuple[int, ...] = (1,)
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 1234
    limits: SandboxLimits = SandboxLimits()
    jobs: int = 1


def ask_programs(
    problems: Sequence[Problem], generate: Generate, max_new_tokens: int, settings: ProgramSettings
) -> list[list[str]]:
    """`settings.samples` answers of each problem, ended where the problem's stops say."""
    prompts = [problem.prompt for problem in problems for _ in range(settings.samples)]
    sampling = Sampling(max_new_tokens, settings.temperature, settings.top_p, problems[0].stops, settings.seed)
    said = iter(generate(prompts, sampling))
    return [[answer_of(problem, next(said)) for _ in range(settings.samples)] for problem in problems]


def judge_programs(
    problems: Sequence[Problem], answers: Sequence[Sequence[str]], settings: ProgramSettings
) -> list[list[Outcome]]:
    """Every answer run against its problem's tests."""
    runs = [
        (problem.program + one, problem.tests) for problem, row in zip(problems, answers, strict=True) for one in row
    ]
    outcomes = iter(run_programs(runs, settings.limits, settings.jobs))
    return [[next(outcomes) for _ in row] for row in answers]


def program_result(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    outcomes: Sequence[Sequence[Outcome]] | None,
    settings: ProgramSettings,
) -> dict[str, Any]:
    """The task's entry in a results file. Without outcomes (nothing was executed) BLEU alone."""
    metrics: dict[str, dict[str, float | None]] = {}
    records: dict[str, Any] = {"digest": _digest(problems)}
    if outcomes is not None:
        counts = [(len(row), sum(one.passed for one in row)) for row in outcomes]
        for k in settings.at:
            value, error = mean_pass_at_k(counts, k)
            metrics[f"pass@{k}"] = {"value": value, "stderr": error}
        records["passed"] = [list(pair) for pair in counts]
    if all(problem.reference.strip() for problem in problems):
        rows = [bleu_counts(row[0], problem.reference) for problem, row in zip(problems, answers, strict=True)]
        metrics["bleu"] = bleu_metric(rows, settings.seed)
        records["bleu"] = rows
    return {"metrics": metrics, "items": len(problems), "records": records}


def bleu_metric(rows: Sequence[Sequence[int]], seed: int) -> dict[str, float | None]:
    """BLEU of the corpus; its standard error by a bootstrap over items, as a corpus figure has no other."""
    counts = np.array(rows, dtype=np.float64)
    generator = np.random.default_rng(seed)
    drawn = [counts[generator.integers(0, len(rows), len(rows))].sum(0) for _ in range(_RESAMPLES)]
    error = float(bleu_of(np.array(drawn)).std(ddof=1)) if len(rows) > 1 else None
    return {"value": float(bleu_of(counts.sum(0))), "stderr": error}


def sample_rows(
    problems: Sequence[Problem], answers: Sequence[Sequence[str]], outcomes: Sequence[Sequence[Outcome]] | None
) -> list[dict[str, Any]]:
    """Every sample as one row, in the form that HumanEval's authors give: task_id, completion, passed, result."""
    rows: list[dict[str, Any]] = []
    for number, (problem, row) in enumerate(zip(problems, answers, strict=True)):
        for place, completion in enumerate(row):
            one: dict[str, Any] = {"task_id": problem.name, "completion": completion}
            if outcomes is not None:
                outcome = outcomes[number][place]
                one |= {"passed": outcome.passed, "result": "passed" if outcome.passed else outcome.reason}
            rows.append(one)
    return rows


def _digest(problems: Sequence[Problem]) -> str:
    parts = (f"{one.name}\x1f{one.prompt}\x1f{one.tests}\x1e" for one in problems)
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
