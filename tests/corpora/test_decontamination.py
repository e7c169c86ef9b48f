"""Decontamination: planted items are found wherever they stand; verdicts equal a search for strings of words."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.config.errors import DataError
from megatron.corpora.decontamination import DecontaminationOptions, EvaluationSet
from megatron.corpora.word_hashes import SEGMENT_CHARACTERS

QUESTION = "If a train leaves Boston at noon and travels west at sixty miles per hour, when does it reach Albany?"
FILLER = "Some text about other things entirely, which nobody would ask in an examination. "


def written(folder: Path, items: list[object], name: str = "set.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def plain_words(text: str) -> list[str]:
    return re.sub("[^a-z0-9]", " ", text.lower()).split()


def contains(text: str, items: list[str], n: int, shortest: int) -> bool:
    """By strings: any n words of an item in a row, or a whole one of at least `shortest`, in the words of the text."""
    space = " " + " ".join(plain_words(text)) + " "
    for item in map(plain_words, items):
        if len(item) >= min(shortest, n):
            length = min(n, len(item))
            if any(" " + " ".join(item[at : at + length]) + " " in space for at in range(len(item) - length + 1)):
                return True
    return False


@pytest.fixture
def options(tmp_path: Path) -> DecontaminationOptions:
    return DecontaminationOptions((written(tmp_path, [{"question": QUESTION, "answer": "at three"}]),))


@pytest.mark.parametrize(
    "text",
    [
        QUESTION + "\n" + FILLER * 3,
        FILLER * 3 + QUESTION,
        FILLER + QUESTION.replace(" ", "\n") + FILLER,
        FILLER + QUESTION.upper().replace(",", " --") + FILLER,
        FILLER + "[" + " ".join(QUESTION.split()[:13]) + "]" + FILLER,
        "# " + "\r\n#  ".join(QUESTION.split()[7:]),
        FILLER * (2 * SEGMENT_CHARACTERS // len(FILLER)) + QUESTION,
    ],
)
def test_a_planted_question_is_found(options: DecontaminationOptions, text: str) -> None:
    evaluation = EvaluationSet.open(options)
    assert evaluation.contaminates(text)
    changed = re.sub("(?i)train|noon|hour", "other", text)  # no 13 words in a row are left
    assert not evaluation.contaminates(changed)


def test_twelve_words_are_not_thirteen(options: DecontaminationOptions) -> None:
    evaluation = EvaluationSet.open(options)
    words = QUESTION.split()
    for begin in range(len(words) - 12):
        assert evaluation.contaminates(FILLER + " ".join(words[begin : begin + 13]) + " " + FILLER)
        assert not evaluation.contaminates(FILLER + " ".join(words[begin : begin + 12]) + " " + FILLER)
        assert not evaluation.contaminates(" ".join(words[begin : begin + 6] + ["or"] + words[begin + 6 : begin + 13]))


def test_a_match_across_the_cut_of_a_long_document_is_found(options: DecontaminationOptions) -> None:
    """The words of a match lie on both sides of a segment's end, at every offset."""
    evaluation = EvaluationSet.open(options)
    words = QUESTION.split()[:13]
    for before in range(1, 13):
        head = " ".join(words[:before]) + " "
        text = "x" * (SEGMENT_CHARACTERS - len(head) - 1) + " " + head + " ".join(words[before:])
        assert evaluation.contaminates(text + " " + FILLER)
        assert not evaluation.contaminates(text.removesuffix(words[-1]))


def test_short_items_count_whole_and_the_shortest_not_at_all(tmp_path: Path) -> None:
    eight, seven = "one two three four five six seven eight", "a b c d e f g"
    evaluation = EvaluationSet.open(DecontaminationOptions((written(tmp_path, [{"q": eight}, {"q": seven}]),)))
    assert (evaluation.items, evaluation.ignored, evaluation.ngrams) == (1, 1, 1)
    assert evaluation.contaminates(f"zero {eight} nine")
    assert not evaluation.contaminates(eight.removesuffix(" eight"))
    assert not evaluation.contaminates(seven)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 6), st.integers(1, 6))
def test_verdicts_equal_a_search_for_strings(tmp_path: Path, rng: random.Random, n: int, shortest: int) -> None:
    def made(words: int) -> str:
        return "".join(rng.choice("aaabbcdE") + rng.choice([" ", ", ", "\n", "__"]) for _ in range(words))

    items = [made(rng.randrange(9)) for _ in range(rng.randrange(4))]
    path = written(tmp_path, [{"item": item} for item in items])
    evaluation = EvaluationSet.open(DecontaminationOptions((path,), n=n, shortest=shortest))
    for _ in range(8):
        text = made(rng.randrange(30))
        assert evaluation.contaminates(text) == contains(text, items, n, shortest), (text, items)


def test_random_documents_of_the_items_own_words_equal_a_search_for_strings(tmp_path: Path) -> None:
    """Every word known, thousands of n-grams: the case in which a hash would show its faults."""
    rng = random.Random(3)
    vocabulary = [f"w{number}" for number in range(12)]
    items = [" ".join(rng.choices(vocabulary, k=rng.randrange(3, 12))) for _ in range(300)]
    evaluation = EvaluationSet.open(
        DecontaminationOptions((written(tmp_path, [{"item": item} for item in items]),), n=5, shortest=4)
    )
    verdicts = []
    for _ in range(200):
        text = " ".join(rng.choices(vocabulary, k=30))
        verdicts.append(contains(text, items, 5, 4))
        assert evaluation.contaminates(text) == verdicts[-1]
    assert 20 < sum(verdicts) < 180


