"""A stage's backward pass in two, inputs first and weights later, as zero-bubble schedules run it, on tensor ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from models.tensor_cases import LENGTH, SHAPES, make_decoder, microbatch
from models.test_tensor_traffic import Traffic, record
from ranks import run_ranks
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from megatron.config.layout import Layout
from megatron.parallel.axis import ALONE, Axis
from megatron.parallel.mesh import close_mesh, launched, open_mesh
from megatron.parallel.model_place import ModelPlace

STAGES = {"middle": (range(1), False), "last": (range(1, 2), True)}


def gradients_of(shape: str, stage: str, axis: Axis, sequence: bool, apart: bool) -> dict[str, np.ndarray]:
    layers, last = STAGES[stage]
    place = ModelPlace(tensor=axis, sequence=sequence, layers=layers, first=False, last=last, split_backward=True)
    model = make_decoder(SHAPES[shape], "blockwise", place)
    _, targets, documents = microbatch(2, SHAPES[shape].vocab_size)
    length = LENGTH // axis.size if sequence else LENGTH
    generator = torch.Generator().manual_seed(axis.rank if sequence else 0)
    x, upstream = torch.randn(2, 2, length, SHAPES[shape].hidden_size, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    out = model(x, documents, targets, 0.25)[0] if last else model(x, documents)
    given = None if last else [upstream]
    if apart:
        inputs, groups = stage_backward_input([out], given, [x], model.parameters())
        stage_backward_weight(model.parameters(), groups)
        assert torch.equal(inputs[0], x.grad)
    else:
        out.backward(None if last else upstream)
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found | {"x": x.grad.numpy()}


def compared(tensor: int) -> list[tuple[Any, ...]]:
    mesh = open_mesh(Layout(tensor=tensor), launched(), 60) if tensor > 1 else None
    axis = mesh.tensor if mesh else ALONE
    sent: Traffic = Counter()
    record(sent)
    found = []
    for shape in ("one key head, biases", "one key head, untied", "neox", "qwen3", "olmo2", "olmo2, one key head"):
        for stage in STAGES:
            for sequence in (False, True)[:tensor]:
                results = []
                for apart in (False, True):
                    sent.clear()
                    results.append((gradients_of(shape, stage, axis, sequence, apart), Counter(sent)))
                found.append((shape, stage, sequence, *results))
    if mesh:
        close_mesh()
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_inputs_first_and_weights_later_give_the_same(tensor: int) -> None:
    for rank in run_ranks(tensor, compared, tensor):
        for shape, stage, sequence, (whole, sent), (apart, sent_apart) in rank:
            assert whole.keys() == apart.keys()
            for name, gradient in whole.items():
                np.testing.assert_allclose(
                    apart[name], gradient, rtol=1e-12, atol=1e-14, err_msg=f"{shape} {stage} {sequence} {name}"
                )
            assert sent == sent_apart, "a collective was run again, or left out"
