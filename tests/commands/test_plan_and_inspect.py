"""What plan, inspect_data and ledger show, against counts and files read another way."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import run_config, write_corpus
from planned_runs import LENGTHS, planned

from megatron.checkpoint.manifest import build_manifest, manifest_bytes
from megatron.commands import inspect_data, ledger, plan
from megatron.commands.frame import run_command
from megatron.config.load import config_to_toml, load_config
from megatron.data.indexed_dataset import IndexedDataset
from megatron.planner.resolve import resolve_run

SEQ, BATCH = 16, 4


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("code-0", "code-1", "text")):
        write_corpus(folder / name, 60, seed)
    sources = {
        "code": {"data": [str(folder / "code-0"), str(folder / "code-1")], "group": "all", "slice": ["0", "0.5"]},
        "text": {"data": [str(folder / "text")], "group": "all", "max_epochs": 9},
    }
    stages = [
        {"name": "one", "samples": 80, "mixture": {"code": 0.3, "text": 0.7}},
        {"name": "two", "samples": 320, "mixture": {"code": 0.1, "text": 0.9}, "ramp_to": {"text": 1}},
    ]
    file = folder / "run.toml"
    file.write_text(config_to_toml(run_config(folder, sources, stages, validation={"fraction": "0.2"})))
    return file


@pytest.fixture(scope="module")
def planned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    file = folder / "run.toml"
    file.write_text(config_to_toml(planned(folder)))
    return file


def out_of(main: Any, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def rows_of(file: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out_of(inspect_data.main, capsys, file, *argv, "--jsonl").splitlines()]


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_shows_everything_at_80_columns_in_a_plain_pipe(planned_file: Path, stagemix_command: list[str]) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    argv = [*stagemix_command, "plan", str(planned_file), "--width", "80"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert all(len(line.rstrip()) <= 80 for line in done.stdout.partition("Warnings")[0].splitlines())
    for words in ("books", "4 epochs", "x 0.5", "code", "!! books is trained on for", "Where sources begin to repeat"):
        assert words in done.stdout


def test_plan_where_the_output_has_ascii_alone(planned_file: Path, stagemix_command: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = [*stagemix_command, "plan", str(planned_file)]
    done = subprocess.run(argv, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"|" in done.stdout


def test_plan_writes_page_and_picture_beside_json(
    planned_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "a" / "plan.html", tmp_path / "b" / "plan.png"
    record = json.loads(out_of(plan.main, capsys, planned_file, "--html", page, "--png", picture, "--json"))
    assert page.read_text().startswith("<!doctype html>") and picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [stage["asked_tokens"] for stage in record["stages"]] == list(LENGTHS.values())
    assert {row["gravity"] for row in record["warnings"]} <= {"high", "medium", "low"}
    assert [stage["lr_before"] for stage in record["stages"]] == [None, 1e-3, 1e-3, 5e-4]
    assert [stage["lr_start"] for stage in record["stages"]] == [0, 1e-3, 5e-4, 5e-4]


def test_plan_does_not_load_matplotlib_unasked(planned_file: Path) -> None:
    import sys

    code = (
        "import sys; from megatron.commands.plan import main; main([sys.argv[1]]); "
        "sys.exit(' '.join({'matplotlib', 'torch', 'tokenizers', 'sentencepiece'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(planned_file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- inspect_data -----------------------------------------------------------------------------------------------------


def test_summary_counts_what_the_samples_say(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(config_file, capsys, "--samples", "0:400")
    for first, last in ((0, 400), (13, 77), (70, 95), (300, 301)):
        summary = rows_of(config_file, capsys, "--samples", f"{first}:{last}", "--summary")[0]
        counted = Counter((row["stage"], row["source"]) for row in rows[first:last])
        assert {(row["stage"], row["source"]): row["samples"] for row in summary["rows"] if row["samples"]} == counted
        for row in summary["rows"]:
            assert abs(row["error"]) < 1
            key = row["stage"], row["source"]
            epochs = [
                epoch for its in rows[first:last] if (its["stage"], its["source"]) == key for epoch in its["epochs"]
            ]
            assert row["epochs"] == ([min(epochs), max(epochs)] if epochs else [])
        assert sum(row["target"] for row in summary["rows"]) == pytest.approx(last - first)
        assert sum(group["samples"] for group in summary["groups"]) == last - first
    # the targets, once more by hand: 0.3 of the first 80; a ramp from 0.1 to 0 over 320
    whole = {(row["stage"], row["source"]): row["target"] for row in
             rows_of(config_file, capsys, "--samples", "0:400", "--summary")[0]["rows"]}  # fmt: skip
    assert whole == pytest.approx({("one", "code"): 24, ("one", "text"): 56, ("two", "code"): 16, ("two", "text"): 304})


def test_summary_as_a_process(config_file: Path, stagemix_command: list[str]) -> None:
    argv = [*stagemix_command, "inspect_data", str(config_file), "--samples", "0:80", "--summary"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"code +24 +24\.000 +\+0\.000", done.stdout)
    assert "80 samples, 1.28K tokens, steps 0 to 20" in done.stdout


def test_places_lead_to_the_same_samples(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(config_file, capsys, "--samples", "0:400")
    assert rows_of(config_file, capsys, "--at", "1280 tokens") == rows[80:90]
    assert rows_of(config_file, capsys, "--at", "21 steps") == rows[84:94]
    assert rows_of(config_file, capsys, "--at", "397") == rows[397:]
    assert rows_of(config_file, capsys, "--samples", "100 tokens:+2 steps") == rows[6:12]


def test_ids_and_text_are_those_of_the_files(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        name: [IndexedDataset(prefix) for prefix in source.data]
        for name, source in load_config(config_file).sources.items()
    }
    for row in rows_of(config_file, capsys, "--samples", "75:85", "--ids", "--text"):
        for (document, start, end), ids, text in zip(row["pieces"], row["ids"], row["text"], strict=True):
            file = files[row["source"]][document // 60]
            expected = file.tokens(document % 60)[start:end].tolist()
            assert ids == expected
            assert text == bytes(token for token in expected if token < 256).decode("utf-8", "replace")


def test_rearranged_pieces_are_said_and_refused_without_sentinels(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ["--set", "stages.one.fim={text=1}"]
    rows = rows_of(config_file, capsys, "--samples", "0:40", *change)
    shown = out_of(inspect_data.main, capsys, config_file, "--samples", "0:40", *change, "--pieces")
    long = sum(end - start >= 8 for row in rows if row["source"] == "text" for _, start, end in row["pieces"])
    assert long >= shown.count("fill-in-the-middle") > 20
    assert run_command(inspect_data.main, [str(config_file), "--samples", "0:40", *change, "--ids"]) == 2
    assert "no sentinels" in capsys.readouterr().err
    assert run_command(plan.main, [str(config_file), *change]) == 0
    assert "train will refuse fill-in-the-middle of text" in capsys.readouterr().out


def test_a_drawn_sample_says_where_documents_are_cut(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {
        name: np.concatenate([IndexedDataset(prefix).document_lengths() for prefix in source.data])
        for name, source in load_config(config_file).sources.items()
    }
    rows = rows_of(config_file, capsys, "--samples", "0:60")
    lines = out_of(inspect_data.main, capsys, config_file, "--samples", "0:60", "--pieces").splitlines()
    for row in rows:
        head = lines.pop(0)
        assert head.startswith(f"sample {row['sample']} · stage {row['stage']}") and head.endswith(row["source"])
        assert f"step {row['sample'] // BATCH} · token {row['sample'] * SEQ:,} " in head
        at = 0
        for (document, start, end), epoch in zip(row["pieces"], row["epochs"], strict=True):
            line = lines.pop(0)
            length = int(lengths[row["source"]][document])
            assert line.split()[0] == str(at)
            assert f"document {document} [{start}:{end}] of {length} tokens · epoch {epoch}" in line
            assert ("begins here" in line) == (start == 0) and ("ends here" in line) == (end == length)
            at += end - start
        assert lines.pop(0).split() == ["16", "└─", "the", "window", "ends"]
    assert not lines


def test_documents_say_what_is_held_out_and_outside_the_slice(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(config_file)
    files = [IndexedDataset(prefix) for prefix in config.sources["code"].data]
    rows = rows_of(config_file, capsys, "--documents", "code:0:120")
    assert [row["document"] for row in rows] == list(range(120))
    for row in rows:
        file = files[row["document"] // 60]
        assert row["file"] == config.sources["code"].data[row["document"] // 60]
        assert row["number"] == row["document"] % 60 and row["tokens"] == file.document_length(row["number"])
        assert row["in_slice"] == (row["document"] < 60)
        ids = file.tokens(row["number"])[:64].tolist()
        assert row["text"] == bytes(token for token in ids if token < 256).decode("utf-8", "replace")
    # what is never met in many epochs of training is what is said to be held out
    met = {row["pieces"][n][0] for row in rows_of(config_file, capsys, "--samples", "0:400")
           if row["source"] == "text" for n in range(len(row["pieces"]))}  # fmt: skip
    text = rows_of(config_file, capsys, "--documents", "text:0:")
    assert len(text) == 20
    text = rows_of(config_file, capsys, "--documents", "text:0:60")
    assert {row["document"] for row in text if not row["held_out"]} == met
    assert sum(row["held_out"] for row in text) > 0
    shown = out_of(inspect_data.main, capsys, config_file, "--documents", "code:58:62")
    assert re.search(r"^ *59 .* yes ", shown, re.MULTILINE) and re.search(r"^ *60 .* no +–", shown, re.MULTILINE)


# -- ledger -----------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, config_file: Path, samples: int, *overrides: str) -> Path:
    stream = resolve_run(load_config(config_file, list(overrides))).stream()
    while stream.consumed_samples < samples:
        stream.next_batch()
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"data": stream.ledger.to_json()}))
    (folder / "manifest.json").write_bytes(manifest_bytes(build_manifest(folder, samples // 4, keep_forever=False)))
    return folder


def test_ledger_diff_names_the_difference_and_the_sample(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = checkpoint(tmp_path / "a" / "checkpoints" / "step-000000050", config_file, 200)
    two = checkpoint(
        tmp_path / "b" / "checkpoints" / "step-000000050", config_file, 200, "stages.two.mixture={code=0.4, text=0.6}"
    )
    assert ledger.main(["diff", str(one), str(two), "--json"]) == 5
    record = json.loads(capsys.readouterr().out)
    assert not record["same"] and [row["what"] for row in record["differences"]] == ["stages.two.weights"]
    orders = [
        rows_of(config_file, capsys, "--samples", "0:200"),
        rows_of(config_file, capsys, "--samples", "0:200", "--set", "stages.two.mixture={code=0.4, text=0.6}"),
    ]
    expected = next(n for n, (a, b) in enumerate(zip(*orders, strict=True)) if a != b)
    assert record["parting"]["sample"] == expected >= 80
    assert ledger.main(["diff", str(one), str(two)]) == 5
    shown = capsys.readouterr().out
    assert "another aggregate: code +" in shown and not record["same_aggregate"]
    assert f"they part at sample {expected}" in shown and "code 0.1 → 0" in shown and "0.4 → 0" in shown
    assert ledger.main(["diff", str(one), str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []


def test_ledger_show_sums_groups_and_shows_what_was_left(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "a" / "checkpoints" / "step-000000100", config_file, 400)
    record = json.loads(out_of(ledger.main, capsys, "show", folder, "--json"))
    for group in record["groups"]:
        members = [row for row in record["rows"] if row["training_stage"] == group["training_stage"]]
        assert (
            group["samples"]
            == sum(row["samples"] for row in members)
            == {"one": 80, "two": 320}[group["training_stage"]]
        )
        assert abs(group["error"]) < 1e-9
    shown = out_of(ledger.main, capsys, "show", folder)
    assert "all (group)" in shown and "unused" not in shown and "skipped" not in shown
    state = json.loads((folder / "state.json").read_text())
    state["data"]["stages"][0]["use"]["code"] |= {"unused": 11, "skipped": 7}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(manifest_bytes(build_manifest(folder, 100, keep_forever=False)))
    shown = out_of(ledger.main, capsys, "show", folder)
    assert "unused" in shown and "skipped" in shown and "displaced" not in shown
    assert re.search(r"code .* 11 +7 *$", shown, re.MULTILINE)
