"""The model of a checkpoint against that of the config that resumes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.config.errors import ChangedPastError
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.trainer.resume import check_shape

YOUNGER = ("qk_norm", "norm_place", "position_embedding", "rope_scaling", "sliding_window", "hidden_dropout")


def shape_of(longest: int = 64, **fields: Any) -> ModelShape:
    return resolve_model(ModelSection(preset="llama-tiny", seq_length=64, **fields), 100, longest)


def resumed(then: dict[str, Any], now: ModelShape) -> None:
    check_shape(SimpleNamespace(state={"model": then}, path=Path("step-1")), now)  # type: ignore[arg-type]


def test_a_checkpoint_of_before_the_families_goes_on() -> None:
    then = {name: value for name, value in shape_of().to_json().items() if name not in YOUNGER}
    resumed(then, shape_of())
    resumed(then, shape_of(longest=640))
    with pytest.raises(ChangedPastError, match="qk_norm was none and is now head"):
        resumed(then, shape_of(qk_norm="head"))


def test_rows_of_learned_positions_are_weights() -> None:
    learned = shape_of(position_embedding="learned")
    resumed(learned.to_json(), learned)
    with pytest.raises(ChangedPastError, match="max_position_embeddings was 64 and is now 80"):
        resumed(learned.to_json(), shape_of(position_embedding="learned", max_position_embeddings=80))
