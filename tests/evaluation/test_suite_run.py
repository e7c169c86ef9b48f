"""Suites through the harness: local data ask what the harness asks, and the inverted choice is what it says."""

from __future__ import annotations

import importlib
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.made_model import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.config.errors import ConfigError, DataError
from megatron.evaluation import suite_run
from megatron.evaluation.harness import HarnessModel, HarnessSettings, Sampling, load_model, own_task_files
from megatron.evaluation.harness_results import task_result
from megatron.evaluation.program_tasks import ProgramSettings
from megatron.evaluation.suite import Suite, read_suite
from megatron.evaluation.suite_data import read_data
from megatron.evaluation.suite_run import prepare_suite, run_suite, suite_words

SETTINGS = HarnessSettings(batch_size=8, dtype="float32")
CODE_VS_TEXT, STAGE_STUDY = read_suite("code-vs-text"), read_suite("stage-study")
OWN = {task.name: task for task in CODE_VS_TEXT.tasks if task.kind == "harness"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def data(repository: Path) -> Path:
    return repository / "examples" / "evaluation" / "data"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HarnessModel:
    return load_model(make_model(tmp_path_factory.mktemp("model")), SETTINGS)


@pytest.fixture(scope="module")
def own_files() -> dict[str, Path]:
    return own_task_files({task.harness for task in OWN.values()})


def asked_by(task: Any) -> list[Any]:
    task.set_fewshot_seed(1)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.build_all_requests(rank=0, world_size=1)
    return [(one.request_type, one.arguments[0], one.arguments[1]) for one in task.instances]


@pytest.mark.parametrize("name", OWN)
def test_local_data_ask_exactly_what_the_harness_asks(
    name: str, data: Path, own_files: dict[str, Path], tmp_path: Path
) -> None:
    """Against the harness' own task file, handed the same rows without any of our files."""
    datasets = importlib.import_module("datasets")
    load_yaml = importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml
    configurable = importlib.import_module("lm_eval.api.task").ConfigurableTask
    task = OWN[name]
    rows = read_data(task, data / task.data_file).rows
    theirs = load_yaml(own_files[task.harness])
    for key in ("tag", "group", "dataset_path", "dataset_name"):
        theirs.pop(key, None)
    splits = {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}
    theirs["custom_dataset"] = lambda **named: splits
    expected = asked_by(configurable(config=theirs))
    ready = prepare_suite(CODE_VS_TEXT.select([name]), tmp_path, data, False, False, False)
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(ready.folder), include_defaults=False
    )
    found = asked_by(manager.load([name])["tasks"][name])
    assert found == expected and len(found) >= len(rows)


