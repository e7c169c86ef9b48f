"""Win rates: both orders, position bias, and judges that are commands or a model."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from evaluation.made_model import make_model

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.evaluation.harness import HarnessSettings, load_model
from megatron.evaluation.win_rate import Duel, command_judge, model_judge, win_rate


def longer(duels: Sequence[Duel]) -> list[str]:
    return ["tie" if len(d.a) == len(d.b) else "a" if len(d.a) > len(d.b) else "b" for d in duels]


def duels_of(lengths: Sequence[tuple[int, int]]) -> list[Duel]:
    return [Duel(f"p{n}", "x" * a, "y" * b) for n, (a, b) in enumerate(lengths)]


def test_the_rate_is_wins_and_half_of_the_ties() -> None:
    found = win_rate(duels_of([(3, 1), (1, 3), (2, 2), (5, 1), (9, 2)]), longer)
    assert (found.wins, found.losses, found.ties, found.pairs) == (3, 1, 1, 5)
    assert found.rate == pytest.approx(0.7) and found.low <= 0.7 <= found.high
    assert found.first == 0.5 and found.by_place == 0
    back = win_rate([Duel(d.prompt, d.b, d.a) for d in duels_of([(3, 1), (1, 3), (2, 2), (5, 1), (9, 2)])], longer)
    assert back.rate == pytest.approx(0.3)


def test_a_judge_that_loves_the_first_place_changes_nothing_and_is_found_out() -> None:
    duels = duels_of([(3, 1)] * 50)
    found = win_rate(duels, lambda asked: ["a"] * len(asked))
    assert (found.rate, found.p, found.first, found.by_place, found.ties) == (0.5, 1.0, 1.0, 50, 50)
    generator = random.Random(1)
    half = win_rate(
        duels, lambda asked: ["a" if generator.random() < 0.5 else v for v in longer(asked)]
    )  # every other verdict for the place alone
    assert half.first is not None and half.first > 0.6 and half.rate > 0.6 and half.by_place > 10


def test_a_real_difference_is_sure_and_none_is_not() -> None:
    found = win_rate(duels_of([(3, 1)] * 30 + [(1, 3)] * 10), longer)
    assert found.p < 0.01 and found.low > 0.5
    assert win_rate(duels_of([(3, 1), (1, 3)] * 20), longer).p == pytest.approx(1, abs=0.15)


def test_both_orders_are_asked_once_in_a_shuffled_row() -> None:
    asked: list[Duel] = []

    def judge(duels: Sequence[Duel]) -> list[str]:
        asked.extend(duels)
        return ["tie"] * len(duels)

    duels = duels_of([(n + 1, 100 + n) for n in range(8)])
    found = win_rate(duels, judge)
    both = [*duels, *(Duel(d.prompt, d.b, d.a) for d in duels)]
    assert sorted(map(repr, asked)) == sorted(map(repr, both)) and asked != both
    assert found.first is None and found.verdicts == [("tie", "tie")] * 8


def test_a_command_judges(repository: Path) -> None:
    command = f"{sys.executable} {repository / 'examples' / 'evaluation' / 'longest_wins.py'}"
    duels = [*duels_of([(3, 1), (1, 3), (2, 2)]), Duel("ü\n{}", "„a“\n", "")]
    assert command_judge(command, 30)(duels) == ["a", "b", "tie", "a"]
    assert win_rate(duels, command_judge(command, 30)).rate == pytest.approx(0.625)


def test_B1_judges_that_fail_are_said(tmp_path: Path) -> None:
    python = sys.executable

    def judge(program: str, seconds: float = 30) -> list[str]:
        (tmp_path / "judge.py").write_text(program)
        return command_judge(f"{python} {tmp_path / 'judge.py'}", seconds)(duels_of([(1, 2)]))

    for program, error, words in (
        ("raise SystemExit('no key')", UnavailableError, "ended with 1: no key"),
        ("print('b')", DataError, "line 1: 'b'"),
        ('print(\'{"winner": "A"}\')', DataError, "winner 'A', and it may be a, b, tie"),
        ("print('[1]')", DataError, "line 1"),
        ("", DataError, "wrote 0 lines for 1 duels"),
        ('print(\'{"winner": "a"}\\n\' * 2)', DataError, "wrote 2 lines for 1 duels"),
    ):
        with pytest.raises(error, match=words):
            judge(program)
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="longer than 1 s"):
        judge("import time, subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", 1)
    assert time.monotonic() - began < 30
    with pytest.raises(UnavailableError, match="cannot be started"):
        command_judge(str(tmp_path / "none"), 1)(duels_of([(1, 2)]))
    with pytest.raises(ConfigError, match="--judge is empty"):
        command_judge("  ", 1)
    with pytest.raises(DataError, match="no prompts"):
        win_rate([], longer)
    with pytest.raises(DataError, match="0 verdicts for 2 duels"):
        win_rate(duels_of([(1, 2)]), lambda duels: [])


def test_no_shell_reads_the_judges_command(tmp_path: Path) -> None:
    sung = tmp_path / "sung"
    with pytest.raises((UnavailableError, DataError)):
        command_judge(f"true ; touch {sung}", 5)(duels_of([(1, 2)]))
    assert not sung.exists()


def test_the_built_in_judge_takes_fewer_bits_a_byte(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path), HarnessSettings(batch_size=4, dtype="float32"))
    duels = [Duel("def f(x):\n", "    return x", " ~~ zq ~~"), Duel("import", " os", "ü" * 9), Duel("a", "", "b")]
    duels.append(Duel("a", "same", "same"))
    found = model_judge(model)(duels)
    for duel, verdict in zip(duels[:2], found, strict=False):
        bits = {
            side: -model.log_likelihoods([(duel.prompt, text)])[0] / math.log(2) / len(text.encode())
            for side, text in (("a", duel.a), ("b", duel.b))
        }
        assert verdict == min(bits, key=lambda side: bits[side])
    assert found[2:] == ["b", "tie"]
    assert json.dumps(found)


def test_few_pairs_are_never_sure() -> None:
    one = win_rate(duels_of([(1, 3)]), longer)
    assert (one.rate, one.p) == (0, 1) and one.low == 0 and one.high == pytest.approx(0.975)
    five, six = (win_rate(duels_of([(3, 1)] * count), longer) for count in (5, 6))
    assert five.p == pytest.approx(1 / 16) and five.low < 0.5 < six.low and six.p == pytest.approx(1 / 32)
    tied = win_rate(duels_of([(3, 1)] * 6 + [(2, 2)] * 4), longer)
    assert tied.p == six.p and tied.rate == 0.8 and tied.low < 0.8 < tied.high
