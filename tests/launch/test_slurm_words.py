"""Times and arrays against tables that are written out by hand from sbatch's manual; quoting against a real bash."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.launch.slurm_words import (
    ArraySpec,
    check_dependency,
    directive,
    parse_array,
    parse_time,
    time_words,
    with_values,
)

# the six forms of `man sbatch`, --time
TIMES = {
    "90": 5400,
    "90:30": 5430,
    "12:00:00": 43200,
    "1:02:03": 3723,
    "2-0": 172800,
    "2-12:30": 217800,
    "1-02:03:04": 93784,
    "unlimited": None,
    "INFINITE": None,
}


@pytest.mark.parametrize("words, seconds", TIMES.items())
def test_times_as_sbatch_reads_them(words: str, seconds: int | None) -> None:
    assert parse_time(words) == seconds


@pytest.mark.parametrize("words", ["", "24h", "1d", "-5", "1:2:3:4", "2-", "0", "00:00:00", "twelve", "1.5"])
def test_no_time_is_refused_with_what_to_write(words: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        parse_time(words)


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_days_hours_minutes_seconds_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = days * 86400 + hours * 3600 + minutes * 60 + seconds
    assert parse_time(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == total
    spoken = {"day": 86400, "days": 86400, "h": 3600, "min": 60, "s": 1}
    parts = time_words(total).split()
    assert sum(int(number) * spoken[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True)) == total


ARRAYS = {
    "0-3": ([0, 1, 2, 3], None),
    "7": ([7], None),
    "1,3,7": ([1, 3, 7], None),
    "0-15:4": ([0, 4, 8, 12], None),
    "0-31%4": (list(range(32)), 4),
    "5-6,1-2,2%1": ([1, 2, 5, 6], 1),
}


@pytest.mark.parametrize("words, expected", ARRAYS.items())
def test_arrays_as_sbatch_reads_them(words: str, expected: tuple[list[int], int | None]) -> None:
    found = parse_array(words)
    assert (list(found.ids), found.limit) == expected


@pytest.mark.parametrize(
    "words", ["", "a", "3-1", "1-2-3", "0-4:0", "1,,2", "0-3%", "0-3%0", "0-3%x", "-1", "0-9999999"]
)
def test_no_array_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--array"):
        parse_array(words)


@given(st.sets(st.integers(0, 200), min_size=1), st.none() | st.integers(1, 9))
def test_an_array_is_written_as_it_is_read(ids: set[int], limit: int | None) -> None:
    spec = ArraySpec(tuple(sorted(ids)), limit)
    assert parse_array(spec.words) == spec
    assert spec.contiguous == (sorted(ids) == list(range(min(ids), max(ids) + 1)))


@pytest.mark.parametrize(
    "words", ["afterok:1", "afterok:1:2,afterany:3_4", "singleton", "after:5+30", "afterok:1?afterany:2"]
)
def test_dependencies_that_sbatch_knows(words: str) -> None:
    assert check_dependency(words) == words


@pytest.mark.parametrize("words", ["1234", "afterok", "afterok:", "before:1", "afterok:x", "afterok:1;rm"])
def test_other_dependencies_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--dependency"):
        check_dependency(words)


def test_directives_hold_one_line() -> None:
    assert directive("nodes", 4) == "#SBATCH --nodes=4"
    assert directive("requeue") == "#SBATCH --requeue"
    assert directive("job-name", "two words") == "#SBATCH --job-name='two words'"
    for value in ("a\nb", "a\\b", "\x7f"):
        with pytest.raises(ConfigError, match="no #SBATCH line"):
            directive("comment", value)


TEXT = st.text(st.characters(blacklist_characters="\x00", blacklist_categories=("Cs",)), max_size=12)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans(), TEXT), min_size=1, max_size=40))
def test_values_arrive_unchanged_in_a_real_bash(cases: list[tuple[str, bool, str]]) -> None:
    words = [f"{before}{{task}}{after}" if placed else before + after for before, placed, after in cases]
    line = " ".join(with_values(word, {"task": '"$SLURM_ARRAY_TASK_ID"'}) for word in words)
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"],
        env={"SLURM_ARRAY_TASK_ID": "17", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.decode().split("\0")[:-1] == [word.replace("{task}", "17") for word in words]


def test_braces_without_a_meaning_stay() -> None:
    assert with_values("a={b}", {}) == "'a={b}'"
    assert with_values("{item}/{other}", {"item": '"$item"'}) == "\"$item\"'/{other}'"
