"""Evaluation of a study's nodes: figures against transformers, the same items for all, nothing done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study.made_evaluation import BENCH, RESULTS, Process, do, end_of, planned_study, write_corpora
from tiny_run import train

from megatron.commands.study import main
from megatron.config.errors import CheckpointError, ConfigError, DataError
from megatron.evaluation.comparison import compare_results
from megatron.evaluation.held_out_text import held_out_documents
from megatron.evaluation.results import read_record
from megatron.study import node_evaluation
from megatron.study.due_tasks import Task, due_tasks
from megatron.study.node_config import node_folder, node_words, write_node
from megatron.study.node_evaluation import evaluate_study, evaluation_is_current
from megatron.study.node_folder import NodeFolder
from megatron.study.node_parts import REQUEST, Evaluated, Request, read_request, weights_of
from megatron.study.node_questions import Questions
from megatron.study.node_results import NodeResults, read_results
from megatron.study.node_state import is_evaluated
from megatron.study.plan import PlannedStudy
from megatron.tokenizers.byte_level import ByteTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two arms, trained and evaluated by real processes. Gives its folder."""
    folder = tmp_path_factory.mktemp("study")
    write_corpora(folder)
    planned = planned_study(folder)
    for name in planned.graph.nodes:
        write_node(planned, name)
        command, config, *more = node_words(planned, name)
        assert command == "train"
        done = train(Path(config), *more)
        assert done.returncode == 0, done.stderr
    said: list[str] = []
    assert evaluate_study(planned, say=said.append) == 0, said
    return folder


