"""Where everything of a study's node lies, below the study's output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NodeFolder:
    """The folder of one node: that of its run, with what a study adds to it."""

    path: Path

    @property
    def config(self) -> Path:
        """The config of its run."""
        return self.path / "node.toml"

    @property
    def identity(self) -> Path:
        """What it is known by, written before it starts."""
        return self.path / "node.json"

    @property
    def export(self) -> Path:
        """Its Hugging Face folder."""
        return self.path / "export"

    @property
    def results(self) -> Path:
        """What its evaluations came to; written when all of them are done."""
        return self.path / "results.json"

    @property
    def samples(self) -> Path:
        """Texts that it generated, a line each."""
        return self.path / "samples.jsonl"

    def evaluation(self, suite: str) -> Path:
        """The results file of a suite."""
        return self.path / f"evaluation-{suite}.json"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step, from 1 of the whole chain."""
        return self.path / "checkpoints" / f"step-{step:09d}"


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study (`study.output`)."""

    path: Path

    @property
    def record(self) -> Path:
        """Its nodes as they were when it was last run."""
        return self.path / "study.json"

    @property
    def report(self) -> Path:
        """Pages, tables and plots."""
        return self.path / "report"

    @property
    def logs(self) -> Path:
        """Output of the processes that train and evaluate nodes."""
        return self.path / "logs"

    def node(self, name: str) -> NodeFolder:
        """The folder of a node, by its id."""
        return NodeFolder(self.path / "nodes" / name)