def test_a_minimum_of_matches_and_of_share(options: DecontaminationOptions) -> None:
    thirteen, sixteen = " ".join(QUESTION.split()[:13]), " ".join(QUESTION.split()[:16])
    four = EvaluationSet.open(replace(options, minimum_matches=4))
    assert four.contaminates(sixteen) and not four.contaminates(thirteen)
    half = EvaluationSet.open(replace(options, minimum_share=0.5))
    assert half.contaminates(thirteen + " more" * 13)
    assert not half.contaminates(thirteen + " more" * 14)


def test_fields_and_nested_strings(tmp_path: Path) -> None:
    record = {"question": QUESTION, "choices": {"text": ["short", QUESTION[::-1] + " " + FILLER]}, "id": 3}
    path = written(tmp_path, [record])
    everything = EvaluationSet.open(DecontaminationOptions((path,)))
    assert everything.contaminates(FILLER * 2 + QUESTION) and everything.contaminates(QUESTION[::-1] + " " + FILLER)
    choices = EvaluationSet.open(DecontaminationOptions((path,), ("choices",)))
    assert not choices.contaminates(QUESTION) and choices.contaminates(QUESTION[::-1] + " " + FILLER)


def test_text_files_have_one_item_a_line(tmp_path: Path) -> None:
    path = tmp_path / "items.txt"
    path.write_text(QUESTION + "\n" + FILLER, encoding="utf-8")
    evaluation = EvaluationSet.open(DecontaminationOptions((str(path),)))
    assert evaluation.items == 2
    assert evaluation.contaminates(QUESTION) and not evaluation.contaminates(
        " ".join(QUESTION.split()[-6:]) + FILLER[:40]
    )


def test_unspaced_scripts_count_characters(tmp_path: Path) -> None:
    item = "如果一列火车中午离开波士顿它什么时候到达"
    path = written(tmp_path, [{"q": item}])
    evaluation = EvaluationSet.open(DecontaminationOptions((path,)))
    assert evaluation.contaminates("前文。" + item[3:16] + "后文") and not evaluation.contaminates(item[:12] + "后文")
    decomposed = "Cafe\u0301 " + QUESTION
    accents = EvaluationSet.open(DecontaminationOptions((written(tmp_path, [{"q": "café " + QUESTION}]),), n=5))
    assert accents.contaminates(" ".join(decomposed.split()[:5]))


def test_prepared_sets_judge_alike_and_are_written_once(options: DecontaminationOptions, tmp_path: Path) -> None:
    prepared = options.prepared(tmp_path / "work")
    files = sorted((tmp_path / "work").iterdir())
    assert [path.suffix for path in files] == [".json", ".npy"]
    stamps = [path.stat().st_mtime_ns for path in files]
    assert options.prepared(tmp_path / "work") == prepared
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "work").iterdir())] == stamps
    Path(options.files[0]).unlink()  # a worker needs the table alone
    evaluation = EvaluationSet.open(prepared)
    assert evaluation.contaminates(FILLER + QUESTION) and not evaluation.contaminates(FILLER)
    files[1].write_bytes(b"torn")
    with pytest.raises(DataError, match="evaluation n-grams cannot be read"):
        EvaluationSet.open(prepared)


def test_identity_follows_content_not_paths(tmp_path: Path) -> None:
    one = DecontaminationOptions((written(tmp_path, [{"q": QUESTION}], "one.jsonl"),))
    moved = DecontaminationOptions((written(tmp_path, [{"q": QUESTION.upper()}], "two.jsonl"),))
    other = DecontaminationOptions((written(tmp_path, [{"q": FILLER + QUESTION}], "three.jsonl"),))
    assert one.to_json() == moved.to_json() == one.prepared(tmp_path).to_json()
    assert one.to_json()["digest"] != other.to_json()["digest"]
    assert one.to_json() != replace(one, minimum_matches=2).to_json()


@pytest.mark.parametrize(
    ("content", "fields", "said"),
    [
        ('{"q": "a"}\n{"q": \n', (), "line 2: not JSON"),
        ('["a"]\n', (), "line 1: list, not a JSON object"),
        ('{"q": "a", "r": 1}\n', ("question",), "none of the fields question; its fields are q, r"),
        ("\xff", (), "UTF-8"),
    ],
)
def test_bad_evaluation_files_are_named(tmp_path: Path, content: str, fields: tuple[str, ...], said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=re.escape(said)) as raised:
        EvaluationSet.open(DecontaminationOptions((str(path),), fields))
    assert str(path) in str(raised.value)
    with pytest.raises(DataError, match="absent"):
        EvaluationSet.open(DecontaminationOptions((str(tmp_path / "absent.txt"),)))


def test_no_items_contaminate_nothing(tmp_path: Path) -> None:
    evaluation = EvaluationSet.open(DecontaminationOptions((written(tmp_path, [{"q": "short"}]),)))
    assert not evaluation.contaminates(QUESTION)
