"""The table [spikes]: what a run does about a step whose loss or gradient norm leaps above the steps before it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron.config.section import Section


class SpikesSection(Section):
    """Loss spikes: left alone, skipped, or rolled back from. A bound is judged before the update, on all ranks alike.

    Source of "skip" and of its defaults, 6 deviations over 128 steps: OLMo-core's SkipStepOptimizer. Source of
    "roll-back": PaLM (arXiv 2204.02311, section 5.1), which began again some 100 steps before a spike and passed over
    some 200 to 500 batches, those before and during the spike among them.
    """

    policy: Literal["none", "skip", "roll-back"] = Field(
        "none",
        description="skip: such a step makes no update · roll-back: training goes on from some steps before it, and "
        "batches around it are passed over",
    )
    of: tuple[Literal["loss", "grad_norm"], ...] = Field(("loss", "grad_norm"), min_length=1, description="what leaps")
    window: int = Field(128, ge=4, description="steps before that a step is compared with; none is while half are few")
    deviations: float = Field(6.0, gt=0, description="above the window's median that is a spike")
    warm_up: int = Field(0, ge=0, description="first steps of the run that are never a spike")
    at_most: int = Field(5, ge=0, description="spikes within so many steps; one more ends the run")
    within: int = Field(1000, ge=1, description="steps over which at_most counts")
    back: int = Field(100, ge=1, description="roll-back: training goes on from so many steps before the spike")
    pass_over: int = Field(300, ge=1, description="roll-back: batches from there on that are not trained on")

    @model_validator(mode="after")
    def _check(self) -> SpikesSection:
        if len(set(self.of)) != len(self.of):
            raise ValueError(f"of = {list(self.of)} names one thing twice")
        if self.pass_over < self.back:
            raise ValueError(
                f"pass_over {self.pass_over} is below back {self.back}: the spike itself would be trained on again: "
                f"set spikes.pass_over to at least {self.back}"
            )
        return self


def check_spikes(section: SpikesSection, checkpoint_every: int, keep: int) -> None:
    """Raises ValueError where the checkpoints that are kept never reach as far back as a roll-back goes."""
    reach = (keep - 1) * checkpoint_every
    if section.policy == "roll-back" and reach < section.back:
        raise ValueError(
            f"spikes.back {section.back}: just after a save, checkpoint.keep {keep} x checkpoint.every "
            f"{checkpoint_every} reaches {reach} steps back, and a roll-back begins at a checkpoint: set "
            f"checkpoint.keep to {-(-section.back // checkpoint_every) + 1}, or a larger checkpoint.every"
        )
