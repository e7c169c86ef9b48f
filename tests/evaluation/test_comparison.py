"""Results files: written, read in both formats, merged, and compared item by item."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.evaluation.comparison import compare_results, comparison_table, items_of
from megatron.evaluation.results import group_means, merge_records, notes, read_record, table, write_record


def choice(right: str, digest: str = "d", metric: str = "acc") -> dict[str, Any]:
    value = right.count("1") / len(right)
    records = {"digest": digest, "correct": {metric: right, "acc_norm": right[::-1]}}
    metrics = {metric: {"value": value, "stderr": 0.1}}
    return {"metrics": metrics, "items": len(right), "correct": right, "metric": metric, "records": records}


def record(models: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "format": 2,
        "suite": "made",
        "tasks": {
            "one": {"group": "reasoning", "metric": "acc", "chance": 0.25, "left_out": 0},
            "two": {"group": "reasoning", "metric": "acc", "chance": 0.25, "left_out": 3},
            "gone": {"group": "reasoning", "metric": "acc", "chance": 0.25, "left_out": 0},
        },
        "missing": ["gone"],
        "models": [{"name": name, "path": name, "results": results} for name, results in models.items()],
        **more,
    }


def test_a_written_file_is_read_back_and_is_plain_json(tmp_path: Path) -> None:
    made = record({"a": {"one": choice("0110")}}, odd=math.inf, empty={}, rows=[[1.5, 2], []], words=["ä"], none=[])
    write_record(tmp_path / "new" / "e.json", made)
    plain = json.loads((tmp_path / "new" / "e.json").read_text(encoding="utf-8"))
    assert plain == {**made, "odd": None} == read_record(tmp_path / "new" / "e.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.json"]


def test_a_file_of_format_1_is_still_read_and_compared(tmp_path: Path) -> None:
    old = {
        "format": 1,
        "tasks": {"heldout_code": {"source": "code", "kind": "multiple choice", "chance": 0.25}},
        "models": [
            {
                "name": name,
                "results": {
                    "heldout_code": {
                        "metrics": {"acc_mutual_info": {"value": 0.5, "stderr": 0.1}, "acc": {"value": 0, "stderr": 0}},
                        "items": 40,
                        "correct": right,
                    },
                    "heldout_code_loss": {"metrics": {"bits_per_byte": {"value": 2.0, "stderr": 0.1}}, "items": 9},
                },
            }
            for name, right in (("a", "01" * 20), ("b", "1" * 40))
        ],
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    merged = merge_records([tmp_path / "old.json"])
    rows, said = compare_results("a", merged.results["a"], "b", merged.results["b"], merged.groups, 500)
    assert [(row.task, row.metric, row.a, row.b, row.better) for row in rows] == [
        ("heldout_code", "acc_mutual_info", 0.5, 1.0, "b")
    ]
    assert any("format 1" in line for line in said) and any("heldout_code_loss" in line for line in said)


def test_every_kind_of_item_gives_its_figure() -> None:
    loss = {"metrics": {"bits_per_byte": {}}, "records": {"loss": [[-80.0, 100], [-10.0, 20]], "digest": "x"}}
    found = items_of(loss)
    assert found and found.lower_is_better
    assert float(found.statistic(found.counts.sum(0))) == pytest.approx(90 / 120 / math.log(2))
    code = {"metrics": {}, "metric": "pass@2", "records": {"passed": [[4, 0], [4, 1], [4, 4]]}}
    solved = items_of(code)
    assert solved and solved.counts[:, 0] == pytest.approx([0, 0.5, 1])
    both = {**code, "records": {**code["records"], "bleu": [[4, 3, 2, 1, 4, 3, 2, 1, 4, 4]] * 3}}
    assert items_of({**both, "metric": "bleu"}).metric == "bleu" and items_of(both).metric == "pass@2"
    assert items_of(choice("0110"), "acc_norm").counts[:, 0].tolist() == [0, 1, 1, 0]
    assert items_of({"metrics": {}, "records": {}}) is None


def test_fewer_bits_a_byte_are_better() -> None:
    sizes = np.full(50, 100)
    a = {"loss": [[-80.0 - n % 7, int(size)] for n, size in enumerate(sizes)], "digest": "x"}
    b = {"loss": [[-70.0 - n % 7, int(size)] for n, size in enumerate(sizes)], "digest": "x"}
    rows, _ = compare_results("a", {"l": {"metrics": {}, "records": a}}, "b", {"l": {"metrics": {}, "records": b}}, {})
    assert rows[0].found.value == pytest.approx(-0.1 / math.log(2)) and rows[0].better == "b"


def test_unlike_items_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"task one: a and b did not answer the same items \(4 and 4\).*--limit"):
        compare_results("a", {"one": choice("0110", "d1")}, "b", {"one": choice("0110", "d2")}, {})
    with pytest.raises(DataError, match=r"\(4 and 3\)"):
        compare_results("a", {"one": choice("0110")}, "b", {"one": choice("011")}, {})


def test_a_groups_mean_is_compared_too_and_says_what_it_lacks() -> None:
    a = {"one": choice("0" * 40), "two": choice("01" * 20), "bleu": choice("01" * 20, metric="bleu")}
    b = {"one": choice("1" * 40), "two": choice("01" * 20), "bleu": choice("01" * 20, metric="bleu")}
    rows, _ = compare_results("a", a, "b", b, {"reasoning": ["one", "two", "gone"], "mixed": ["one", "bleu"]}, 400)
    group = rows[-1]
    assert (group.task, group.metric) == ("[reasoning]", "mean of 2 of 3")
    assert (group.a, group.b, group.better) == (0.25, 0.75, "b") and group.found.value == 0.5
    assert not any(row.task == "[mixed]" for row in rows)
    assert all(row.holm >= row.found.p for row in rows)
    lines = comparison_table("a", "b", rows)
    assert len(lines) == len(rows) + 1 and lines[1].endswith("b")


def test_group_means_are_plain_means_with_the_error_of_a_mean() -> None:
    about = record({})["tasks"]
    means = group_means({"one": choice("0001"), "two": choice("0111")}, about)
    assert means == {"reasoning": {"value": 0.5, "stderr": pytest.approx(0.1 * 2**0.5 / 2), "tasks": 2, "of": 3}}
    assert (
        group_means({"one": choice("01")}, {"one": {**about["one"]}, "x": {"group": "reasoning", "metric": "bleu"}})
        == {}
    )


def test_what_was_not_run_is_said() -> None:
    made = record({"a": {"one": choice("0001"), "two": choice("0111")}}, limit=4)
    made["models"][0]["groups"] = group_means(made["models"][0]["results"], made["tasks"])
    made["models"][0]["results"]["one"]["records"] |= {"cut_items": 2, "uneven_items": 1}
    said = "\n".join(notes(made))
    for words in ("NOT RUN, for want of data: gone", "--limit", "two: items left out, as the suite says: 3", "2 items"):
        assert words in said
    assert "unlike token counts" in said and "mean of 2 of 3" in "\n".join(table(made))


def test_files_are_merged_by_models_name_and_clashes_are_named(tmp_path: Path) -> None:
    write_record(tmp_path / "1.json", record({"a": {"one": choice("01")}}))
    write_record(tmp_path / "2.json", record({"a": {"two": choice("01")}, "b": {"one": choice("11")}}))
    merged = merge_records([tmp_path / "1.json", tmp_path / "2.json"])
    assert {name: sorted(tasks) for name, tasks in merged.results.items()} == {"a": ["one", "two"], "b": ["one"]}
    assert merged.groups == {"reasoning": ["one", "two", "gone"]}
    with pytest.raises(ConfigError, match="model a has task one"):
        merge_records([tmp_path / "1.json", tmp_path / "1.json"])


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 9, "models": []}', b"\xff", b'{"format": 2}'])
def test_B1_a_file_that_is_no_result_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_bytes(content)
    with pytest.raises(DataError, match=r"e\.json"):
        read_record(tmp_path / "e.json")
    with pytest.raises(DataError, match="no such file"):
        read_record(tmp_path / "none.json")


def test_few_items_are_warned_of_and_show_no_better_model() -> None:
    rows, said = compare_results("a", {"one": choice("0000")}, "b", {"one": choice("1111")}, {}, 200)
    assert rows[0].found.p == pytest.approx(0.125) and rows[0].better == "" and rows[0].found.low == 0
    assert any("few items" in line and "one (4)" in line for line in said)
    assert not compare_results("a", {"l": choice("01" * 25)}, "b", {"l": choice("10" * 25)}, {}, 200)[1]


def test_a_file_of_one_model_may_be_given_another_name(tmp_path: Path) -> None:
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    write_record(one, record({"a": {"one": choice("01")}}, dtype="float32"))
    write_record(two, record({"a": {"one": choice("11")}}, dtype="bfloat16"))
    merged = merge_records([one, two], {two: "other"})
    assert list(merged.results) == ["a", "other"] and merged.dtypes == {"a": ["float32"], "other": ["bfloat16"]}
    with pytest.raises(ConfigError, match=r"first=FILE\.json second="):
        merge_records([one, two])
    write_record(two, record({"b": {}, "c": {}}))
    with pytest.raises(ConfigError, match="this has b, c"):
        merge_records([two], {two: "other"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "it has no field 'format'"),
        ("{", "not one JSON object .line 1"),
        ('{"format": 1, "models": ["a"]}', "form"),
    ],
)
def test_B1_what_is_wrong_with_a_file_is_said_in_words(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(DataError, match=f"{words}.*Give a file that stagemix evaluate --output wrote") as caught:
        read_record(tmp_path / "e.json")
    assert "Error(" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_record(tmp_path)
