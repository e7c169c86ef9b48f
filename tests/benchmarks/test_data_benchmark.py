"""The data benchmark in its quick mode, the demonstration of stage switches, and what both are made of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import data_corpus
import data_measure
import data_sampling
import data_synthetic
import phase_transition

from megatron.data.indexed_dataset import IndexedDataset


def run(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A benchmark's command, from the root."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=280)


def test_quick_run_of_every_row_and_its_checks(repository: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    done = run(repository, "benchmarks/data.py", "--quick", "--repeat", "1", "--output", str(report))
    text = report.read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^## ([a-z-]+):", text, re.MULTILINE) == [
        "preprocess", "sentencepiece", "index", "second-arm", "blend", "resume", "read",
    ]  # fmt: skip
    assert "FAILED" not in text and "ids equal to sentencepiece's on each of" in text
    assert "ids equal to tokenizers' on each of" in text and "after the second arm" in text


def test_a_row_that_fails_is_reported_and_is_exit_code_1(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core" / "datasets").mkdir(parents=True)  # a tree that is not Megatron-LM
    done = run(repository, "benchmarks/data.py", "--quick", "--repeat", "1", "--only", "read", "--peer", str(tmp_path))
    assert done.returncode == 1
    assert "## read: did not finish" in done.stdout and "FAILED" in done.stdout


def test_our_second_stage_repeats_nothing(repository: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = run(repository, "benchmarks/phase_transition.py", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    ours = json.loads(figures.read_text())["ours"]
    assert {name: share["samples"] for name, share in ours.items()} == {"text": 500, "code": 500, "all": 1000}
    assert ours["all"]["tokens"] == 1000 * phase_transition.SEQ_LENGTH
    assert ours["all"]["tokens_repeated"] == ours["all"]["samples_repeated"] == 0
    read = {"text": 1300, "code": 700}
    for name, samples in read.items():
        assert ours[name]["corpus"] - ours[name]["unseen"] == samples * phase_transition.SEQ_LENGTH


def test_shares_counts_what_a_stage_repeats() -> None:
    first = [("text", np.array([0, 1, 2])), ("code", np.array([5, 6, 7]))]
    second = [("text", np.array([2, 3, 4])), ("text", np.array([5, 6, 7])), ("code", np.array([5, 6, 7]))]
    found = phase_transition.shares([first, second], {"text": 10, "code": 9})
    assert found["text"] == phase_transition.Share(2, 1, 6, 1, 10, 2)
    assert found["code"] == phase_transition.Share(1, 1, 3, 3, 9, 6)
    assert found["all"] == phase_transition.Share(3, 2, 9, 4, 19, 8)


def make_roots(folder: Path) -> list[Path]:
    """A little code and prose."""
    (folder / "doc").mkdir()
    for number in range(5):
        lines = [f"def function_{number}_{line}(): return {line}\n" for line in range(400)]
        (folder / f"module_{number}.py").write_text("".join(lines))
        words = [f"Paragraph {number}.{line} says that words come in order.\n" for line in range(400)]
        (folder / "doc" / f"chapter_{number}.md").write_text("".join(words))
    (folder / "doc" / "special.md").write_text(f"a text with {data_corpus.END_OF_DOCUMENT} inside it\n" * 20)
    (folder / "doc" / "latin.md").write_bytes(b"caf\xe9 " * 40)
    return [folder]


def test_corpus_is_deterministic_half_code_and_free_of_special_words(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    roots = make_roots(tmp_path / "roots")
    one = data_corpus.make_corpus(tmp_path / "one", 90_000, roots=roots)
    other = data_corpus.make_corpus(tmp_path / "other", 90_000, roots=roots)
    assert one.sha256 == other.sha256 and one.passes == 1
    content = Path(one.path).read_text()
    assert one.bytes == len(content.encode()) and one.documents == content.count("\n") == len(content.splitlines())
    assert 0.45 < one.code_bytes / one.text_bytes < 0.55
    assert not any(word in content for word in data_corpus.SPECIAL_WORDS)
    assert data_corpus.make_corpus(tmp_path / "seed", 90_000, seed=2, roots=roots).sha256 != one.sha256


def test_documents_given_again_are_marked(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    corpus = data_corpus.make_corpus(tmp_path / "made", 700_000, roots=make_roots(tmp_path / "roots"))
    texts = list(data_corpus.texts(corpus.path))
    assert corpus.passes > 1 and not texts[0].startswith("pass ")
    again = [text for text in texts if text.startswith("pass ")]
    assert {int(text.split(None, 2)[1]) for text in again} == set(range(2, corpus.passes + 1))
    assert len(set(texts)) == len(texts)


def test_first_part_is_the_head_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    whole = data_corpus.make_corpus(tmp_path / "made", 120_000, roots=make_roots(tmp_path / "roots"))
    part = data_corpus.first_part(whole, 1 / 3)
    content = Path(part.path).read_bytes()
    assert Path(whole.path).read_bytes().startswith(content) and content.endswith(b"\n")
    assert abs(part.bytes - whole.bytes / 3) < 20_000 and part.documents == content.count(b"\n")


def test_numbered_files_say_where_each_token_stands(tmp_path: Path) -> None:
    prefix = data_synthetic.numbered(tmp_path / "numbers", 5_000, 40, seed=3)
    file, starts = IndexedDataset(prefix), phase_transition.document_starts(prefix)
    assert file.token_count == starts[-1] >= 5_000 and file.document_count == len(starts) - 1
    for document in (0, 1, file.document_count - 1):
        expected = np.arange(starts[document], starts[document + 1])
        assert np.array_equal(file.tokens(document), expected)


def test_files_without_tokens_have_their_lengths(tmp_path: Path) -> None:
    prefix = data_synthetic.web_like(tmp_path / "web", 300, seed=1)
    assert np.array_equal(IndexedDataset(prefix).document_lengths(), data_synthetic.web_lengths(300, 1))


@pytest.mark.parametrize("sources", [2, 8, 64])
def test_weights_of_the_blend_sum_to_a_million(sources: int) -> None:
    units = data_sampling.units_of(sources)
    assert len(units) == sources and sum(units) == 10**6 and min(units) >= 1


def test_ratios_say_how_much_better_ours_is() -> None:
    assert data_measure.Figure("time", "s", [6.0, 7.0, 100.0], [2.0]).ratio() == 3.5
    assert data_measure.Figure("rate", "MB/s", [10.0], [25.0], higher=True).ratio() == 2.5
    assert data_measure.Figure("bytes", "MB", [10.0], [0.0]).ratio() is None
    assert data_measure.Figure("alone", "s", [], [1.0]).ratio() is None


def test_a_measurement_gives_what_the_process_printed_used_and_took() -> None:
    """From a small process, as the benchmark's own is: Linux counts the parent's memory to a child before it starts."""
    code = "import time; held = b'x' * 60_000_000; time.sleep(0.3); print('RESULT {\\\"answer\\\": 42}')"
    outer = f'import sys, data_measure; print(data_measure.measure([sys.executable, "-c", """{code}"""], 60))'
    folder = Path(data_measure.__file__).parent
    words = subprocess.run([sys.executable, "-c", outer], cwd=folder, capture_output=True, text=True, timeout=120)
    found = re.search(r"seconds=([0-9.]+), peak_mb=([0-9.]+), values=\{'answer': 42\}", words.stdout)
    assert found, words.stdout + words.stderr
    assert float(found[1]) > 0.3 and 60 < float(found[2]) < 250


def test_a_measurement_that_fails_or_runs_too_long_is_named() -> None:
    with pytest.raises(data_measure.MeasurementFailed, match="exit code 3(.|\n)*the reason"):
        data_measure.measure([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], 60)
    with pytest.raises(data_measure.MeasurementFailed, match="limit of 1 s"):
        data_measure.measure([sys.executable, "-c", "import time; time.sleep(60)"], 1)
