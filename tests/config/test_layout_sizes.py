"""Which sizes are said to fit, against what torch's schedules and the context attention themselves take."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.config.layout_sizes import MICROBATCHES, sequence_refusals, tensor_refusals, tensor_sizes
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, ParallelSection


def shape_of(vocabulary: int = 320, **over: Any) -> ModelShape:
    model = {"hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4}
    return resolve_model(ModelSection(seq_length=64, **(model | {"intermediate_size": 256} | over)), vocabulary)


def test_tensor_sizes_are_those_that_pass() -> None:
    assert tensor_sizes(shape_of()) == [1, 2, 4]
    # two key-value heads serve 4 ranks, each held by two of them
    assert tensor_sizes(shape_of(num_attention_heads=8, num_key_value_heads=2)) == [1, 2, 4, 8]
    for groups, vocabulary in product((1, 2, 3, 4, 6, 12), (320, 384)):
        shape = shape_of(vocabulary, num_key_value_heads=groups, intermediate_size=192)
        assert tensor_sizes(shape) == [size for size in range(1, 13) if not list(tensor_refusals(size, shape))]


def torch_takes(schedule: str, virtual: int) -> Callable[[int, int], bool]:
    """Whether torch's constructor, which lays out the whole order of actions, takes such numbers."""
    from torch.distributed.pipelining.schedules import _PipelineSchedule
    from torch_schedules import made_schedule

    def takes(count: int, pipeline: int) -> bool:
        try:
            made: _PipelineSchedule = made_schedule(schedule, pipeline, virtual, count)
        except ValueError:
            return False
        return made is not None

    return takes


@pytest.mark.parametrize(
    ("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1), ("zbv", 2)]
)
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_microbatches_that_pass_are_those_that_torch_takes(schedule: str, virtual: int, pipeline: int) -> None:
    takes = torch_takes(schedule, virtual)
    for count in range(pipeline, 4 * pipeline + 3):
        assert MICROBATCHES[schedule](count, pipeline) == takes(count, pipeline), count
    assert not any(MICROBATCHES[schedule](count, pipeline) for count in range(1, pipeline))


def test_context_sizes_are_those_of_the_attention() -> None:
    from megatron.parallel.axis import Axis
    from megatron.parallel.context_attention import choose_method, local_positions

    for tensor, context, method in (
        (1, 2, "auto"),
        (1, 8, "auto"),
        (4, 2, "auto"),
        (2, 2, "gather"),
        (1, 4, "all-to-all"),
    ):
        for length in range(8, 70):
            axis = Axis(0, context)
            section = ParallelSection.model_validate({"tensor": tensor, "context": context, "context_method": method})
            found = list(sequence_refusals(section, shape_of(), length))
            try:
                local_positions(length, axis, choose_method(method, max(1, 4 // tensor), axis)[0])
            except ConfigError:
                assert found, (tensor, context, method, length)
            else:
                assert not found, (tensor, context, method, length, found)
