"""The study in the user's words: one frozen, typed model for each table of a study file."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron.config.quantities import parse_count
from megatron.config.schema import EvaluationSection, StageSection
from megatron.config.section import Section
from megatron.study.report_section import ReportSection
from megatron.study.results_section import ResultsSection
from megatron.study.slurm_section import SlurmTable

_NAME = re.compile(r"(?!\.{1,2}$)[^\s/*?\[\]{}\x00-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]{1,100}")


def _seed(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(
            f"{str(value)!r} is no seed: give whole numbers from 0 to 2^63 - 1, for example seeds = [1, 2, 3]"
        )
    return value


def _name(value: Any) -> Any:
    if isinstance(value, str) and not _NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is no name: at most 100 characters, without spaces and / * ? [ ] {{ }}, which stand between "
            "names and in patterns, and without what cannot be seen"
        )
    return value


def _over(value: Any) -> Any:
    if value in ("run", "stage"):
        return value
    if (count := parse_count(value, "tokens")) == 0:
        raise ValueError('R is 0 tokens: give "run", "stage", or a count such as "400B"')
    return count


Seed = Annotated[int, BeforeValidator(_seed)]
Name = Annotated[str, BeforeValidator(_name), Field(min_length=1)]
Positive = Annotated[Decimal, Field(gt=0, allow_inf_nan=False)]


class StudySection(Section):
    """What the study is called, where it writes, and what all its arms have in common."""

    name: str = Field(min_length=1, description="name of the study, shown in plans and reports")
    output: str = Field(min_length=1, description="folder that receives a run's folder for each node")
    base: str | None = Field(None, description="config file of a run, whose tables but stages all arms have; or [base]")
    seeds: list[Seed] = Field(default_factory=lambda: [1234], min_length=1, description="every arm once for each")
    baseline: str | None = Field(None, description="the arm that others are compared with")

    @model_validator(mode="after")
    def _check(self) -> StudySection:
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if twice:
            raise ValueError(f"seeds: {twice[0]} is given twice: each seed gives the same run again")
        return self


class WeightsFromSection(Section):
    """A mixture that another program learned, read from its file."""

    file: str = Field(min_length=1, description="CSV or JSON of source and weight; relative to the study file")
    row: int | None = Field(None, ge=1, description="of a table with a column for each source: which of its rows")
    names: dict[str, str] = Field(default_factory=dict, description="the file's names = sources or groups of the study")


class CapSection(Section):
    """p <= k N / R: no source gets a share p that would make more than k epochs of its N tokens over R tokens."""

    epochs: Positive = Field(description="k")
    over: Annotated[Literal["run", "stage"] | int, BeforeValidator(_over)] = Field(
        "run", description='R: tokens of the whole arm ("run"), of this stage ("stage"), or a count such as "400B"'
    )


class StudyStage(StageSection):
    """A training stage of the library, in the words of `[[stages]]`; or checkpoints that are averaged, without a token.

    name is the table's own name.
    """

    name: str = ""
    weights_from: WeightsFromSection | None = Field(None, description="the mixture from a file, instead of mixture")
    cap: CapSection | None = Field(None, description="limits each source's share of mixture or weights_from")
    average: list[str] | None = Field(None, min_length=1, description='checkpoints that are averaged, as "arm/stage"')
    last: int | None = Field(None, ge=2, description="average the newest so many checkpoints of the stage before it")
    weights: list[Positive] | None = Field(None, description="of the averaged checkpoints; default equal")

    @property
    def averages(self) -> bool:
        """Whether it averages checkpoints instead of training."""
        return self.average is not None or self.last is not None

    @model_validator(mode="after")
    def _check(self) -> StudyStage:
        said = self.model_fields_set - {"name"}
        if not self.averages:
            if self.weights is not None:
                raise ValueError("weights are of averaged checkpoints: give average or last, or leave weights out")
            return self
        if self.average is not None and self.last is not None:
            raise ValueError("says both average and last: give the checkpoints, or how many of the stage before it")
        if others := sorted(said - {"average", "last", "weights"}):
            raise ValueError(f"averages checkpoints and trains nothing: leave {', '.join(others)} out")
        count = self.last if self.average is None else len(self.average)
        if self.average is not None and count == 1:
            raise ValueError(f"average names {self.average[0]!r} alone: give at least two, or last = 2")
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"has {len(self.weights)} weights for {count} checkpoints: give one for each")
        return self


class ArmSection(Section):
    """A list of training stages, from the beginning or from the end of a stage of another arm."""

    stages: list[str | dict[str, Any]] = Field(
        default_factory=list, description="names of [stages.…], or tables of their own; use = NAME changes one of those"
    )
    from_: str | None = Field(None, alias="from", description='"arm/stage": goes on from there')
    set: dict[str, Any] = Field(default_factory=dict, description='other values, "optimizer.weight_decay" = 0.05')
    axes: list[str] = Field(default_factory=list, description="names of [axes.…]: an arm for each of their values")
    combine: Literal["grid", "zip"] = Field("grid", description="several axes: all combinations, or side by side")
    experiment: str = Field("", description="words that plans and reports group arms by")

    @model_validator(mode="after")
    def _check(self) -> ArmSection:
        if not self.stages:
            words = f"adds nothing to {self.from_!r}" if self.from_ else "has no stages"
            raise ValueError(f"{words}: give stages = [names of [stages.…]]")
        return self


class AxisSection(Section):
    """Values of config keys, each of which makes an arm."""

    set: list[str] = Field(min_length=1, description='keys, for example "stages.init.mixture.code"')
    values: list[Any] | None = Field(None, min_length=1, description="each is given to every key of set")
    rows: list[list[Any]] | None = Field(None, min_length=1, description="each has one value for each key of set")
    labels: list[Name] | None = Field(None, description="what arms are called by; default the values, or their numbers")

    @model_validator(mode="after")
    def _check(self) -> AxisSection:
        if (self.values is None) == (self.rows is None):
            raise ValueError("says both values and rows, or neither: give values = [...] for all keys, or rows")
        for number, row in enumerate(self.rows or []):
            if len(row) != len(self.set):
                raise ValueError(f"rows[{number}] has {len(row)} values for {len(self.set)} keys of set")
        count = len(self.values if self.values is not None else self.rows or [])
        if self.labels is not None and len(self.labels) != count:
            raise ValueError(f"has {len(self.labels)} labels for {count} values: give one for each")
        return self


class StudyConfig(Section):
    """A whole study file."""

    study: StudySection
    base: dict[str, Any] | None = None
    stages: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    arms: Annotated[dict[Name, ArmSection], Field(min_length=1)]
    axes: dict[Name, AxisSection] = Field(default_factory=dict)
    evaluation: EvaluationSection | None = None
    results: ResultsSection = Field(default_factory=ResultsSection)
    report: ReportSection = Field(default_factory=ReportSection)
    slurm: SlurmTable = Field(default_factory=dict, description="options of its jobs, as launch_slurm has them")
