"""`stagemix study add-arm`: the file keeps its bytes, what ran is not touched, and nothing else becomes another."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from study.run_studies import ARMS, digest, make_study, train_here

from megatron.commands import study as command
from megatron.commands.frame import run_command
from megatron.study.added_arm import NewArm, with_arm, write_arm
from megatron.study.plan import plan_study

TWO = {"text": ARMS["text"], "code": ARMS["code"]}


def add(study: Path, *words: str) -> int:
    return run_command(command.main, ["add-arm", str(study), *words])


def test_an_arm_is_put_behind_the_file_and_what_ran_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path, TWO)
    study.write_bytes(b"# a remark\n\n" + study.read_bytes() + b"# and one at the end, without a line's end")
    study.chmod(0o640)
    planned = train_here(study)
    there, text = digest(tmp_path / "out"), study.read_bytes()
    words = ("tail", "--from", "text/on", "--stage", "code", "--stage", '{ use = "on", name = "on-2", steps = 3 }')
    assert add(study, *words, "--set", "stages.on-2.mixture.web=0.5", "--experiment", "tails") == 0
    said = capsys.readouterr().out
    assert study.read_bytes().startswith(text) and study.stat().st_mode & 0o777 == 0o640
    assert digest(tmp_path / "out") == there
    assert tomllib.loads(study.read_text())["arms"]["tail"] == {
        "from": "text/on",
        "stages": ["code", {"use": "on", "name": "on-2", "steps": 3}],
        "set": {"stages.on-2.mixture.web": 0.5},
        "experiment": "tails",
    }
    after = plan_study(study)
    assert {arm.name: arm.path for arm in after.graph.arms if arm.name in TWO} == {
        arm.name: arm.path for arm in planned.graph.arms
    }
    ids = {node.label: node.id[:8] for node in after.graph.nodes.values() if "tail" in node.arms}
    assert f"shared init {ids['init']}: 768 tokens, trained" in said
    assert f"new    on-2 {ids['on-2']}: 192 tokens, to train" in said
    assert "704 new tokens of 2.05K that it has alone" in said and f"stagemix study run {study} --arm tail" in said
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_arm_that_is_there_in_other_words_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, TWO)
    assert add(study, "twin", "--from", "code/init", "--stage", "on", "--dry-run", "--seeds", "1,2") == 0
    said = capsys.readouterr().out
    assert "nothing is trained for it" in said and "nothing was written" in said and said.count("seed 2") == 2
    assert "twin" not in study.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text", "--stage", "init"], "there is an arm 'text' already"),
        (["new", "--stage", "ini"], "did you mean 'init'?"),
        (["new", "--stage", "code", "--from", "text/of"], "has no stage 'of': did you mean 'on'?"),
        (["new", "--stage", "code", "--from", "texts"], "there is no arm 'texts': did you mean 'text'?"),
        (["new", "--stage", "{ use = init }"], "is neither a name nor a table"),
        (["new", "--stage", "init", "--set", "optimizer.weight_decay"], "write KEY=VALUE"),
        (["new", "--stage", "init", "--set", "optimiser.weight_decay=1"], "did you mean 'optimizer'?"),
        (
            ["new", "--stage", "init", "--set", "train.z_loss=0", "--set", "train.z_loss=1"],
            "--set train.z_loss=…: is given twice",
        ),
        (["new", "--stage", "on"], "lr"),
        (["a/b", "--stage", "init"], "is no name"),
        (["new", "--stage", "code", "--from", "text/on", "--set", "model.hidden_size=64"], "changes what that was"),
    ],
)
def test_what_cannot_be_added_leaves_the_file_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    study = make_study(tmp_path, TWO)
    text = study.read_bytes()
    assert add(study, *words) == 2
    error = capsys.readouterr().err
    assert said in error and ".study." not in error, error
    assert study.read_bytes() == text and [path.name for path in tmp_path.iterdir()].count("study.toml") == 1


def test_line_ends_and_links_are_kept(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    study.write_bytes(study.read_bytes().replace(b"\n", b"\r\n"))
    link = tmp_path / "link.toml"
    link.symlink_to(study)
    assert add(link, "tail", "--from", "text", "--stage", "code") == 0
    assert link.is_symlink() and b"\n" not in study.read_bytes().replace(b"\r\n", b"")
    assert len(plan_study(link).arms) == 3


def test_a_file_that_was_edited_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    study = make_study(tmp_path, TWO)
    added = with_arm(study, NewArm("tail", ["code"], "text"))
    study.write_bytes(study.read_bytes() + b"# mine\n")
    with pytest.raises(Exception, match="was edited while"):
        write_arm(added)
    assert study.read_text().endswith("# mine\n")


def test_an_inline_table_of_arms_cannot_be_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path, TWO)
    head, _, _ = study.read_text().partition("[arms.")
    study.write_text('arms = { text = { stages = ["init", "on"] } }\n' + head.replace("[arms]\n", ""))
    assert add(study, "tail", "--from", "text", "--stage", "code") == 2
    assert "not valid TOML" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, TWO)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert add(study, "tail", "--from", "text", "--stage", "code") == 2