@pytest.fixture
def study(trained: Path, tmp_path: Path) -> Path:
    """A copy to change. Paths within are those of the copy."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    return folder


def _results(planned: PlannedStudy, arm: str) -> NodeResults:
    found = read_results(node_folder(planned, end_of(planned, arm)).results)
    assert found is not None
    return found


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_results_hold_every_figure_and_lead_to_its_items(trained: Path) -> None:
    planned = planned_study(trained)
    found = _results(planned, "code")
    folder = node_folder(planned, found.node)
    assert (found.label, found.seed, found.arms, found.tokens) == ("code", 3, ("code",), 4 * 4 * 256)
    assert found.weights == weights_of(folder.path / found.checkpoint)
    assert found.export is not None and (folder.path / found.export / "model.safetensors").is_file()
    assert json.loads((folder.export / "proof.json").read_text())
    assert set(found.suites) == {"loss", "stage-study"} and set(found.loss) == {"python", "prose"}
    for name, suite in found.suites.items():
        record = read_record(folder.path / suite.file)
        (model,) = record["models"]
        assert model["name"] == suite.model
        for task, result in model["results"].items():
            for metric, one in result["metrics"].items():
                figure = found.figure(f"{name}/{task}/{metric}")
                assert figure is not None and figure.value == one["value"] and figure.items == result["items"]
    logic = found.figure("stage-study/logic/acc_perplexity")
    assert logic is not None and logic.higher_is_better and logic.group == "logical reasoning" and logic.items == 2
    loss = found.figure("loss/python/loss")
    assert loss is not None and not loss.higher_is_better and loss.group == "code"
    assert loss.value == found.loss["python"].loss
    rows = [json.loads(line) for line in (folder.path / str(found.samples)).read_text().splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [("ab", 0), ("ab", 1), ("cd", 0), ("cd", 1)]
    assert all(row["settings"]["max-new-tokens"] == "5" and row["settings"]["seed"] == "0" for row in rows)
    assert [path for path in folder.path.iterdir() if "tasks" in path.name or "partial" in path.name] == []


def test_losses_are_those_of_transformers_on_the_exported_folder(trained: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    planned = planned_study(trained)
    config = Questions(planned).held_out_config(end_of(planned, "code"))
    found = _results(planned, "code")
    folder = node_folder(planned, found.node)
    model = AutoModelForCausalLM.from_pretrained(str(folder.export))
    documents = held_out_documents(config, ByteTokenizer(), longest=257, tokens=2000)
    assert set(documents) == {"python", "prose"}
    for name, rows in documents.items():
        nats, tokens, size = 0.0, 0, 0
        for row in rows:
            ids = torch.from_numpy(row.tokens)[None]
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].double()
            nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += len(row.tokens) - 1
            size += int((row.tokens[1:] < 256).sum())  # the corpus is ASCII: a byte a token, but for its end
        assert found.loss[name].tokens == tokens
        assert found.loss[name].loss == pytest.approx(nats / tokens, rel=1e-5)
        assert found.loss[name].bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_all_nodes_are_asked_the_same_items_whatever_they_were_trained_on(trained: Path) -> None:
    planned = planned_study(trained)
    records = [
        read_record(node_folder(planned, end_of(planned, arm)).evaluation("loss"))["models"][0]["results"]
        for arm in ("text", "code")
    ]
    for source in ("python", "prose"):
        one, other = (record[source]["records"] for record in records)
        assert one["digest"] == other["digest"] and one["token_loss"] != other["token_loss"]
    rows, notes = compare_results("text", records[0], "code", records[1], {}, resamples=200)
    assert {(row.task, row.metric) for row in rows} == {("python", "loss"), ("prose", "loss")}
    for row in rows:
        assert row.a == pytest.approx(_results(planned, "text").loss[row.task].loss, rel=1e-4)


def test_held_out_documents_do_not_depend_on_the_seed(trained: Path) -> None:
    planned = planned_study(trained)
    config = Questions(planned).held_out_config(end_of(planned, "code"))
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 77})})
    first, second = (held_out_documents(one, ByteTokenizer(), tokens=500) for one in (config, other))
    for name, rows in first.items():
        assert [row.number for row in rows] == [row.number for row in second[name]]
        assert sum(len(row.tokens) for row in rows) == 500


def test_a_judge_compares_each_arm_with_the_baseline(trained: Path) -> None:
    planned = planned_study(trained)
    text, code = _results(planned, "text"), _results(planned, "code")
    assert text.win_rate is None and code.win_rate is not None and code.win_rate["against"] == text.node
    figure = code.figure("win-rate/against text/win_rate")
    record = json.loads((node_folder(planned, code.node).path / code.win_rate["file"]).read_text())
    assert figure is not None and figure.value == record["rate"] and figure.items == len(record["items"]) == 1


# -- nothing twice -----------------------------------------------------------------------------------------------------


def test_a_second_call_starts_no_process_and_writes_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = planned_study(trained)
    process = Process(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in (trained / "out").rglob("*.json*")}
    said: list[str] = []
    assert evaluate_study(planned, say=said.append) == 0
    assert process.asked == [] and said == ["2 trained nodes: evaluated already, as [results] asks now"]
    assert {path: path.stat().st_mtime_ns for path in (trained / "out").rglob("*.json*")} == before
    assert evaluation_is_current(planned, end_of(planned, "code"))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"samples": {"prompts": ["ab"], "max_new_tokens": 5}}, ("samples",)),
        ({"loss": {"tokens": "1K"}}, ("loss",)),
        ({"export_dtype": "bfloat16"}, ("export", "stage-study")),
        ({"dtype": "bfloat16"}, ("loss", "stage-study", "samples", "answers")),
        ({"batch_size": 8, "threads": 3}, ()),
        ({"suites": []}, ()),  # less is asked: its figures go, and no process is started
        ({"suites": [{**RESULTS["suites"][0], "limit": 1}]}, ("stage-study",)),
        ({"suites": [*RESULTS["suites"], {**RESULTS["suites"][0], "name": "mine", "suite": "stage-study"}]}, ("mine",)),
    ],
)
def test_what_is_asked_differently_is_done_again_and_no_more(
    study: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], again: tuple[str, ...]
) -> None:
    process = Process(monkeypatch)
    planned = planned_study(study, RESULTS | change, "changed.toml")
    assert not evaluation_is_current(planned, end_of(planned, "code"))
    assert evaluate_study(planned, ["code"], say=lambda words: None) == 0
    assert process.asked == ([("code", again)] if again else [])
    assert evaluation_is_current(planned, end_of(planned, "code")) == (not again)


def test_content_counts_and_places_do_not(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch)
    shutil.copytree(BENCH, tmp_path / "bench")
    suite = {**RESULTS["suites"][0], "data": str(tmp_path / "bench")}
    planned = planned_study(study, {**RESULTS, "suites": [suite]}, "elsewhere.toml")
    assert evaluate_study(planned, ["code"], say=lambda words: None) == 0 and process.asked == []
    with (tmp_path / "bench" / "logic.jsonl").open("a") as file:
        file.write('{"question": "Which?", "choices": ["a", "b"], "answer": 1}\n')
    evaluate_study(planned, ["code"], say=lambda words: None)
    assert process.asked == [("code", ("stage-study",))]


def test_new_weights_are_evaluated_anew_and_their_old_figures_are_gone(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = planned_study(study)
    text, code = node_folder(planned, end_of(planned, "text")), node_folder(planned, end_of(planned, "code"))
    shutil.rmtree(code.path / "checkpoints")
    shutil.copytree(text.path / "checkpoints", code.path / "checkpoints")
    assert not evaluation_is_current(planned, end_of(planned, "code"))
    process = Process(monkeypatch, lambda request: 3)
    assert evaluate_study(planned, ["code"], say=lambda words: None) == 3
    assert process.asked == [("code", ("export", "loss", "stage-study", "samples", "answers"))]
    assert not code.results.exists() and text.results.exists()


def test_a_damaged_file_is_made_again(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = planned_study(study)
    folder = node_folder(planned, end_of(planned, "code"))
    with folder.evaluation("stage-study").open("a") as file:
        file.write(" ")
    folder.samples.unlink()
    shutil.rmtree(folder.export)
    process = Process(monkeypatch)
    evaluate_study(planned, ["code"], say=lambda words: None)
    assert process.asked == [("code", ("export", "stage-study", "samples"))]


def test_results_that_were_lost_are_put_together_without_a_process(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = planned_study(study)
    path = node_folder(planned, end_of(planned, "code")).results
    before = path.read_bytes()
    path.write_bytes(before[:100])  # torn
    process = Process(monkeypatch)
    assert evaluate_study(planned, say=lambda words: None) == 0
    assert process.asked == [] and path.read_text() == before.decode()


def test_other_answers_of_the_baseline_are_judged_again(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**RESULTS, "win_rate": {**RESULTS["win_rate"], "seed": 5}}
    process = Process(monkeypatch, do)
    planned = planned_study(study, asked, "asked.toml")
    with pytest.raises(DataError, match=r"win-rate\.json: not a result"):  # what the stand-in wrote
        for arm in ("code", "text"):
            (node_folder(planned, end_of(planned, arm)).path / "win-rate.json").unlink(missing_ok=True)
            evaluate_study(planned, [arm], say=lambda words: None)
    # nothing is judged before both have answered, and then it is, though the baseline alone was asked for
    assert process.asked == [("code", ("answers",)), ("text", ("answers",)), ("code", ("win-rate",))]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_costs_the_node_that_it_was_killed_over(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = planned_study(study, {"loss": {"tokens": "1K"}}, "less.toml")
    first = next(name for name in planned.graph.nodes if name in {end_of(planned, "text"), end_of(planned, "code")})
    label = planned.graph.nodes[first].label
    process = Process(monkeypatch, lambda request: 137 if request.name == label else do(request))
    assert evaluate_study(planned, say=lambda words: None) == 137
    assert [name for name, _ in process.asked] == [label, *({"text", "code"} - {label})]
    (loss,) = [part for part in Questions(planned).parts(first, _weights(planned, first)) if part.name == "loss"]
    assert Evaluated(node_folder(planned, first)).failure(loss) == "its process was killed by signal 9"


def test_a_part_that_fails_is_on_record_and_the_others_are_done(study: Path) -> None:
    """The real command on a request: an unknown special token in one part; what is before and behind it is done."""
    from megatron.commands import evaluate_node

    planned = planned_study(
        study, {"loss": {"tokens": "1K"}, "samples": {"prompts": ["a"], "begin_with": "<x>"}}, "f.toml"
    )
    name = end_of(planned, "code")
    folder = node_folder(planned, name)
    parts = Questions(planned).parts(name, _weights(planned, name))
    request = Request(name, "code", str(folder.path), str(folder.checkpoint(4)), (parts[2], parts[1]))
    node_evaluation.write_request(folder.path / REQUEST, request)
    assert read_request(folder.path / REQUEST) == request
    assert evaluate_node.main([str(folder.path / REQUEST)]) == 2
    done = Evaluated(folder)
    assert "begin-with <x>" in done.failure(parts[2]) and done.holds(parts[1]) and not done.holds(parts[2])


def test_what_succeeded_is_in_the_results_and_what_failed_is_named(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(request: Request) -> int:
        for part in request.parts:
            Evaluated(NodeFolder(Path(request.folder))).failed(part, 3, "too few documents")
        return 3

    asked = {**RESULTS, "suites": [{**RESULTS["suites"][0], "limit": 1}]}
    planned = planned_study(study, asked)
    before = _results(planned, "code")
    process, said = Process(monkeypatch, act), list[str]()
    assert evaluate_study(planned, say=said.append) == 3
    found = _results(planned, "code")
    assert found.failed == {"stage-study": "too few documents"} and found.loss == before.loss
    assert set(found.suites) == {"loss"} and found.samples == before.samples and found.win_rate == before.win_rate
    assert any("without stage-study, which failed" in line for line in said)
    name = end_of(planned, "code")
    assert not evaluation_is_current(planned, name) and not is_evaluated(planned, name)
    assert due_tasks(planned, True) == {Task("evaluate", end_of(planned, arm)): () for arm in ("text", "code")}
    capsys.readouterr()
    assert main(["report", str(study / "study.toml"), "--no-run-reports"]) == 0
    assert "stage-study was not evaluated: too few documents" in (study / "out/report/report.md").read_text()
    process.asked.clear()
    assert evaluate_study(planned, ["code"], say=said.append) == 3  # tried again, and that alone
    assert process.asked == [("code", ("stage-study",))]


def test_losses_need_no_export(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command where the export is refused: losses are of the checkpoint, and the rest says what it needs."""
    from megatron.commands import evaluate_node, export_hf

    def refuse(words: list[str]) -> int:
        raise ConfigError("no family has these blocks")

    monkeypatch.setattr(export_hf, "main", refuse)
    planned = planned_study(study, {**RESULTS, "loss": {"tokens": "1K"}, "export_dtype": "bfloat16"}, "f.toml")
    monkeypatch.setattr(
        node_evaluation._Evaluation,
        "_process",
        lambda self, requests, nodes=(): evaluate_node.main([str(Path(one.folder) / REQUEST) for one in requests]),
    )
    assert evaluate_study(planned, ["code"], say=lambda words: None) == 2
    found = _results(planned, "code")
    assert set(found.loss) == {"python", "prose"} and "export" in found.failed
    assert found.failed["stage-study"] == "it needs the export, which failed" and found.export is None


