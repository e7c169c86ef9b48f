"""The table [evaluation]: tasks of lm-evaluation-harness on the run's own checkpoints while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron.config.section import Section

HELDOUT = "heldout"


class EvaluationSection(Section):
    """Tasks on checkpoints, at stage ends or every so many steps. Off until a suite or tasks are named."""

    suite: str | None = Field(None, description='"heldout", a suite\'s name, or a suite file of your own')
    tasks: list[str] = Field(default_factory=list, description="tasks of the harness, or tasks or groups of the suite")
    include_path: str | None = Field(None, description="folder with task files (YAML) of your own")
    data: str | None = Field(None, description="folder with a suite's data files (JSON lines)")
    skip_missing: bool = Field(False, description="of a suite, run what has data, and say what has none")
    online: bool = Field(False, description="let the harness fetch data sets from the network")
    allow_code_execution: bool = Field(False, description="run programs that the model writes, each behind walls")
    limit: int | None = Field(None, ge=1, description="at most so many items of a task")
    questions: int = Field(200, ge=1, description="heldout: of each source")
    passages: int = Field(40_000, ge=1, description="heldout: characters of each source, for bits a byte")
    at_stage_ends: bool = Field(True, description="the checkpoint at the end of each training stage")
    every: int = Field(0, ge=0, description="steps, a multiple of checkpoint.every; 0: none between stage ends")
    where: Literal["here", "beside", "queue"] = Field(
        "beside",
        description="here: training waits · beside: by a process beside rank 0 while training goes on · queue: by a "
        "side job, stagemix evaluate --serve OUTPUT",
    )
    device: str = Field("cpu", description='"cpu", "cuda", "cuda:1", as the evaluating process counts devices')
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: int = Field(32, ge=1, description="sequences at a time")
    threads: int = Field(0, ge=0, description="of the evaluating process; 0: as many as it is given")
    niceness: int = Field(10, ge=0, le=19, description="beside: how far it stands back for training")
    seconds: int = Field(14_400, ge=0, description="an evaluation that takes longer has failed; 0: no limit")
    wait_seconds: int = Field(3600, ge=0, description="beside: how long the end of the run waits for evaluations")
    backlog: int = Field(4, ge=1, description="checkpoints between stage ends that are held for it at most")
    required: bool = Field(False, description="here: an evaluation that fails ends the run")

    @property
    def named(self) -> bool:
        """Whether anything is to be evaluated."""
        return bool(self.suite or self.tasks)

    @model_validator(mode="after")
    def _check(self) -> EvaluationSection:
        if not self.named:
            if self.every or self.required:
                raise ValueError('says when, and not what: set evaluation.suite, for example "heldout", or tasks')
            return self
        if not self.at_stage_ends and not self.every:
            raise ValueError("is for no checkpoint: set evaluation.every, or at_stage_ends = true")
        if self.suite == HELDOUT and self.tasks:
            raise ValueError('suite = "heldout" has one task a source: leave evaluation.tasks out')
        if self.suite and self.include_path:
            raise ValueError("include_path is for tasks of your own: leave it or evaluation.suite out")
        if self.data and self.suite in (None, HELDOUT):
            raise ValueError("data holds the files of a suite: name it, evaluation.suite")
        if self.required and self.where != "here":
            raise ValueError(f'required is for where = "here", and where is "{self.where}": training would not wait')
        return self


def check_evaluation(section: EvaluationSection, checkpoint_every: int, holds_out: bool) -> None:
    """Raises ValueError for what does not fit the rest of the run. holds_out: whether it has held-out documents."""
    if over := section.every % checkpoint_every:
        above = section.every - over + checkpoint_every
        near = [str(number) for number in (section.every - over, above) if number]
        raise ValueError(
            f"evaluation.every {section.every} is not a multiple of checkpoint.every {checkpoint_every}, and what is "
            f"evaluated is a checkpoint: set evaluation.every to {' or '.join(near)}, or checkpoint.every to a divisor "
            f"of {section.every}"
        )
    if section.suite == HELDOUT and not holds_out:
        raise ValueError(
            'evaluation.suite "heldout" asks about held-out documents, and validation.fraction is 0: set it, for '
            "example to 0.005, or name another suite"
        )
