"""The planner's bytes against what real ranks hand to torch.distributed in a step, by kind and size of group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines.made_rows import TRAIN, microbatches, tiny_shape
from models.tensor_cases import SHAPES
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape, refusals
from megatron.config.model_shape import ModelShape
from megatron.config.schema import OptimizerSection, ParallelSection
from megatron.engines.build import build_engine
from megatron.parallel.mesh import close_mesh, launched, mesh_of_group, open_mesh
from megatron.planner.communication import volumes
from megatron.planner.volume import Volume, group_of

Bytes = Counter[tuple[str, int]]
"""(kind, ranks that talk) -> bytes of the whole that is gathered, summed, exchanged or sent."""

Case = tuple[int, dict[str, Any], str, str]
"""World size, [parallel], shape, precision."""
MODELS = SHAPES | {"eight": tiny_shape()}

KINDS = {
    "allreduce": "all-reduce",
    "allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "alltoall_base": "all-to-all",
    "send": "send",
}
NOT_COUNTED = {"recv", "barrier", "recv_any_source", "monitored_barrier"}


class CountBytes(TorchDispatchMode):
    """Adds up what a rank hands to collectives of more than one rank; unknown ones are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Bytes = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._opname.strip("_")
        if function.namespace == "c10d" and name not in NOT_COUNTED:
            groups = [
                dist.ProcessGroup.unbox(arg)
                for arg in args
                if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            ]
            whole = args[1] if name == "reduce_scatter_base" else args[0]
            tensors = whole if isinstance(whole, list | tuple) else [whole]
            if groups[0].size() > 1:
                self.bytes[KINDS[name], groups[0].size()] += sum(t.numel() * t.element_size() for t in tensors)
        return function(*args, **(kwargs or {}))


def counted(world_size: int, cases: Sequence[Case]) -> list[tuple[int, Bytes]]:
    """Of each case (pipeline rank, what a second step sends: whatever a first one sets up is left out)."""
    found = []
    open_mesh(Layout(shard=world_size), launched(), 60)
    for _, parallel, shape, precision in cases:
        section = ParallelSection(**parallel)
        mesh = mesh_of_group(resolve_layout(section, world_size), torch.device("cpu"))
        engine = build_engine(MODELS[shape], OptimizerSection(), section, TRAIN, 5, precision, mesh)
        rows = [microbatches(step, mesh.data.rank, mesh.data.size, 24) for step in range(2)]
        engine.train_step(rows[0], 1e-2)
        with CountBytes() as counter:
            engine.train_step(rows[1], 1e-2)
        found.append((mesh.pipeline.rank, counter.bytes))
    close_mesh()
    return found


def _is_group(given: Any) -> bool:
    return isinstance(given, torch.ScriptObject) and "ProcessGroup" in str(given._type())


def planned(world_size: int, parallel: dict[str, Any], shape: ModelShape, precision: str, rank: int) -> Bytes:
    """The same by the planner."""
    section = ParallelSection(**parallel)
    layout, train = resolve_layout(section, world_size), TRAIN.model_copy(update={"precision": precision})
    batch = BatchShape(24, TRAIN.global_batch_size)
    assert not refusals(section, layout, shape, train, OptimizerSection(), [batch], precision)
    found: Bytes = Counter()
    for volume in volumes(shape, section, layout, train, batch, rank):
        found[volume.kind, volume.group.size] += volume.whole * volume.count
    return found


