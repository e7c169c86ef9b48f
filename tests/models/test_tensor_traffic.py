"""What a forward and a backward pass send over the tensor axis, to the byte, against Megatron-LM's formulas.

Per layer and microbatch of b x s tokens, width h (Korthikanti et al., arXiv 2205.05198, section 4.2.2): without
sequence parallel 4 all-reduces of b s h numbers; with it 4 all-gathers and 4 reduce-scatters of as many, and 2 more
all-gathers of what was not kept for the backward pass. Around the layers: the embedding's sum (its gradient is
gathered under sequence), the head's input gathered (under sequence) and its gradient summed, and for each row of each
chunk of the loss three float32 (float64) numbers from each rank.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist
from models.tensor_cases import CHUNK_ROWS, LENGTH, SHAPES, Case, run_case
from ranks import run_ranks
from torch import Tensor

from megatron.config.layout import Layout
from megatron.kernels import cross_entropy
from megatron.kernels.collectives import ALL_GATHER, REDUCE_SCATTER
from megatron.parallel.mesh import close_mesh, launched, open_mesh

Traffic = Counter[tuple[str, int]]
"""(operation, bytes of the whole that it makes or sums) -> how often."""


def record(sent: Traffic) -> None:
    """Counts every collective of this process from now on; those that the model has no use for are refused."""

    def counted(name: str, whole: int) -> None:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = args[whole]
            sent[name, tensor.numel() * tensor.element_size()] += 1
            return original(*args, **kwargs)

        setattr(dist, name, call)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective that is not counted")

    for name, whole in (("all_reduce", 0), (ALL_GATHER, 0), (REDUCE_SCATTER, 1)):
        counted(name, whole)
    for name in ("all_gather", "reduce_scatter", "broadcast", "all_to_all_single", "all_to_all", "send", "recv"):
        setattr(dist, name, refused)


def traffic_of(cases: list[Case], tensor: int) -> list[tuple[Traffic, Traffic]]:
    cross_entropy.CHUNK_ROWS = CHUNK_ROWS
    mesh = open_mesh(Layout(tensor=tensor), launched(), 60)
    sent: Traffic = Counter()
    record(sent)
    found = []
    for case in cases:
        sent.clear()
        run_case(dataclasses.replace(case, training=False), mesh.tensor)
        evaluated = Counter(sent)
        sent.clear()
        run_case(dataclasses.replace(case, evaluation=False), mesh.tensor)
        found.append((Counter(sent), evaluated))
    close_mesh()
    return found


def expected(case: Case, tensor: int) -> tuple[Traffic, Traffic]:
    """Of a training pass, and of one without gradients."""
    shape, rows = SHAPES[case.shape], case.rows * LENGTH
    layers, stream = shape.num_hidden_layers, rows * shape.hidden_size * 8
    training: Traffic = Counter()
    if case.sequence:
        gathered_again = 0 if case.split_backward else 2 * layers
        training[ALL_GATHER, stream] = 4 * layers + gathered_again + 2
        training[REDUCE_SCATTER, stream] = 4 * layers + 2
        evaluation: Traffic = Counter({(ALL_GATHER, stream): 2 * layers + 1})
        evaluation[REDUCE_SCATTER, stream] = 2 * layers + 1
    else:
        training["all_reduce", stream] = 4 * layers + 2
        evaluation = Counter({("all_reduce", stream): 2 * layers + 1})
    if shape.qk_norm == "width":  # a sum of squares for each token's query and key, and its slope
        training["all_reduce", rows * 2 * 8] += 2 * layers
        evaluation["all_reduce", rows * 2 * 8] += layers
    chunks: Traffic = Counter()
    for start in range(0, rows, CHUNK_ROWS):
        chunks[ALL_GATHER, min(CHUNK_ROWS, rows - start) * tensor * 3 * 8] += 1
    whole = Counter({(ALL_GATHER, rows * tensor * 3 * 8): 1})
    return training + (whole if case.split_backward else chunks), evaluation + chunks


CASES = [
    Case(shape, rows, sequence, split)
    for shape in ("two key heads, tied", "one key head, biases", "neox", "qwen3", "olmo2, one key head", "gpt2")
    for rows, sequence, split in ((3, False, False), (3, True, False), (1, True, True), (1, False, True))
]


@pytest.mark.parametrize("tensor", [2, 4])
def test_collectives_are_those_of_the_formulas(tensor: int) -> None:
    for found in run_ranks(tensor, traffic_of, CASES, tensor):
        for case, (training, evaluation) in zip(CASES, found, strict=True):
            assert (training, evaluation) == expected(case, tensor), case
