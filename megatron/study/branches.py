"""What an arm that branches from another's checkpoint cannot change, told before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.study.identity import model_document, tokenizer_word
from megatron.study.steps import AverageStep, Step, TrainStep, trained
from megatron.study.what_counts import counted


def check_branch(before: Step, step: TrainStep, where: str) -> None:
    """Raises ConfigError where the first training stage of a branch, or one after an average, cannot go on from what is
    before it: another tokenizer, vocabulary, model or validation split, or an optimizer whose state it has not got.

    where: FILE:LINE and the arm, for messages.
    """
    behind = trained(before)[-1]
    _check_past(behind.config, behind.run.schedule.stages, step, where, f"{before.arm}/{before.label}")
    if step.section.take.optimizer != "continue":
        return
    if isinstance(before, AverageStep):
        raise ConfigError(
            f"{where}: stage {step.label!r} goes on from {before.label!r}, which averages weights and has no optimizer "
            f'state: set stages.{step.label}.take = {{ optimizer = "fresh" }}'
        )
    then, now = behind.config.optimizer.name, step.config.optimizer.name
    if then != now:
        raise ConfigError(
            f"{where}: optimizer.name = {now!r}, and {before.arm}/{before.label}, which it branches from, has the "
            f'state of {then!r}: set stages.{step.label}.take = {{ optimizer = "fresh" }}, or put it back'
        )


def _check_past(config: RunConfig, stages: Any, step: TrainStep, where: str, trunk: str) -> None:
    longest = max(stage.shapes.longest_sequence for stage in stages)
    mine = max(stage.shapes.longest_sequence for stage in step.run.schedule.stages)
    then = _facts(config, longest)
    now = _facts(step.config, mine)
    differences = [
        f"{key} was {_shown(key, then, config)} and is now {_shown(key, now, step.config)}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]
    if not differences:
        return
    positions = any(line.startswith("model.max_position_embeddings") for line in differences)
    remedy = f"set model.max_position_embeddings = {mine} in the base" if positions else "put it back"
    raise ConfigError(
        f"{where}: branches from {trunk} and changes what that was trained with: {'; '.join(differences)}: {remedy}, "
        "or list the arm's stages without from, and they are trained anew"
    )


def _shown(key: str, facts: Mapping[str, Any], config: RunConfig) -> str:
    if key != "tokenizer.path":
        return str(facts.get(key))
    word = str(facts[key])
    return f"{config.tokenizer.path} ({'not there yet' if word.startswith('planned:') else word[:12]})"


def _facts(config: RunConfig, longest: int) -> Mapping[str, Any]:
    model = {f"model.{key}": value for key, value in model_document(config, longest).items()}
    return {
        "tokenizer.path": tokenizer_word(config.tokenizer.path),
        **model,
        "validation.fraction": counted("validation", config.validation)["fraction"],
    }