def losses(model: HarnessModel, context: str, text: str) -> list[float]:
    """Loss of each token of `text` behind `context`, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    network = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    before, whole = (tokenizer(words)["input_ids"] for words in (context, context + text))
    with torch.no_grad():
        scores = network(torch.tensor([whole])).logits[0].log_softmax(-1)
    return [-float(scores[at - 1, whole[at]]) for at in range(len(before), len(whole))]


def test_the_inverted_choice_is_the_lowest_perplexity_of_the_fixed_text(
    model: HarnessModel, data: Path, tmp_path: Path
) -> None:
    """And the greatest likelihood, which the harness compares, names the same choice: the text is the same."""
    suite = Suite("s", "s", tuple(task for task in STAGE_STUDY.tasks if task.kind == "choice-in-prompt"))
    ready = prepare_suite(suite, tmp_path, data, False, False, False)
    results = run_suite(ready, model, SETTINGS, ProgramSettings())
    assert list(results) == [task.name for task in suite.tasks]
    checked = 0
    for name, result in results.items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        right, likeliest = "", ""
        for row, scores in zip(rows, result["records"]["log_likelihoods"], strict=True):
            found = [losses(model, context, row["scored"]) for context in row["contexts"]]
            perplexities = [math.exp(sum(one) / len(one)) for one in found]
            assert [-sum(one) for one in found] == pytest.approx(scores, rel=1e-3, abs=1e-2)
            right += str(int(perplexities.index(min(perplexities)) == row["answer"]))
            likeliest += str(int(scores.index(max(scores)) == row["answer"]))
            assert len({len(one) for one in found}) == 1  # the fixed text begins behind a new line: same tokens
            checked += 1
        assert result["records"]["correct"] == {"acc_perplexity": right, "acc": likeliest} and right == likeliest
        assert result["correct"] == right and "uneven_items" not in result["records"]
        assert result["metrics"]["acc_perplexity"]["value"] == pytest.approx(right.count("1") / len(right))
        assert result["metrics"]["acc"]["stderr"] == pytest.approx(result["metrics"]["acc_perplexity"]["stderr"])
    assert checked == 14


def test_unlike_token_counts_are_counted_and_perplexity_goes_by_the_token() -> None:
    """The first choice has the greater likelihood, the second the lower loss a token."""
    doc = {"contexts": ["a", "b"], "scored": "x", "answer": 1}
    sample = {
        "doc": doc,
        "target": "x",
        "arguments": [("a", "x"), ("b", "x")],
        "filtered_resps": [(-10.0, False), (-12.0, False)],
        "acc": 0.0,
        "filter": "none",
    }
    counts = {("a", "x"): 2, ("b", "x"): 3}
    found = task_result({"acc,none": 0.0}, [sample], lambda *pair: counts[pair], lambda *pair: pair == ("a", "x"))
    assert found["records"]["correct"] == {"acc_perplexity": "1", "acc": "0"}
    assert found["records"]["uneven_items"] == found["records"]["cut_items"] == 1


def test_the_whole_suite_runs_with_programs_and_keeps_every_item(
    model: HarnessModel, data: Path, tmp_path: Path
) -> None:
    suite = CODE_VS_TEXT.select(["boolq", "hellaswag", "triviaqa", "code"])
    short = tuple(task.model_copy(update={"max_new_tokens": 8}) for task in suite.tasks)
    ready = prepare_suite(Suite("s", "s", short), tmp_path / "t", data, False, False, True)
    programs = ProgramSettings(samples=2, at=(1, 2), temperature=0.7, seed=3)
    first, again = (run_suite(ready, model, SETTINGS, programs, tmp_path / name) for name in ("a", "b"))
    assert first == again and {"limits", "seccomp"} <= set(ready.walls)
    for name in ("humaneval.jsonl", "mbpp.jsonl"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
        assert all(set(json.loads(line)) == {"task_id", "completion", "passed", "result"}
                   for line in (tmp_path / "a" / name).read_text().splitlines())  # fmt: skip
    assert first["humaneval"]["records"]["passed"] == [[2, 0], [2, 0]]
    assert set(first["humaneval"]["metrics"]) == {"pass@1", "pass@2", "bleu"}
    assert len(first["triviaqa"]["records"]["answers"]) == first["triviaqa"]["items"] == 3
    assert [len(row) for row in first["hellaswag"]["records"]["log_likelihoods"]] == [4, 4, 4]
    assert first["hellaswag"]["metric"] == "acc_norm" and len(first["boolq"]["records"]["digest"]) == 32
    assert ready.described()["boolq"]["chance"] == 0.5


def test_B1_programs_are_refused_unless_allowed(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"humaneval, mbpp of suite code-vs-text run programs.*--allow-code-execution"
    ):
        prepare_suite(CODE_VS_TEXT, tmp_path, data, False, False, False)
    ready = prepare_suite(CODE_VS_TEXT.select(["reasoning"]), tmp_path, data, False, False, False)
    assert ready.walls == ()


def test_B1_missing_data_name_every_task_and_may_be_skipped(data: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "logic.jsonl").write_bytes((data / "logic.jsonl").read_bytes())
    with pytest.raises(DataError) as caught:
        prepare_suite(STAGE_STUDY, tmp_path / "t", part, False, False, False)
    assert "no data for 5 tasks" in str(caught.value) and f"cosqa: put {part / 'cosqa.jsonl'}" in str(caught.value)
    ready = prepare_suite(STAGE_STUDY, tmp_path / "t", part, False, True, False)
    assert ready.harness_tasks == ["logic"] and set(ready.missing) == {t.name for t in STAGE_STUDY.tasks[1:]}
    assert ready.described()["cosqa"]["data"] == "missing"
    with pytest.raises(DataError, match="no data for 6 tasks"):
        prepare_suite(STAGE_STUDY, tmp_path / "t", tmp_path, False, True, False)
    with pytest.raises(ConfigError, match="no such folder"):
        prepare_suite(STAGE_STUDY, tmp_path / "t", tmp_path / "gone", False, False, False)
    words = "\n".join(suite_words(STAGE_STUDY, part))
    assert str(part / "logic.jsonl") in words and "(not there)" in words


def test_online_rows_are_held_to_the_same_rules(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "mbpp.jsonl").read_text().splitlines()]
    asked: list[Any] = []

    def fetch(path: str, name: str | None, split: str, columns: list[str] | None) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return rows[:3] if split == "prompt" else rows[3:]

    monkeypatch.setattr(suite_run, "fetch_rows", fetch)
    suite = STAGE_STUDY.select(["mbpp_bleu"])
    ready = prepare_suite(suite, tmp_path, None, True, False, False)
    assert [one.name for one in ready.problems["mbpp_bleu"]] == ["11", "12", "13"]
    assert asked == [("google-research-datasets/mbpp", "full", split) for split in ("prompt", "test")]
    del rows[4]["code"]
    with pytest.raises(
        DataError, match=r"google-research-datasets/mbpp \(prompt\+test\), row 5: field code is missing"
    ):
        prepare_suite(suite, tmp_path, None, True, False, False)


def test_online_what_cannot_be_fetched_is_missing_too(data: Path, tmp_path: Path) -> None:
    """The network refuses here: what has a local file is run, the rest is named, with the reason."""
    part = tmp_path / "part"
    part.mkdir()
    (part / "copa.jsonl").write_bytes((data / "copa.jsonl").read_bytes())
    suite = CODE_VS_TEXT.select(["boolq", "copa", "humaneval"])
    with pytest.raises(
        DataError, match=r"(?s)no data for 2 tasks.*boolq: put.*humaneval: put.*cannot be (fetched|had).*cannot be"
    ):
        prepare_suite(suite, tmp_path / "o", part, True, False, True)
    ready = prepare_suite(suite, tmp_path / "o", part, True, True, True)
    assert ready.harness_tasks == ["copa"] and ready.missing == ("boolq", "humaneval")
    content = json.loads((tmp_path / "o" / "boolq.yaml").read_text())
    assert "dataset_path" not in content and "include" in content


def test_generation_is_seeded_and_refuses_to_cut_prompts(model: HarnessModel) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=0.9, seed=11)
    prompts = ["def f(x):", "import os", "def f(x):"]
    said = model.generate(prompts, sampling)
    assert said == model.generate(prompts, sampling) and said[0] != said[2]
    assert said != model.generate(prompts, Sampling(max_new_tokens=6, temperature=0.9, seed=12))
    greedy = model.generate(prompts, Sampling(max_new_tokens=6))
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    network = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    theirs = network.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert greedy[0] == greedy[2] == tokenizer.decode(theirs, skip_special_tokens=True)
    with pytest.raises(DataError, match=r"and 600 new ones do not fit into the model's 640 positions"):
        model.generate(["x = 1\n" * 60], Sampling(max_new_tokens=600))
    with pytest.raises(DataError, match="a prompt is empty"):
        model.generate([""], Sampling())


def test_B1_a_scored_text_longer_than_the_model_is_said(model: HarnessModel, tmp_path: Path) -> None:
    row = {"question": "x = 1\n" * 400, "choices": ["a", "b"], "answer": 0}
    (tmp_path / "logic.jsonl").write_text(json.dumps(row))
    ready = prepare_suite(STAGE_STUDY.select(["logic"]), tmp_path / "t", tmp_path, False, False, False)
    with pytest.raises(DataError, match="640 positions"):
        run_suite(ready, model, SETTINGS, ProgramSettings())


def test_B1_long_prompts_of_code_tasks_are_named_before_anything_is_run(
    model: HarnessModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_run, "run_tasks", lambda *arguments: pytest.fail("the harness was run"))
    suite = CODE_VS_TEXT.select(["copa", "humaneval", "mbpp"])
    ready = prepare_suite(suite, tmp_path, data, False, False, True)
    lengths = {
        name: max(len(model.inner.tok_encode(problem.prompt)) for problem in ready.problems[name])
        for name in ("humaneval", "mbpp")
    }
    longest = max(lengths.values())
    assert lengths["humaneval"] + 256 < lengths["mbpp"]
    monkeypatch.setattr(HarnessModel, "positions", property(lambda self: lengths["humaneval"] + 512))
    with pytest.raises(
        DataError, match=rf"(?s)task mbpp: a prompt of {longest} tokens.*--tasks copa,humaneval"
    ) as caught:
        suite_run.check_room(ready, model)
    assert "task humaneval" not in str(caught.value)
    monkeypatch.setattr(HarnessModel, "positions", property(lambda self: longest))
    with pytest.raises(DataError, match=r"(?s)nothing was run.*task mbpp") as caught:
        run_suite(ready, model, SETTINGS, ProgramSettings())
    assert "lower --max-new-tokens" not in str(caught.value)  # no number would do
