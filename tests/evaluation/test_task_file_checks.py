"""A folder of task files is data: none of its code is ever run. Each canary would leave a file behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation.made_model import make_model

from megatron.config.errors import ConfigError, DataError
from megatron.evaluation.harness import HarnessModel, HarnessSettings, load_model, run_tasks
from megatron.evaluation.suite import read_suite
from megatron.evaluation.suite_run import prepare_suite

SETTINGS = HarnessSettings(batch_size=4, dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HarnessModel:
    return load_model(make_model(tmp_path_factory.mktemp("model")), SETTINGS)


class Cage:
    """A folder with a good task, a Python file that leaves `sung` behind when it is run, and a changed task file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sung = folder, folder / "sung"
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps({"q": f"question {n}", "c": ["a", "b"], "a": n % 2}) + "\n" for n in range(3))
        )
        canary = f"from pathlib import Path\nPath({str(self.sung)!r}).write_text('x')\n"
        canary += "def text(doc): return doc['q']\nclass Task: pass\n"
        for name in ("canary.py", "conftest.py", "sitecustomize.py", "__init__.py"):
            (folder / name).write_text(canary)

    def write(self, name: str = "good", extra: str = "", **changes: str) -> None:
        fields = {
            "task": name,
            "dataset_path": "json",
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "q",
            "doc_to_choice": "c",
            "doc_to_target": "a",
            **changes,
        }
        lines = [f"{key}: {value}" for key, value in fields.items() if value]
        lines.append(f"dataset_kwargs:\n  data_files:\n    test: {self.folder / 'rows.jsonl'}")
        lines.append(f"  cache_dir: {self.folder / '.cache'}")
        if "metric_list" not in extra:
            lines.append("metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true")
        (self.folder / f"{name}.yaml").write_text("\n".join([*lines, extra]) + "\n")


@pytest.fixture
def cage(tmp_path: Path) -> Cage:
    return Cage(tmp_path)


def test_a_good_task_runs_and_no_file_beside_it_does(model: HarnessModel, cage: Cage) -> None:
    cage.write()
    found = run_tasks(model, ["good"], cage.folder, SETTINGS)["good"]
    assert found["items"] == 3 and not cage.sung.exists()


REFUSED = {
    "a function": ({"doc_to_text": "!function canary.text"}, "", r"line 5: !function would run Python code"),
    "a function deep inside": ({}, "fewshot_config:\n  samples: !function canary.text", "!function would run"),
    "a Python tag": ({}, "metadata: !!python/object/apply:os.system ['touch x']", "python/object/apply"),
    "a class": ({"class": "canary.Task"}, "", "class: it names a Python class"),
    "a data set of code": ({"custom_dataset": "canary.text"}, "", "custom_dataset: it names a Python function"),
    "a script as data set": ({"dataset_path": "canary.py"}, "", "dataset_path names a Python script"),
    "a metric that is a script": ({}, "metric_list:\n  - metric: SELF/canary.py", "none of the harness' own"),
    "a metric of elsewhere": ({}, "metric_list:\n  - metric: acc\n    hf_evaluate: true", "none of the harness' own"),
    "unsafe code": ({}, "unsafe_code: true", "unsafe_code"),
    "a prompt of elsewhere": ({"use_prompt": "promptsource:x"}, "", "use_prompt"),
    "an included function": ({}, "include: inner.part", "!function would run Python code"),
}


@pytest.mark.parametrize("changes, extra, words", REFUSED.values(), ids=REFUSED.keys())
def test_canary_task_files_that_name_code_are_refused(
    changes: dict[str, str], extra: str, words: str, model: HarnessModel, cage: Cage
) -> None:
    (cage.folder / "inner.part").write_text("doc_to_text: !function canary.text\n")
    cage.write()
    cage.write("bad", extra.replace("SELF", str(cage.folder)), **changes)
    for asked in (["bad"], ["good"]):  # a refused file is refused whatever task is asked: the harness reads them all
        with pytest.raises(ConfigError, match=rf"{words}.*--trust-task-code|\.part: .*{words}"):
            run_tasks(model, asked, cage.folder, SETTINGS)
    assert not cage.sung.exists()


def test_trusted_code_is_run_when_the_user_says_so(model: HarnessModel, cage: Cage) -> None:
    cage.write("mine", doc_to_text="!function canary.text")
    trusting = HarnessSettings(batch_size=4, dtype="float32", trust_task_code=True)
    assert run_tasks(model, ["mine"], cage.folder, trusting)["mine"]["items"] == 3
    assert cage.sung.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch SUNG') }}",
        "{{ q.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() | list }}",
    ],
)
def test_canary_templates_reach_nothing_of_pythons_own(template: str, model: HarnessModel, cage: Cage) -> None:
    cage.write("bad", doc_to_text=json.dumps(template.replace("SUNG", str(cage.sung))))
    with pytest.raises(DataError, match="SecurityError|unsafe"):
        run_tasks(model, ["bad"], cage.folder, SETTINGS)
    assert not cage.sung.exists()


def test_canary_python_files_in_a_data_folder_are_not_run(cage: Cage, tmp_path: Path) -> None:
    (cage.folder / "logic.jsonl").write_text(json.dumps({"question": "q", "choices": ["a", "b"], "answer": 0}))
    (cage.folder / "logic.py").write_text((cage.folder / "canary.py").read_text())
    cage.write("evil", doc_to_text="!function canary.text")
    suite = read_suite("stage-study").select(["logic"])
    ready = prepare_suite(suite, tmp_path / "tasks", cage.folder, False, False, False)
    assert ready.harness_tasks == ["logic"] and not cage.sung.exists()


def test_B1_broken_task_files_are_named(model: HarnessModel, cage: Cage) -> None:
    for content, words in (
        (b"task: [", "not a task file"),
        (b"- a\n- b\n", "list, and keys"),
        (b"task: \xff\n", "not UTF-8"),
        (b"task: x\ninclude: gone.yaml\n", r"gone\.yaml: no such task file"),
    ):
        (cage.folder / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            run_tasks(model, ["good"], cage.folder, SETTINGS)


def test_B1_empty_data_and_missing_fields_are_said(model: HarnessModel, cage: Cage) -> None:
    cage.write("good", doc_to_text=json.dumps("{{ nothing }}"))
    with pytest.raises(DataError, match="nothing"):
        run_tasks(model, ["good"], cage.folder, SETTINGS)
    cage.write("good")
    (cage.folder / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="good: the harness cannot use their data"):
        run_tasks(model, ["good"], cage.folder, SETTINGS)