TENSOR: dict[str, Any] = {"tensor": 2}
SEQUENCE = TENSOR | {"sequence": True}
FULL: dict[str, Any] = {"recompute": "full"}
OPERATIONS: dict[str, Any] = {"recompute": "selective", "recompute_policy": "operations"}
SELECTIVE: dict[str, Any] = {"recompute": "selective"}
CASES: list[Case] = [
    (2, TENSOR, "eight", "fp32"),
    (2, SEQUENCE, "eight", "bf16"),
    (2, SEQUENCE | FULL, "eight", "fp32"),
    (2, SEQUENCE | FULL | {"recompute_layers": 3}, "eight", "fp32"),
    (2, TENSOR | FULL, "dropout", "fp32"),
    (2, SEQUENCE | OPERATIONS, "eight", "bf16"),
    (2, SEQUENCE | SELECTIVE, "eight", "bf16"),
    (2, SEQUENCE | FULL, "both norms, offset, multipliers", "fp32"),
    (2, SEQUENCE, "olmo2, one key head", "fp32"),
    (2, SEQUENCE | FULL, "olmo2", "fp64"),
    (2, SEQUENCE, "gpt2", "fp32"),
    (2, TENSOR | FULL, "neox", "fp32"),
    (2, {"context": 2}, "eight", "bf16"),
    (2, {"context": 2} | SELECTIVE, "eight", "fp32"),
    (2, {"context": 2} | FULL, "eight", "fp32"),
    (2, {"context": 2, "context_method": "gather"} | SELECTIVE, "eight", "bf16"),
    (2, {"context": 2, "context_method": "gather"}, "one key head, untied", "fp32"),
    (2, {}, "eight", "bf16"),
    (2, {"data_shard": "optimizer"}, "eight", "bf16"),
    (2, {"data_shard": "gradients"}, "eight", "bf16"),
    (2, {"data_shard": "full"}, "eight", "bf16"),
    (2, {"data_shard": "full"} | FULL, "eight", "fp32"),
    (2, {"pipeline": 2}, "eight", "bf16"),
    (2, {"pipeline": 2, "schedule": "interleaved"}, "eight", "fp32"),
    (2, {"pipeline": 2, "schedule": "zero-bubble"}, "eight", "fp32"),
    (2, {"pipeline": 2, "schedule": "zbv"}, "eight", "fp32"),
    (4, {"pipeline": 2, "data_shard": "full"}, "eight", "bf16"),
    (4, {"pipeline": 2, "schedule": "interleaved", "data_shard": "full"}, "eight", "bf16"),
    (4, {"pipeline": 2, "data_shard": "gradients"}, "eight", "bf16"),
    (4, {"pipeline": 2}, "one key head, untied", "bf16"),
    (4, {"data_shard": "full", "data_replicate": 2}, "eight", "bf16"),
    (4, {"data_shard": "optimizer", "data_replicate": 2}, "eight", "fp32"),
    (4, SEQUENCE | {"data_shard": "full"}, "eight", "bf16"),
    (4, SEQUENCE | {"pipeline": 2, "schedule": "zero-bubble"} | FULL, "eight", "fp32"),
    (4, SEQUENCE | {"context": 2, "data_shard": "none"}, "four key heads, biases, untied", "bf16"),
    (4, {"context": 2, "data_shard": "full"}, "eight", "bf16"),
    (4, {"tensor": 4, "sequence": True}, "one key head, biases", "fp32"),
]


@pytest.fixture(scope="module")
def sent() -> dict[int, list[tuple[Case, int, Bytes]]]:
    """By world size, of every rank and case."""
    found: dict[int, list[tuple[Case, int, Bytes]]] = {}
    for size in (2, 4):
        cases = [case for case in CASES if case[0] == size]
        ranks = run_ranks(size, counted, size, cases, timeout=240)
        found[size] = [(case, *result) for results in ranks for case, result in zip(cases, results, strict=True)]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_that_ranks_send(case: Case, sent: dict[int, list[tuple[Case, int, Bytes]]]) -> None:
    world_size, parallel, shape, precision = case
    ranks = [(rank, found) for which, rank, found in sent[world_size] if which == case]
    assert len(ranks) == world_size
    for rank, found in ranks:
        assert planned(world_size, parallel, MODELS[shape], precision, rank) == found


def test_where_messages_leave_the_node() -> None:
    """128 ranks on nodes of 8: pipeline 2 x data 8 x context 2 x tensor 4, counted rank by rank."""
    layout = Layout(pipeline=2, shard=8, context=2, tensor=4)
    for size, stride, across in ((4, 1, False), (2, 4, False), (16, 4, True), (2, 64, True)):
        group = group_of(size, stride, 8)
        nodes = [rank // 8 for rank in range(0, size * stride, stride)]
        assert group.inside_node == (len(set(nodes)) == 1) == (not across)
        assert group.per_node == nodes.count(0)
    assert layout.world_size == 128
    assert not group_of(3, 2, 8).inside_node  # six of eight: the second group straddles
    section = ParallelSection(pipeline=2, context=2, tensor=4, sequence=True, data_shard="full")
    train = TRAIN.model_copy(update={"global_batch_size": 64})
    found = volumes(
        tiny_shape(num_attention_heads=8, num_key_value_heads=8), section, layout, train, BatchShape(64, 64)
    )
    assert {(v.axis, v.inside_node) for v in found} == {
        ("tensor", True),
        ("context", True),
        ("pipeline", False),
        ("data", False),
        ("everyone", False),
    }


def test_bytes_of_a_ring() -> None:
    """Of n ranks each sends (n - 1) / n of what is gathered or reduced, twice that for an all-reduce."""
    group = group_of(8, 1, 8)
    rates = {kind: Volume("data", kind, 800, 3, group).bytes_a_rank for kind in RATES}
    assert rates == RATES


RATES: dict[Any, float] = {
    "all-gather": 2100,
    "reduce-scatter": 2100,
    "all-to-all": 2100,
    "all-reduce": 4200,
    "send": 2400,
}
