"""Pairwise win rate: a judge sees a prompt and two answers, in both orders, and says which is better.

A judge is anything that answers for a list of duels: a command that reads JSON lines {"prompt", "a", "b"} and writes as
many JSON lines {"winner": "a" | "b" | "tie"}, or the built-in one, which takes the answer with fewer bits a byte under
a reference model and needs no service. Judges prefer a place (Zheng et al. 2023, "Judging LLM-as-a-Judge"); with both
orders that cancels in the rate, and its size is reported.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.evaluation.harness import HarnessModel
from megatron.evaluation.paired import exact_interval, sign_test

VERDICTS = ("a", "b", "tie")


@dataclass(frozen=True)
class Duel:
    """One prompt and the answers of two models."""

    prompt: str
    a: str
    b: str


Judge = Callable[[Sequence[Duel]], list[str]]


@dataclass(frozen=True)
class WinRate:
    """Of A against B. rate: wins plus half of the ties, both orders counted; low, high: its exact binomial 95 %
    interval, wider than need be where there are many ties.

    p: of the exact two-sided sign test over wins and losses, ties left out. wins, losses, ties: pairs by the two orders
    together, a pair whose orders disagree being a tie. first: of all verdicts that name a winner, the share that names
    the answer in the first place; one half for a judge without a favourite place. by_place: pairs where both orders
    name the same place.
    """

    pairs: int
    rate: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    ties: int
    first: float | None
    by_place: int
    verdicts: list[tuple[str, str]]


def win_rate(duels: Sequence[Duel], judge: Judge, seed: int = 0) -> WinRate:
    """Has every pair judged in both orders, all 2n duels shuffled. Raises DataError for no duels or wrong verdicts."""
    if not duels:
        raise DataError("there are no prompts, so there is nothing to judge")
    both = [*duels, *(Duel(one.prompt, one.b, one.a) for one in duels)]
    order = list(range(len(both)))
    random.Random(seed).shuffle(order)
    said = judge([both[place] for place in order])
    if len(said) != len(both) or set(said) - set(VERDICTS):
        raise DataError(f"the judge gave {len(said)} verdicts for {len(both)} duels, or others than {VERDICTS}")
    verdicts = [""] * len(both)
    for place, verdict in zip(order, said, strict=True):
        verdicts[place] = verdict
    pairs = list(zip(verdicts[: len(duels)], verdicts[len(duels) :], strict=True))
    scores = [(_score(one) + 1 - _score(other)) / 2 for one, other in pairs]
    named = [verdict for verdict in verdicts if verdict != "tie"]
    low, high = exact_interval(sum(scores), len(scores))
    wins, losses = scores.count(1.0), scores.count(0.0)
    return WinRate(
        pairs=len(pairs),
        rate=sum(scores) / len(scores),
        low=low,
        high=high,
        p=sign_test(wins, losses),
        wins=wins,
        losses=losses,
        ties=len(scores) - wins - losses,
        first=named.count("a") / len(named) if named else None,
        by_place=sum(one == other != "tie" for one, other in pairs),
        verdicts=pairs,
    )


def command_judge(command: str, seconds: float) -> Judge:
    """The judge that a command line is, run once, without a shell. `seconds`: for all duels together."""
    words = shlex.split(command)
    if not words:
        raise ConfigError("--judge is empty: give a command line")

    def judge(duels: Sequence[Duel]) -> list[str]:
        content = "".join(json.dumps({"prompt": d.prompt, "a": d.a, "b": d.b}) + "\n" for d in duels)
        return _verdicts(words[0], _run(words, content.encode(), seconds), len(duels))

    return judge


def model_judge(model: HarnessModel) -> Judge:
    """Takes the answer with fewer bits a byte behind its prompt under `model`; an empty answer loses."""

    def judge(duels: Sequence[Duel]) -> list[str]:
        pairs = dict.fromkeys((d.prompt, text) for d in duels for text in (d.a, d.b) if text)
        bits = {
            pair: -score / math.log(2) / len(pair[1].encode("utf-8", "surrogatepass"))
            for pair, score in zip(pairs, model.log_likelihoods(list(pairs)) if pairs else [], strict=True)
        }
        verdicts = []
        for d in duels:
            a, b = bits.get((d.prompt, d.a), math.inf), bits.get((d.prompt, d.b), math.inf)
            verdicts.append("tie" if a == b else "a" if a < b else "b")
        return verdicts

    return judge


def _run(words: Sequence[str], content: bytes, seconds: float) -> bytes:
    try:
        judge = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise UnavailableError(f"the judge {words[0]} cannot be started: {error}") from None
    try:
        said, complaint = judge.communicate(content, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"the judge {words[0]} took longer than {seconds:.0f} s: --judge-seconds") from None
    finally:
        if judge.poll() is None:  # not waited for yet, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(judge.pid, signal.SIGKILL)
            judge.communicate()
    if judge.returncode != 0:
        last = complaint.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise UnavailableError(f"the judge {words[0]} ended with {judge.returncode}: {''.join(last) or 'no words'}")
    return said


def _verdicts(name: str, said: bytes, count: int) -> list[str]:
    lines = [line for line in said.split(b"\n") if line.strip()]
    verdicts = []
    for number, line in enumerate(lines, start=1):
        try:
            row: Any = json.loads(line)
            verdict = row["winner"]
        except (ValueError, TypeError, KeyError):
            shown = line[:60].decode("utf-8", "replace")
            raise DataError(f'the judge {name}, line {number}: {shown!r}, and {{"winner": …}} is needed') from None
        if verdict not in VERDICTS:
            raise DataError(f"the judge {name}, line {number}: winner {verdict!r}, and it may be {', '.join(VERDICTS)}")
        verdicts.append(str(verdict))
    if len(verdicts) != count:
        raise DataError(f"the judge {name} wrote {len(verdicts)} lines for {count} duels: one a line, in their order")
    return verdicts


def _score(verdict: str) -> float:
    return {"a": 1.0, "tie": 0.5, "b": 0.0}[verdict]
