"""What is allowed of a layout and worth a word."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import notes_of_layout
from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection, ParallelSection

MODEL = {"hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4}
SHAPE = resolve_model(ModelSection(seq_length=64, intermediate_size=256, **MODEL), 320)

NOTES: list[tuple[dict[str, Any], int, str]] = [
    ({"pipeline": 2, "data_shard": "gradients"}, 4, "gradients saves no more than optimizer under a pipeline"),
    ({"data_shard": "full"}, 1, "data_shard = full cuts nothing"),
    ({"tensor": 12, "data_shard": "none"}, 12, "more than the 8 processes of a node"),
    ({"tensor": 12}, 12, "4 key-value heads over parallel.tensor 12"),
    ({"pipeline": 2, "recompute": "full", "recompute_layers": 5}, 2, "no stage has more than 4"),
]


@pytest.mark.parametrize(("parallel", "processes", "words"), NOTES)
def test_notes(parallel: dict[str, Any], processes: int, words: str) -> None:
    section = ParallelSection.model_validate(parallel)
    notes = notes_of_layout(section, resolve_layout(section, processes), SHAPE)
    assert any(words in note for note in notes), notes


def test_a_plain_layout_has_no_notes() -> None:
    section = ParallelSection(tensor=2, pipeline=2, data_shard="optimizer")
    assert notes_of_layout(section, resolve_layout(section, 8), SHAPE) == []
