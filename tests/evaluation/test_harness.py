"""The door to lm-evaluation-harness: what it measures equals what the model says, without any network."""

from __future__ import annotations

import json
import math
import socket
import sys
from pathlib import Path

import pytest
import torch
from hf.made_checkpoint import library_code, library_prose, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.config.errors import ConfigError, DataError, UnavailableError
from megatron.evaluation.harness import HarnessSettings, ratio_stderr, require_harness, run_tasks
from megatron.evaluation.precision import choose_dtype
from megatron.evaluation.task_files import write_held_out_tasks
from megatron.hf.checkpoint_source import open_source
from megatron.hf.export import export_checkpoint

SETTINGS = HarnessSettings(batch_size=8, dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    return export_checkpoint(open_source(folder / "run"), folder / "out", proven=False).folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    code = library_code()
    write_held_out_tasks(folder, {"code": code, "text": library_prose(code)}, 12, 2000)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def log_likelihood(model: Path, context: str, continuation: str) -> float:
    """By transformers alone, as the harness defines it: the tokens that the continuation adds to the context's number,
    behind the context's own tokens; behind the beginning-of-text id where there is no context."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]
    added = tokenizer(context + continuation)["input_ids"][len(before) if context else 0 :]
    window = (before + added)[-(network.config.max_position_embeddings + 1) :]
    with torch.no_grad():
        scores = network(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
    return float(sum(scores[-len(added) + place, token] for place, token in enumerate(added)))


def test_accuracies_are_those_of_the_likelihoods(model: Path, tasks: Path) -> None:
    found = run_tasks(model, ["heldout_text"], tasks, SETTINGS)["heldout_text"]
    largest, most_raised, level = "", "", 0
    for line in (tasks / "heldout_text.jsonl").read_text().splitlines():
        row = json.loads(line)
        given = [log_likelihood(model, row["context"], choice) for choice in row["choices"]]
        alone = [log_likelihood(model, "", choice) for choice in row["choices"]]
        raised = [one - other for one, other in zip(given, alone, strict=True)]
        largest += str(int(given.index(max(given)) == row["answer"]))
        most_raised += str(int(raised.index(max(raised)) == row["answer"]))
        level += sorted(raised)[-1] - sorted(raised)[-2] < 1e-3
    # Where two answers are level to rounding, either may win.
    assert sum(one != other for one, other in zip(found["correct"], most_raised, strict=True)) <= level <= 2
    for metric, right in (("acc", largest), ("acc_mutual_info", found["correct"])):
        share = right.count("1") / 12
        assert found["metrics"][metric]["value"] == pytest.approx(share)
        assert found["metrics"][metric]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    assert found["items"] == len(found["correct"]) == 12


def test_bits_a_byte_have_a_standard_error(model: Path, tasks: Path) -> None:
    found = run_tasks(model, ["heldout_code_loss"], tasks, SETTINGS)["heldout_code_loss"]["metrics"]
    assert 1 < found["bits_per_byte"]["value"] < 30 and 0 < found["bits_per_byte"]["stderr"] < 3
    assert found["byte_perplexity"]["value"] == pytest.approx(2 ** found["bits_per_byte"]["value"])
    # d(2 ** bits) = 2 ** bits * log 2 * d(bits)
    slope = found["byte_perplexity"]["value"] * math.log(2)
    assert found["byte_perplexity"]["stderr"] == pytest.approx(slope * found["bits_per_byte"]["stderr"])


def test_ratio_stderr_is_that_of_a_mean_where_all_weights_are_equal() -> None:
    values = [1.0, 4.0, 2.0, 7.0, 3.5]
    deviation = torch.tensor(values).std().item()
    assert ratio_stderr([(value, 2.0) for value in values]) == pytest.approx(deviation / math.sqrt(5) / 2)
    assert ratio_stderr([(1.0, 2.0)]) is None


def test_B1_unknown_tasks_and_folders_are_named(model: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'heldout_cod'.*heldout_code"):
        run_tasks(model, ["heldout_cod"], tasks, SETTINGS)
    with pytest.raises(DataError, match="not a model folder"):
        run_tasks(tmp_path, ["heldout_code"], tasks, SETTINGS)


def test_B1_an_answer_longer_than_the_model_is_said(model: Path, tmp_path: Path) -> None:
    write_held_out_tasks(tmp_path, {"code": [text * 2 for text in library_code(6)]}, 2, 500)
    row = {"context": "def", "choices": [" f(x)" * 200, " g"], "answer": 0}
    (tmp_path / "heldout_code.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="160 positions"):
        run_tasks(model, ["heldout_code"], tmp_path, SETTINGS)


def test_T3_a_missing_harness_or_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="--device cpu"):
        choose_dtype("auto", "cuda:77")
    assert choose_dtype("float32", "cpu")[0] == "float32"
    assert choose_dtype("auto", "cpu")[0] in ("float32", "bfloat16")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnavailableError, match="pip install") as caught:
        require_harness()
    assert caught.value.exit_code == 6
