"""Cleaning as a whole: options from a command line, workers by pickle, one result however documents are split."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config.errors import ConfigError
from megatron.corpora.cleaning import Cleaner, CleaningOptions, Decider, Signer, prepare
from megatron.corpora.cleaning_arguments import add_cleaning_arguments, cleaning_options
from megatron.corpora.document import Document
from megatron.corpora.near_duplicates import NearOptions

pytest.importorskip("rensa")
ITEM = "Which of these planets has the most moons, by the count that was published in the year of the survey?"


def parsed(*words: str) -> CleaningOptions:
    parser = argparse.ArgumentParser()
    add_cleaning_arguments(parser)
    return cleaning_options(parser.parse_args(words))


@pytest.fixture
def evaluation(tmp_path: Path) -> str:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"question": ITEM}) + "\n", encoding="utf-8")
    return str(path)


def made_documents() -> list[Document]:
    """200 documents: every fifth repeats an earlier one, some of them with another word or other white space."""
    rng, documents = random.Random(4), []
    texts: list[str] = []
    for number in range(200):
        text = " ".join(f"w{rng.randrange(10**6)}" for _ in range(80))
        if number % 5 == 4:
            text = rng.choice(texts)
            if number % 3 == 0:
                text = text.replace(" ", "\n", 1)
            elif number % 3 == 1:
                text += " another"
        texts.append(text)
        documents.append(Document(f"d{number}", text))
    return documents


def decided(options: CleaningOptions, documents: list[Document], edges: list[int]) -> tuple[list[bool], dict[str, int]]:
    signer, decider = Signer(options), Decider(options)
    for begin, end in zip(edges, edges[1:], strict=False):
        decider.add(signer.sign([document.text for document in documents[begin:end]]))
    dropped, counts = decider.finish()
    return dropped.tolist(), counts


def test_the_default_cleans_nothing() -> None:
    options = parsed()
    assert options == CleaningOptions() and not options.finds_duplicates
    assert Cleaner(options).reject(Document("d", "")) is None
    assert Signer(options).sign(["a"]) == {}
    decider = Decider(options)
    decider.add({})
    dropped, counts = decider.finish()
    assert len(dropped) == 0 and counts == {}
    assert not any(options.to_json().values())


def test_duplicates_do_not_depend_on_the_split() -> None:
    options, documents = parsed("--exact-duplicates", "whitespace", "--near-duplicates"), made_documents()
    whole = decided(options, documents, [0, 200])
    rng = random.Random(1)
    for _ in range(5):
        edges = [0, *sorted(rng.choices(range(201), k=6)), 200]
        assert decided(options, documents, edges) == whole
    repeats = [number for number in range(200) if number % 5 == 4]
    assert [number for number, gone in enumerate(whole[0]) if gone] == repeats
    assert sum(whole[1].values()) == 40
    assert whole[1]["near-duplicate"] == sum(number % 3 == 1 for number in repeats)


def test_exact_and_whitespace_are_two_choices() -> None:
    documents = [Document("a", "x  y"), Document("b", "x y"), Document("c", " x\ny\n"), Document("d", "x y")]
    assert decided(parsed("--exact-duplicates"), documents, [0, 4]) == (
        [False, False, False, True],
        {"exact-duplicate": 1},
    )
    assert decided(parsed("--exact-duplicates", "whitespace"), documents, [0, 4])[1] == {"exact-duplicate": 3}


def test_memory_mapped_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    options, documents = parsed("--exact-duplicates", "--near-duplicates"), made_documents()
    decider = Decider(options)
    for number, begin in enumerate(range(0, 200, 50)):
        arrays = Signer(options).sign([document.text for document in documents[begin : begin + 50]])
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}{number}.npy", array)
        decider.add({name: np.load(tmp_path / f"{name}{number}.npy", mmap_mode="r") for name in arrays})
    dropped, counts = decider.finish()
    assert (dropped.tolist(), counts) == decided(options, documents, [0, 200])


def test_parts_of_different_lengths_are_refused() -> None:
    decider = Decider(CleaningOptions(exact="exact", near=NearOptions(bands=2)))
    with pytest.raises(ValueError, match="different lengths"):
        decider.add({"exact": np.zeros((2, 2), np.uint64), "near": np.zeros((3, 2), np.uint64)})


def test_filters_come_before_decontamination(evaluation: str) -> None:
    cleaner = Cleaner(parsed("--filter", "word-count=25", "--decontaminate", evaluation))
    assert cleaner.reject(Document("a", ITEM)) == "word-count"
    assert cleaner.reject(Document("b", ITEM + " and more of it" * 3)) == "decontamination"
    assert cleaner.reject(Document("c", "other words " * 20)) is None


def _in_a_worker(options: CleaningOptions) -> tuple[str | None, list[Any], dict[str, Any]]:
    document = Document("b", ITEM + " and more of it" * 3)
    arrays = Signer(options).sign([document.text])
    return Cleaner(options).reject(document), [array.tolist() for array in arrays.values()], options.to_json()


def test_a_spawned_worker_judges_and_signs_alike(evaluation: str, tmp_path: Path) -> None:
    """Another process, with another seed of Python's own hash."""
    words = ["--filter", "gopher-quality", "--filter", "word-count=5", "--exact-duplicates", "--near-duplicates"]
    options = prepare(parsed(*words, "--decontaminate", evaluation), tmp_path / "work")
    assert pickle.loads(pickle.dumps(options)) == options
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply_async(_in_a_worker, (options,)).get(timeout=120)
    assert there == _in_a_worker(options)
    assert there[0] == "decontamination"


def test_identity_names_every_choice(evaluation: str) -> None:
    choices = [
        [],
        ["--filter", "stack"],
        ["--filter", "stack", "--filter", "max-line-length=999"],
        ["--exact-duplicates"],
        ["--exact-duplicates", "whitespace"],
        ["--near-duplicates"],
        ["--near-duplicates", "identifiers"],
        ["--near-duplicates", "--near-bands", "20"],
        ["--near-duplicates", "--near-rows", "5"],
        ["--near-duplicates", "--near-n", "4"],
        ["--near-duplicates", "--near-shortest", "20"],
        ["--decontaminate", evaluation],
        ["--decontaminate", evaluation, "--decontaminate-n", "8"],
        ["--decontaminate", evaluation, "--decontaminate-shortest", "5"],
        ["--decontaminate", evaluation, "--decontaminate-matches", "3"],
        ["--decontaminate", evaluation, "--decontaminate-share", "0.1"],
        ["--decontaminate", evaluation, "--decontaminate-fields", "question"],
    ]
    said = [json.dumps(parsed(*words).to_json(), sort_keys=True, allow_nan=False) for words in choices]
    assert len(set(said)) == len(choices)
    assert said == [json.dumps(parsed(*words).to_json(), sort_keys=True) for words in choices]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--filter", "gofer-quality"], "gopher-quality"),
        (["--near-duplicates", "--near-bands", "0"], "--near-bands 0"),
        (["--decontaminate", "/nowhere/set.jsonl"], "/nowhere/set.jsonl: no such file"),
    ],
)
def test_choices_that_cannot_be_carried_out(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(*words)


def test_shares_and_counts_are_checked(evaluation: str) -> None:
    for words in (["--decontaminate-share", "1.5"], ["--decontaminate-n", "0"], ["--decontaminate-matches", "0"]):
        with pytest.raises(ConfigError, match=words[0]):
            parsed("--decontaminate", evaluation, *words)


def test_the_list_of_filters_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed("--list-filters")
    assert stopped.value.code == 0
    assert "gopher-repetition" in capsys.readouterr().out
