"""What a study's report wrote, read back: links, rows, and the figures that its inputs say."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

from megatron.study.node_config import node_folder
from megatron.study.plan import PlannedStudy


class Balance(HTMLParser):
    """Fails at a tag that is closed and was not opened, or that stays open."""

    void = {"meta", "br", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opened and closed in one."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag


def links_of(page: Path) -> list[str]:
    checker = Balance()
    checker.feed(page.read_text())
    assert checker.open == []
    return checker.links


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def arm_node(study: PlannedStudy, arm: str, seed: int) -> str:
    return next(one.path[-1] for one in study.graph.arms if one.name == arm and one.seed == seed)


def right_share(study: PlannedStudy, arm: str, seed: int, task: str) -> float:
    """From the file of items itself."""
    path = node_folder(study, arm_node(study, arm, seed)).evaluation("bench")
    marks = json.loads(path.read_text())["models"][0]["results"][task]["records"]["correct"]["acc"]
    return marks.count("1") / len(marks)
