"""`stagemix study` as a user runs it: real processes, what they print, and that torch is never imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron.commands.study import main
from megatron.config.errors import ConfigError
from megatron.config.layout import resolve_layout
from megatron.config.model_shape import resolve_model
from megatron.planner.hardware import HARDWARE
from megatron.planner.run_time import run_time, step_times
from megatron.study.costs import node_times
from megatron.study.plan import plan_study
from megatron.study.steps import TrainStep

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "examples" / "studies"
FULL = [STUDIES / paper / "full.toml" for paper in ("paper-a", "paper-b")]


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.parent.name)
def test_the_full_studies_are_planned_without_torch(path: Path) -> None:
    code = (
        "import sys; from megatron.commands.study import main; "
        f"code = main(['plan', {str(path)!r}, '--json', '--hardware', 'h100', '--processes', '8']); "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'torch']; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["gpu_hours"] > 100 and plan["hardware"]["notes"] == []
    assert plan["gpu_hours"] == pytest.approx(sum(node["gpu_hours"] for node in plan["nodes"]))
    assert plan["disk_bytes"] > 10**9


def test_the_tool_prints_what_a_reader_looks_for() -> None:
    done = subprocess.run(
        [sys.executable, "tools/study.py", "plan", str(FULL[1])], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "stages: 1.72T trained of 5.12T naive = 0.336 (12 arms)",
        "├─ balanced-on [200B]  → balanced",
        "to-text  200B: text 90 %, web_code 8 %, markup 2 %",
        "share-100, quality-markup are the same arm",
        "text: 400B tokens  (baseline)",
    ):
        assert words in done.stdout, done.stdout
    assert "GPU-hours" not in done.stdout


def test_the_graph_in_both_languages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", str(FULL[0]), "--format", "dot"]) == 0
    words = capsys.readouterr().out
    edges = re.findall(r"n([0-9a-f]{16}) -> n([0-9a-f]{16});", words)
    nodes = set(re.findall(r"^  n([0-9a-f]{16}) \[", words, re.MULTILINE))
    assert len(nodes) == 9 and len(edges) == 7 and {node for edge in edges for node in edge} <= nodes
    assert main(["plan", str(FULL[0]), "--graph", "mermaid"]) == 0
    mermaid = capsys.readouterr().out
    assert mermaid.startswith("graph LR") and mermaid.count("-->") == 7
    assert main(["graph", str(FULL[0]), "--arm", "N*"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "pretrain-text [27.8B]"
    with pytest.raises(ConfigError, match="--json and --graph dot: both are for standard output"):
        main(["plan", str(FULL[0]), "--graph", "dot", "--json"])


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_every_arm_and_nothing_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "pages" / "plan.html"
    assert main(["plan", str(FULL[1]), "--html", str(page)]) == 0
    capsys.readouterr()
    html = page.read_text(encoding="utf-8")
    parser = _Balanced()
    parser.feed(html)
    assert parser.open == [] and "<script" not in html and "http" not in html.replace("https://arxiv", "")
    assert {"balanced-to-text-cooldown-code", "share-25", "quality-synthetic"} <= set(parser.words)
    (svg,) = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    tree = ElementTree.fromstring(svg)
    assert len(tree.findall(".//rect")) == 24 and len(tree.findall("./path")) == 12
    boxes = {(rect.get("x"), rect.get("y")) for rect in tree.findall(".//rect")}
    assert len(boxes) == 24  # none lies on another
    drawn = {name for text in tree.findall(".//text[@class='arm']") for name in (text.text or "").split(", ")}
    assert len(drawn) == 22 and {"text", "balanced-to-text-cooldown-text", "share-100", "quality-markup"} <= drawn


def test_the_page_of_the_documentation_is_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    first, _, axes, averages, *others = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    report = next(block for block in others if block.startswith("[report]"))
    base = """
        tokenizer = { path = "bytes" }
        model = { preset = "paper-b-470m", seq_length = 2048 }
        sources = { text = { tokens = "503B" }, code = { tokens = "300B" } }
        train = { global_batch_size = 512 }
    """
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "study.toml").write_text(
        first + axes + averages.replace("a/cooldown", "cooled").replace("b/cooldown", "text") + report
    )
    assert main(["plan", str(tmp_path / "study.toml")]) == 0
    printed = capsys.readouterr().out
    assert "share-25-0.03" in printed and "soup  average of cooled/cooldown, text/on: 66.7 %, 33.3 %" in printed


def test_hours_of_nodes_are_those_of_the_run_that_has_their_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the planner's own arithmetic for a whole run of one arm."""
    planned = plan_study(FULL[1], ["balanced-to-text-cooldown-code"])
    device = HARDWARE["h100"]
    times, notes = node_times(planned.graph, device, 16)
    last = planned.arms["balanced-to-text-cooldown-code"].steps[-1]
    assert isinstance(last, TrainStep) and notes == []
    config, schedule = last.config, last.run.schedule
    shape = resolve_model(config.model, 256_000, 8192)
    layout = resolve_layout(config.parallel, 16)
    steps = step_times(schedule, shape, config.parallel, layout, config.train, config.optimizer, device)
    whole = run_time(schedule, steps, 16)
    assert sum(time.gpu_hours for time in times.values()) == pytest.approx(whole.gpu_hours)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pln", "x"], "no such action: did you mean 'plan'?"),
        (["zzz", "x"], "study zzz: no such action: there are: plan, graph, run, status, add-arm"),
        (["plan", str(FULL[0]), "--arm", "NX"], "no arm is called so"),
        (["plan", str(FULL[0]), "--processes", "8"], "add --hardware"),
        (["plan", str(FULL[0]), "--hardware", "h10"], "did you mean"),
        (["plan", str(FULL[0]), "--hardware", "h100", "--processes", "0"], "at least one"),
        (["plan", str(FULL[0]), "--html", "plan.txt"], "ends in .html"),
        (["plan", "none.toml"], "none.toml: no such study file"),
        (["plan", str(STUDIES)], "is a folder: name the study file in it"),
        (["plan", str(ROOT / "examples" / "minimal.toml")], "stagemix plan"),
    ],
)
def test_wrong_command_lines_say_what_exists(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(words)
    assert said in str(caught.value)
