"""What [results] of a study may ask: refused before anything runs, or turned into parts of what data decide."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study.made_evaluation import BENCH, JUDGE, ROOT, Process, end_of, planned_study, study_words, write_corpora
from study.made_studies import write
from tiny_run import write_corpus

from megatron.config.errors import ConfigError, DataError, StagemixError
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.evaluation.held_out_text import held_out_documents, held_out_texts
from megatron.evaluation.task_files import write_held_out_tasks
from megatron.study.due_tasks import due_tasks
from megatron.study.held_out_questions import unaskable_sources
from megatron.study.node_evaluation import evaluate_study
from megatron.study.node_parts import Part, key_of
from megatron.study.node_questions import Questions
from megatron.study.plan import PlannedStudy, plan_study
from megatron.tokenizers.byte_level import ByteTokenizer


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study's data, and nothing trained."""
    folder = tmp_path_factory.mktemp("study")
    write_corpora(folder)
    return folder


@pytest.mark.parametrize(
    ("results", "kind", "words"),
    [
        ({"suites": [{"name": "stage-study"}]}, DataError, "put DIR/logic.jsonl there.*data = DIR"),
        ({"suites": [{"name": "stage-study", "data": "nowhere"}]}, ConfigError, "no such folder"),
        ({"suites": [{"name": "stage-stuby"}]}, ConfigError, "did you mean stage-study"),
        ({"suites": [{"name": "code-vs-text", "data": str(BENCH)}]}, ConfigError, "allow_code_execution = true"),
        ({"suites": [{"name": "arc", "suite": "harness", "tasks": ["arc_easy"]}]}, ConfigError, "online = true"),
        ({"suites": [{"name": "own", "tasks": ["x"], "include_path": "nix"}]}, ConfigError, "no such folder"),
        ({"suites": [{"name": "loss"}]}, ConfigError, "another part of the results"),
        ({"suites": [{"name": "heldout"}, {"name": "heldout"}]}, ConfigError, "there twice"),
        ({"suites": [{"name": "heldout", "tasks": ["a"]}]}, ConfigError, "leave tasks out"),
        ({"suites": [{"name": "code-vs-text", "pass_at": [10]}]}, ConfigError, "pass_at = 10"),
        ({"samples": {"prompts": "nowhere.jsonl"}}, DataError, "nowhere.jsonl: cannot be read"),
        ({"samples": {"prompts": []}}, ConfigError, "results.samples.prompts"),
        ({"loss": {"token": "5K"}}, ConfigError, "unknown key results.loss.token: did you mean 'tokens'"),
        ({"loss": "yes"}, ConfigError, "true, false, or a table"),
        ({"suites": [{"name": "heldout", "sources": ["pyton"]}]}, ConfigError, "did you mean 'python'"),
        ({"suites": [{"name": "stage-study", "sources": ["python"]}]}, ConfigError, "sources is for the suite"),
        ({"suites": [{"name": "heldout"}]}, DataError, "prose: 0 held-out documents of at least 440 .*python: 0 held"),
        ({"loss": {"tokens": "1K", "sources": ["pyton"]}}, ConfigError, "did you mean 'python'"),
        ({"win_rate": {"prompts": ["a"]}}, ConfigError, "give one of judge"),
        ({"win_rate": {"prompts": ["a"], "judge": "python 'judge.py"}}, ConfigError, "No closing quotation"),
        ({"win_rate": {"prompts": ["a"], "judge_model": "nix"}}, ConfigError, "no such folder"),
        ({"suite": []}, ConfigError, "suite"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(
    corpora: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any], kind: type[StagemixError], words: str
) -> None:
    process = Process(monkeypatch)
    with pytest.raises(kind, match=f"(?s){words}") as raised:
        evaluate_study(planned_study(corpora, results, "bad.toml"), say=lambda words: None)
    assert "bad.toml" in str(raised.value) and process.asked == []


def test_held_out_documents_are_needed(corpora: Path) -> None:
    words = study_words(corpora, {"loss": True})
    words["base"] = {**words["base"], "validation": {"fraction": Decimal("0")}}
    silent = Questions(plan_study(write(corpora, {**words, "results": {}}, "none.toml")))
    assert silent.notes and [part.name for part in silent.parts(end_of(silent.planned, "code"), "w")] == ["export"]
    with pytest.raises(ConfigError, match="validation.fraction is 0"):
        Questions(plan_study(write(corpora, words, "none.toml")))
    words["base"] = {**words["base"], "sources": {"python": {"tokens": "1M"}, "prose": {"tokens": "1M"}}}
    words["base"]["validation"] = {"fraction": Decimal("0.1")}
    with pytest.raises(ConfigError, match="every source is planned by its size"):
        Questions(plan_study(write(corpora, words, "none.toml")))


def test_what_is_not_trained_is_said(corpora: Path, tmp_path: Path) -> None:
    words = study_words(corpora)
    words["study"] = {**words["study"], "output": str(tmp_path / "other")}
    planned = plan_study(write(tmp_path, words))
    said: list[str] = []
    assert evaluate_study(planned, say=said.append) == 0
    assert len(said) == 2 and all("not trained" in one for one in said)
    with pytest.raises(ConfigError, match="nothing of it is trained"):
        evaluate_study(planned, ["code"], say=said.append)
    with pytest.raises(ConfigError, match="did you mean 'code'"):
        evaluate_study(planned, ["cod"], say=said.append)


def test_arms_with_other_data_under_one_name_are_asked_about_both(corpora: Path) -> None:
    write_corpus(corpora / "data/other", 9, highest=120)
    words = study_words(corpora)
    words["arms"]["code"] = {"stages": ["code"], "set": {"sources.python.data": [str(corpora / "data/other")]}}
    planned = plan_study(write(corpora, words, "sources.toml"))
    questions = Questions(planned)
    assert sorted(questions.sources) == ["prose", "python", "python@code"]
    config = questions.held_out_config(end_of(planned, "text"))
    assert set(held_out_documents(config, ByteTokenizer(), tokens=100)) == {"prose", "python", "python@code"}


def write_long(prefix: Path, seed: int) -> None:
    """A corpus whose documents are long enough to ask about."""
    words = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        tokenizer = ByteTokenizer()
        for _ in range(60):
            text = " ".join("".join(chr(97 + n) for n in words.integers(0, 26, size=6)) for _ in range(90))
            writer.add_document(np.append(np.frombuffer(text.encode(), dtype=np.uint8), tokenizer.eod_id))
        known = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        writer.manifest_fields["tokenizer"] = known


def test_heldout_asks_about_the_sources_that_it_can_and_names_the_others(corpora: Path) -> None:
    write_long(corpora / "data/long", 5)
    results = {"suites": [{"name": "heldout"}, {"name": "narrow", "suite": "heldout", "sources": ["long"]}]}
    words = study_words(corpora, results)
    words["base"]["sources"] |= {"long": {"data": [str(corpora / "data/long")]}, "later": {"tokens": "1M"}}
    planned = plan_study(write(corpora, words, "heldout.toml"))
    questions = Questions(planned)
    notes = [note for note in questions.notes if note.startswith("suite heldout leaves out source")]
    assert [note.split(":")[0].split()[-1] for note in notes] == ["later", "prose", "python"]
    assert "0 held-out documents of at least 440 characters" in notes[2] and "narrow" not in str(questions.notes)
    _, _, wide, narrow = questions.parts(end_of(planned, "code"), "w")
    assert "--source=long" in narrow.words and not any("--source" in word for word in wide.words)
    said: list[str] = []
    due_tasks(planned, True, said.append)
    assert [line.removeprefix("note: ") for line in said] == questions.notes
    words["results"] = {"suites": [{"name": "heldout", "sources": ["long", "prose"]}]}
    with pytest.raises(DataError, match="(?s)cannot be asked about prose.*leave it out of sources"):
        Questions(plan_study(write(corpora, words, "heldout.toml")))


def test_the_oracle_of_what_can_be_asked_is_what_makes_the_questions(corpora: Path) -> None:
    """What is said before training and what is found when tasks are written are the same sources."""
    write_long(corpora / "data/more", 5)
    words = study_words(corpora)
    words["base"]["sources"] |= {"long": {"data": [str(corpora / "data/more")]}}
    planned = plan_study(write(corpora, words, "oracle.toml"))
    questions = Questions(planned)
    texts = held_out_texts(questions.held_out_config(end_of(planned, "code")), ByteTokenizer())
    left_out: dict[str, str] = {}
    tasks = write_held_out_tasks(corpora / "tasks", texts, 9, 2000, 0, left_out)
    assert {task.source for task in tasks} == {"long"}
    assert set(unaskable_sources(questions.sources, "bytes")) == set(left_out) == {"prose", "python"}


def test_the_same_questions_keep_their_keys(corpora: Path) -> None:
    """A suite without `sources` has the key that it had before there was such a word."""
    suite = planned_study(corpora).study.words.results.suites[0]
    assert suite.sources == []
    planned = planned_study(corpora)
    part = Questions(planned).parts(end_of(planned, "code"), "w")[2]
    asked = suite.model_dump(mode="json", exclude={"jobs", "data", "include_path", "suite", "sources"})
    content, export = Questions(planned)._suites[0], Questions(planned).parts(end_of(planned, "code"), "w")[0].key
    assert part.key == key_of(version=1, export=export, asked=asked, content=content, dtype="float32", device="cpu")


def test_a_source_that_holds_nothing_out_has_no_loss_and_is_named(corpora: Path) -> None:
    with IndexedDatasetWriter(corpora / "data/one", np.uint16) as writer:
        tokenizer = ByteTokenizer()
        writer.add_document(np.append(np.arange(65, 90, dtype=np.uint8), tokenizer.eod_id))
        known = {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        writer.manifest_fields["tokenizer"] = known
    words = study_words(corpora, {"loss": True})
    words["base"]["sources"] |= {"one": {"data": [str(corpora / "data/one")]}}
    (note,) = Questions(plan_study(write(corpora, words, "one.toml"))).notes
    assert "not measured of one: no document of it is held out" in note
    words["results"] = {"loss": {"sources": ["one"]}}
    with pytest.raises(DataError, match="no document of one is held out"):
        Questions(plan_study(write(corpora, words, "one.toml")))


def test_no_more_is_held_out_than_every_arm_holds_out(corpora: Path) -> None:
    words = study_words(corpora, {"loss": True})
    words["arms"]["code"] = {"stages": ["code"], "set": {"validation.fraction": Decimal("0.1")}}
    planned = plan_study(write(corpora, words, "fractions.toml"))
    asked = Questions(planned).held_out_config(end_of(planned, "text"))
    few = {name: {row.number for row in rows} for name, rows in held_out_documents(asked, ByteTokenizer()).items()}
    for arm in ("text", "code"):
        config = planned.graph.nodes[end_of(planned, arm)].step.config  # type: ignore[union-attr]
        held = held_out_documents(config, ByteTokenizer())
        assert all(few[name] <= {row.number for row in held[name]} for name in few)
    words["results"] = {"suites": [{"name": "heldout"}]}
    with pytest.raises(ConfigError, match="different fractions"):
        Questions(plan_study(write(corpora, words, "fractions.toml")))


@pytest.mark.parametrize(("paper", "arm"), [("paper-a", "NN"), ("paper-b", "text")])
def test_the_papers_evaluations_can_be_asked_once_their_data_are_there(paper: str, arm: str) -> None:
    planned = plan_study(ROOT / "examples" / "studies" / paper / "full.toml", [arm])
    with pytest.raises(ConfigError, match="planned by its size"):
        Questions(planned)
    asked = planned.study.words.results
    suites = [suite.model_copy(update={"data": "nowhere"}) for suite in asked.suites]
    with pytest.raises(ConfigError, match="no such folder"):
        Questions(_asking(planned, loss=False, suites=suites))
    changes: dict[str, Any] = {"suites": [suite.model_copy(update={"data": str(BENCH)}) for suite in asked.suites]}
    if asked.win_rate is not None:
        changes["win_rate"] = asked.win_rate.model_copy(update={"prompts": ["a"], "judge": JUDGE})
    found = Questions(_asking(planned, loss=False, **changes))
    parts = [part.name for part in found.parts(planned.graph.arms[0].path[-1], "w")]
    assert parts == (["export", "stage-study"] if paper == "paper-a" else ["export", "code-vs-text", "answers"])


def _asking(planned: PlannedStudy, **changes: Any) -> PlannedStudy:
    results = planned.study.words.results.model_copy(update=changes)
    words = planned.study.words.model_copy(update={"results": results})
    return replace(planned, study=replace(planned.study, words=words))


def test_parts_that_depend_on_the_export_follow_it(corpora: Path) -> None:
    planned = planned_study(corpora)
    name = end_of(planned, "code")
    one, other = (Questions(planned).parts(name, weights) for weights in ("a" * 64, "b" * 64))
    assert [part.name for part in one] == ["export", "loss", "stage-study", "samples", "answers"]
    assert all(a.key != b.key for a, b in zip(one, other, strict=True))
    assert all(isinstance(part, Part) for part in one)