def _weights(planned: PlannedStudy, name: str) -> str:
    return weights_of(node_folder(planned, name).checkpoint(4))


def test_a_damaged_checkpoint_or_request_is_named(study: Path) -> None:
    planned = planned_study(study)
    folder = node_folder(planned, end_of(planned, "code"))
    (folder.path / REQUEST).write_text("{}")
    with pytest.raises(DataError, match=REQUEST):
        read_request(folder.path / REQUEST)
    (folder.checkpoint(4) / "manifest.json").write_text("{}")
    said: list[str] = []
    with pytest.raises(ConfigError, match="nothing of it is trained"):
        evaluate_study(planned, ["code"], say=said.append)
    with pytest.raises(CheckpointError):
        weights_of(folder.checkpoint(4))


# -- which nodes


def test_ends_or_all(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch)
    said: list[str] = []
    evaluate_study(planned_study(study), ["init"], say=said.append)
    assert process.asked == [] and 'nodes = "all"' in said[0]
    planned = planned_study(study, {**RESULTS, "nodes": "all"}, "all.toml")
    evaluate_study(planned, ["in?t"], say=said.append)
    assert [name for name, _ in process.asked] == ["init"]
    process.asked.clear()
    evaluate_study(planned, again=True, say=said.append)
    assert [name for name, parts in process.asked if "export" in parts] == ["init", "text", "code"]
