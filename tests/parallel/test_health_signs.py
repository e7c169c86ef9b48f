"""What may be concluded from the last words of ranks; nobody is blamed by a guess."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron.parallel.health_signs import Blame, Sign, blame_of_hang, blame_of_lost, silent_words, where_words

SILENT = True


def signs(*words: tuple[int | None, str, str] | tuple[int | None, str, str, bool]) -> list[Sign]:
    """(step, phase, host, silent) by rank."""
    return [Sign(rank, w[0], w[1], w[2], len(w) > 3) for rank, w in enumerate(words)]


@pytest.mark.parametrize(
    ("seen", "blame"),
    [
        ([(4, "engine", "a"), (4, "engine", "b", SILENT), (4, "engine", "c")], Blame(1, "b", ("b",))),
        ([(4, "engine", "a"), (4, "engine", "b", SILENT)], Blame(1, "b", ("b",))),
        ([(4, "engine", "a"), (4, "engine", "b"), (4, "engine", "b", SILENT)], Blame(2, "b", ("b",))),
        ([(4, "engine", "a"), (4, "engine", "a", SILENT)], Blame(1, "a", ("a",))),
        (
            [(4, "engine", h, *s) for h, s in zip("abcdd", [[], [], [], [SILENT], [SILENT]], strict=True)],
            Blame(None, "d", ("d",)),
        ),
        (
            [(4, "engine", h, *s) for h, s in zip("abcd", [[], [], [SILENT], [SILENT]], strict=True)],
            Blame(None, None, ("c", "d")),
        ),
        ([(4, "engine", h, *s) for h, s in zip("abc", [[], [SILENT], [SILENT]], strict=True)], Blame()),
        ([(4, "engine", "a"), (4, "engine", "b")], Blame()),
        ([(4, "engine", "a"), (None, "", "", SILENT)], Blame()),
    ],
    ids=["one", "one of two", "one of a host", "the only host", "a host", "two hosts", "most hosts", "none", "unheard"],
)
def test_silent_ranks_are_suspected_unless_they_are_most(seen: Sequence[tuple], blame: Blame) -> None:  # type: ignore[type-arg]
    found = [Sign(s.rank, s.step, s.phase or None, s.host or None, s.silent) for s in signs(*seen)]
    assert blame_of_lost(found) == blame


@pytest.mark.parametrize(
    ("seen", "host"),
    [
        ([(4, "engine", "a"), (4, "engine", "b")], None),
        ([(4, "engine", "a"), (4, "data", "b"), (4, "engine", "c")], "b"),
        ([(4, "engine", "a"), (4, "checkpoint", "b")], "b"),
        ([(4, "engine", "a"), (3, "engine", "b"), (4, "data", "c")], None),
        ([(4, "engine", "a"), (3, "engine", "b"), (4, "engine", "c")], "b"),
        ([(4, "engine", "a", SILENT), (3, "engine", "b"), (4, "engine", "c")], "a"),
        ([(0, "makes the model", "a"), (0, "joins the process groups", "b")], None),
        ([(4, "evaluates a checkpoint", "a"), (4, "engine", "b"), (4, "engine", "c")], None),
        ([(4, "data", "a"), (4, "data", "b"), (4, "engine", "c")], None),
    ],
)
def test_a_hang_is_blamed_on_who_is_behind_where_that_is_known(seen: Sequence[tuple], host: str | None) -> None:  # type: ignore[type-arg]
    assert blame_of_hang(signs(*seen)).suspects == (() if host is None else (host,))


def test_words() -> None:
    seen = signs((4, "engine", "a"), (4, "engine", "b"), (3, "data", "c", SILENT))
    assert where_words(seen) == "rank 2: step 3, data (no sign of life; host c); ranks 0-1: step 4, engine"
    assert silent_words(seen) == " (rank 2: step 3, data, host c)" and silent_words(seen[:2]) == ""
