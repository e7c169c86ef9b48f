"""The table [results] of a study file: what is measured at its nodes when they are trained."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron.config.evaluation_section import HELDOUT
from megatron.config.quantities import parse_count
from megatron.config.section import Section
from megatron.study.node_results import LOSS, WIN_RATE

HARNESS = "harness"
"""The suite of a list of lm-evaluation-harness' own tasks."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Tokens = Annotated[int, BeforeValidator(partial(parse_count, of="tokens")), Field(ge=1)]
Prompts = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class LossSection(Section):
    """Loss by source on held-out documents: of every source of the study, the same documents for every node."""

    tokens: Tokens = Field(100_000, description="of each source, as far as it holds so many out")
    sources: list[str] = Field(default_factory=list, description="only these; default all that have data")


def _loss_words(value: Any) -> Any:
    """results.loss as a table, or None: true stands for an empty table, false for none."""
    if isinstance(value, bool):
        return {} if value else None
    if value is not None and not isinstance(value, dict | LossSection):
        raise ValueError('is true, false, or a table such as { tokens = "100K", sources = ["web"] }')
    return value


class SuiteSection(Section):
    """What `stagemix evaluate` may be told, in the same words."""

    name: str = Field(description="heldout, a suite's name, or what a suite of your own is called in results")
    suite: str | None = Field(None, description='default name; a suite file; "harness": tasks of lm-evaluation-harness')
    tasks: list[str] = Field(default_factory=list, description="tasks of the harness, or tasks or groups of the suite")
    include_path: str | None = Field(None, description="folder with task files (YAML) of your own")
    data: str | None = Field(None, description="folder with a suite's data files (JSON lines)")
    skip_missing: bool = Field(False, description="run what has data, and say what has none")
    online: bool = Field(False, description="let the harness fetch data sets from the network")
    allow_code_execution: bool = Field(False, description="run programs that the model writes, each behind walls")
    trust_task_code: bool = Field(False, description="run the Python code that files of include_path name")
    limit: int | None = Field(None, ge=1, description="at most so many items of a task, for a trial")
    questions: int = Field(200, ge=1, description="heldout: of each source")
    sources: list[str] = Field(
        default_factory=list, description="heldout: only these; default all with enough held-out documents"
    )
    passages: int = Field(40_000, ge=1, description="heldout: characters of each source, for bits a byte")
    samples: int = Field(1, ge=1, description="code tasks: of each problem")
    pass_at: list[int] = Field(default_factory=lambda: [1], min_length=1, description="code tasks: the k of pass@k")
    temperature: float = Field(0.0, ge=0, description="code tasks: 0 takes the likeliest token each time")
    top_p: float = Field(0.95, gt=0, le=1, description="code tasks: nucleus sampling")
    max_new_tokens: int | None = Field(None, ge=1, description="code tasks: of an answer; default what the suite says")
    program_seconds: int = Field(5, ge=1, description="code tasks: processor time of one program")
    program_memory: int = Field(1024, ge=1, description="code tasks: MiB of one program")
    jobs: int = Field(1, ge=1, description="code tasks: programs that run at a time")
    seed: int = Field(0, ge=0, description="of questions and samples")

    @property
    def of(self) -> str:
        """The suite that is run: a name or a file; "harness" for tasks by themselves."""
        return HARNESS if self.include_path else self.suite or self.name

    @model_validator(mode="after")
    def _check(self) -> SuiteSection:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name = {self.name!r} names files: letters, digits and - _ . alone; a suite file goes into suite"
            )
        if self.name in (LOSS, WIN_RATE):
            raise ValueError(f"name = {self.name!r} is the name of another part of the results: choose another")
        if self.include_path and self.suite not in (None, HARNESS):
            raise ValueError("include_path is for tasks of your own: leave it or suite out")
        if self.of == HARNESS and not self.tasks:
            raise ValueError(f"{self.name}: says no task: give tasks = [names]")
        if self.of == HELDOUT and self.tasks:
            raise ValueError('suite "heldout" has one task a source: leave tasks out')
        if self.sources and self.of != HELDOUT:
            raise ValueError(f'sources is for the suite "heldout": leave it out of {self.name}')
        if self.data and self.of in (HELDOUT, HARNESS):
            raise ValueError("data holds the files of a suite: leave it out, or name the suite")
        if (most := max(self.pass_at)) > self.samples or min(self.pass_at) < 1:
            raise ValueError(f"pass_at = {most}: each is between 1 and samples, which is {self.samples}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 are all the same at temperature 0: say, for example, temperature = 0.2")
        return self


class SamplesSection(Section):
    """What nodes go on to say, in the words of `stagemix generate`."""

    prompts: Prompts = Field(description='a list, or a file: .jsonl with {"prompt": …}, else a prompt a line')
    max_new_tokens: int = Field(64, ge=1)
    samples: int = Field(1, ge=1, description="answers to each prompt")
    temperature: float = Field(0.8, ge=0, description="0: the likeliest token each time")
    top_k: int = Field(0, ge=0, description="only the K likeliest tokens; 0: all")
    top_p: float = Field(0.95, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="texts that end an answer"
    )
    begin_with: str | None = Field(None, description="a special token before each prompt")
    seed: int = Field(0, ge=0)


class WinRateSection(Section):
    """A judge between the end of each arm and the end of the baseline with the same seed."""

    prompts: Prompts = Field(description='a list, or a file: .jsonl with {"prompt": …}, else a prompt a line')
    judge: str | None = Field(None, min_length=1, description="a command line, run without a shell")
    judge_model: str | None = Field(None, min_length=1, description="a Hugging Face folder: fewer bits a byte wins")
    judge_seconds: float = Field(3600, gt=0, description="for the judging of one node")
    max_new_tokens: int = Field(128, ge=1, description="of an answer")
    temperature: float = Field(0.0, ge=0, description="0: the likeliest token each time")
    top_p: float = Field(0.95, gt=0, le=1)
    begin_with: str | None = Field(None, description="a special token before each prompt")
    seed: int = Field(0, ge=0, description="of answers and of shuffling")

    @model_validator(mode="after")
    def _check(self) -> WinRateSection:
        if (self.judge is None) == (self.judge_model is None):
            raise ValueError('give one of judge = "COMMAND" and judge_model = "FOLDER"')
        return self


class ResultsSection(Section):
    """What is measured, and at which nodes. Files are relative to the study file."""

    nodes: Literal["ends", "all"] = Field("ends", description="ends of arms, or every training stage and average")
    loss: Annotated[LossSection | None, BeforeValidator(_loss_words)] = Field(
        default_factory=LossSection, description="true, false or a table: by source, on held-out documents"
    )
    suites: list[SuiteSection] = Field(default_factory=list, description="each as { name = … }")
    samples: SamplesSection | None = Field(None, description="generated texts")
    win_rate: WinRateSection | None = Field(None, description="against the baseline")
    export_dtype: Literal["float32", "bfloat16", "float16", "keep"] = Field(
        "float32", description="of exported weights"
    )
    device: str = Field("cpu", description='"cpu", "cuda", "cuda:1"')
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the computation")
    batch_size: int = Field(32, ge=1, description="sequences at a time")
    threads: int = Field(0, ge=0, description="of the evaluating process; 0: as many as it is given")

    @property
    def loss_of(self) -> LossSection | None:
        """How losses by source are measured; None where they are not."""
        return self.loss or None

    @model_validator(mode="after")
    def _check(self) -> ResultsSection:
        names = [suite.name for suite in self.suites]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"suites: {twice[0]} is there twice: give one of them another name, and suite = {twice[0]!r}"
            )
        return self
