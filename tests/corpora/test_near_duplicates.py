"""Near duplicates: the probability of a hit against the theory, clusters against a plain union-find."""

from __future__ import annotations

import builtins
import math
import random
import re
from importlib import metadata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import UnavailableError
from megatron.corpora.near_duplicates import NearOptions, NearSigner, first_of_clusters, library
from megatron.corpora.word_hashes import SEGMENT_CHARACTERS, identifiers_of, words_of

rensa = pytest.importorskip("rensa")


def jaccard(one: str, other: str, n: int) -> float:
    """Similarity of two texts of lower-case words, by sets of tuples of strings."""
    sets = [{tuple(words[at : at + n]) for at in range(len(words) - n + 1)} for words in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def near_copies(pairs: int, changes: int, words: int, rng: random.Random) -> list[tuple[str, str]]:
    """Pairs of texts, the second with `changes` words replaced; no word is in two pairs."""
    made = []
    for pair in range(pairs):
        text = [f"p{pair}c{changes}w{word}" for word in range(words)]
        copy = list(text)
        for at in rng.sample(range(words), changes):
            copy[at] = f"new{at}p{pair}c{changes}"
        made.append((" ".join(text), " ".join(copy)))
    return made


@pytest.mark.parametrize(
    "options", [NearOptions(), NearOptions(bands=9, rows=5, n=3), NearOptions(units="identifiers", seed=7)]
)
def test_pairs_are_found_as_often_as_the_theory_says(options: NearOptions) -> None:
    """In every class of similarity the number found is within 4.5 standard deviations of the sum of 1 - (1 - s^r)^b."""
    signer, rng = NearSigner(options), random.Random(5)
    similarities, hits = [], []
    for changes in (2, 5, 8, 11, 15, 20, 30):
        copies = near_copies(150, changes, 250, rng)
        keys = signer.sign([text for pair in copies for text in pair]).reshape(len(copies), 2, options.bands)
        similar = [jaccard(one, other, options.n) for one, other in copies]
        found = (keys[:, 0] == keys[:, 1]).any(axis=1)
        chances = [1 - (1 - s**options.rows) ** options.bands for s in similar]
        deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances))
        assert abs(int(found.sum()) - sum(chances)) <= 4.5 * deviation + 1, (changes, sum(chances), found.sum())
        similarities += similar
        hits += found.tolist()
        # texts of different pairs have nothing in common and no key
        assert len(np.unique(keys[:, 0])) == keys[:, 0].size
    assert min(similarities) < 0.5 < 0.9 < max(similarities)
    assert 0 < sum(hits) < len(hits)


def test_recall_and_precision_around_the_threshold() -> None:
    options, rng = NearOptions(), random.Random(6)
    copies = [pair for changes in (1, 2, 3, 40, 60) for pair in near_copies(60, changes, 250, rng)]
    texts = [text for pair in copies for text in pair]
    first = first_of_clusters([NearSigner(options).sign(texts)])
    found = {number // 2 for number, of in enumerate(first.tolist()) if of != number}
    similar = {number for number, (one, other) in enumerate(copies) if jaccard(one, other, 5) > 0.88}
    different = {number for number, (one, other) in enumerate(copies) if jaccard(one, other, 5) < 0.45}
    assert len(similar) == 180 and len(different) == 120
    assert len(found & similar) / len(similar) > 0.98
    assert len(found & different) / len(different) < 0.1  # theory: below 0.024
    assert options.threshold == pytest.approx(0.719, abs=1e-3)


def test_case_punctuation_and_layout_make_no_difference_to_words_but_case_does_to_identifiers() -> None:
    text = "The quick brown fox jumps over the lazy dog and then sleeps for an hour"
    loud = text.upper().replace(" ", ",\n  ")
    for units, equal in (("words", True), ("identifiers", False)):
        one, other = NearSigner(NearOptions(units=units)).sign([text, loud])
        assert np.array_equal(one, other) == equal
    code = ["def read_all(path): return path.read(one_two, 3)", "def read_all (path):\n\treturn path . read(one_two,3)"]
    one, other = NearSigner(NearOptions(units="identifiers")).sign(code)
    assert np.array_equal(one, other)


@given(st.text(st.sampled_from("aZ0_.,\n\t\x1c'é"), max_size=30))
def test_ascii_and_unicode_text_have_words_by_one_definition(text: str) -> None:
    for given_text in (text, text.replace("é", "e")):
        assert words_of(given_text) == re.findall(r"[^\W_]+", given_text.lower())
        assert identifiers_of(given_text) == re.findall(r"\w+", given_text)
    assert words_of("ABC 五六def") == ["abc", "五", "六", "def"]


def test_short_texts_have_no_keys_and_are_never_duplicates() -> None:
    signer = NearSigner(NearOptions(shortest=8))
    keys = signer.sign(["one two three four five six seven", "one two three four five six seven", ""])
    assert not keys.any()
    assert first_of_clusters([keys]).tolist() == [0, 1, 2]
    assert signer.sign(["one two three four five six seven eight"]).all()


def test_signatures_do_not_depend_on_company_or_on_how_a_long_text_is_cut() -> None:
    signer = NearSigner(NearOptions())
    texts = [f"text {number} " + " ".join(f"w{number * word % 51}" for word in range(60)) for number in range(40)]
    together = signer.sign(texts)
    alone = np.concatenate([signer.sign([text]) for text in texts])
    assert np.array_equal(together, alone)
    # the same words with other white space are cut into segments elsewhere
    words = [f"word{number % 5003}" for number in range(SEGMENT_CHARACTERS // 6)]
    wide, narrow = "   ".join(words), " ".join(words)
    assert len(narrow) > SEGMENT_CHARACTERS
    assert np.array_equal(*signer.sign([wide, narrow]))


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), max_size=40),
    st.lists(st.integers(0, 40), max_size=3),
)
def test_clusters_equal_a_plain_union_find(rows: list[list[int]], cuts: list[int]) -> None:
    parent = list(range(len(rows)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for one in range(len(rows)):
        for other in range(one):
            if any(a == b != 0 for a, b in zip(rows[one], rows[other], strict=True)):
                low, high = sorted((root(one), root(other)))
                parent[high] = low
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    keys = np.array(rows, np.uint64).reshape(-1, 3)
    parts = [keys[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]
    assert first_of_clusters(parts).tolist() == [root(number) for number in range(len(rows))]


def test_a_long_chain_is_one_cluster() -> None:
    """Each document shares a key with the next alone, in shuffled order: the worst case for following labels."""
    links = np.arange(20_000, dtype=np.uint64)
    keys = np.stack([links // 2 * 2 + 1, (links + 1) // 2 * 2 + 2], axis=1)
    shuffled = np.random.default_rng(1).permutation(keys)
    assert not first_of_clusters([shuffled]).any()


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "rensa":
            raise ImportError("No module named 'rensa'")
        return real(name, *rest, **named)

    def no_version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(metadata, "version", no_version)
    with pytest.raises(UnavailableError, match=r"pip install 'stagemix\[near-dedup\]'"):
        NearSigner(NearOptions())
    with pytest.raises(UnavailableError, match="rensa"):
        library()


def test_options_say_which_library_signs() -> None:
    assert NearOptions().to_json()["library"] == f"rensa {metadata.version('rensa')}"
