"""The table [report] of a study file: which figures `stagemix study report` puts together, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron.config.section import Section

Pattern = Annotated[str, Field(min_length=1)]


class ReportSection(Section):
    """Named scores, what is plotted, and how sure a difference has to be.

    A pattern is a figure's key "SUITE/TASK/METRIC"; or "SUITE/TASK", a task or a group, and then the metric of each
    task that counts, one a task. `*` and `?` stand for any letters, as in names of files.
    """

    scores: dict[Annotated[str, Field(min_length=1)], Annotated[list[Pattern], Field(min_length=1)]] = Field(
        default_factory=dict, description="named means of figures; default one for each group of tasks"
    )
    metrics: list[Pattern] = Field(
        default_factory=list, description="columns of the table beside the scores; default all that count"
    )
    pareto: list[str] = Field(default_factory=list, description='two scores; default "text" and "code"')
    share: str = Field("code", min_length=1, description="the group whose share of tokens is plotted against scores")
    share_of: Literal["all", "last-stage"] = Field("all", description="of all tokens so far, or of the last stage's")
    alpha: float = Field(0.05, gt=0, lt=1, description="a difference is told from noise where Holm's p is below")
    resamples: int = Field(10_000, ge=1000, description="of the bootstrap")
    labels: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict, description="what arms are called in tables and plots"
    )

    @model_validator(mode="after")
    def _check(self) -> ReportSection:
        if self.pareto and (len(self.pareto) != 2 or self.pareto[0] == self.pareto[1]):
            raise ValueError(f"pareto = {self.pareto}: give two different scores, one for each axis")
        if self.scores and (unknown := [name for name in self.pareto if name not in self.scores]):
            known = ", ".join(self.scores)
            raise ValueError(f"pareto names {unknown[0]!r}, which is no score: scores are {known}")
        return self
