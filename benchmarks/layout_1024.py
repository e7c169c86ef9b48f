"""A layout of 1,024 ranks for a model of 70B parameters, checked on one core without a GPU.

For every pipeline and tensor rank the engine's own code builds that rank's modules on the meta device, wraps them with
FSDP2 over a process group that is only pretended, gives every shard a gradient, and lets the optimizer make its state.
The bytes of those tensors must be the planner's, which come from the model's shape alone. Data ranks need no building
of their own where every first dimension divides by their number, which is checked: then all hold the same.

    python benchmarks/layout_1024.py [--pipeline 4 --data 32 --tensor 8] [--schedule interleaved]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import BatchShape, check_layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.model_parts import build_parts
from megatron.engines.sharded_weights import ShardedWeights
from megatron.kernels.choice import Kernels
from megatron.optim.build import build_optimizer
from megatron.parallel.mesh import Mesh, close_mesh, mesh_of_group
from megatron.planner.layout_bytes import RankBytes, rank_bytes, rank_tensors

LLAMA_70B = ModelSection(
    seq_length=8192,
    vocab_size=128256,
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=28672,
    rope_theta=500000.0,
)
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=int, default=4)
    parser.add_argument("--data", type=int, default=32)
    parser.add_argument("--tensor", type=int, default=8)
    parser.add_argument("--schedule", default="1f1b", choices=("1f1b", "interleaved", "zero-bubble", "zbv"))
    parser.add_argument("--data-shard", default="full", choices=("none", "optimizer", "gradients", "full"))
    args = parser.parse_args()
    imports, begin = time.process_time(), time.perf_counter()
    section = ParallelSection(
        tensor=args.tensor,
        sequence=args.tensor > 1,
        pipeline=args.pipeline,
        schedule=args.schedule,
        data_shard=args.data_shard,
    )
    layout = resolve_layout(section, args.pipeline * args.data * args.tensor)
    shape, optimizer = resolve_model(LLAMA_70B, 1), OptimizerSection()
    train = TrainSection(global_batch_size=16 * args.data)
    check_layout(section, layout, shape, train, optimizer, [BatchShape(8192, 16 * args.data)], "bf16")
    wrong = show(shape, section, layout, optimizer)
    wall, core = time.perf_counter() - begin, time.process_time() - imports
    print(f"{layout.world_size} ranks in {wall:.1f} s, {core:.1f} s of one core; imports before: {imports:.1f} s")
    return int(wrong)


def show(shape: ModelShape, section: ParallelSection, layout: Layout, optimizer: OptimizerSection) -> bool:
    """Prints a line for each pipeline rank. Whether the planner's bytes differ from some rank's."""
    print(
        f"{shape.parameter_count():,} parameters, {layout.world_size} ranks: {layout.words()}, bf16 with fp32 masters"
    )
    print("pipeline rank  ranks  parameter bytes  gradient bytes  optimizer bytes")
    whole = [0, 0, 0]
    wrong = False
    for pipeline_rank in range(layout.pipeline):
        found = list(bytes_of_tensor_ranks(shape, section, layout, optimizer, "bf16", pipeline_rank))
        planned = rank_bytes(shape, section, layout, optimizer, "bf16", pipeline_rank)
        if any(each != planned for each in found):
            print(f"  not as planned: {planned}")
            wrong = True
        ranks, one = layout.data * layout.tensor, found[0]
        row = (one.parameters, one.gradients, one.optimizer)
        whole = [total + ranks * part for total, part in zip(whole, row, strict=True)]
        print(f"{pipeline_rank:13}  {ranks:5}  {row[0]:15,}  {row[1]:14,}  {row[2]:15,}")
    print(f"{'all':>13}  {layout.world_size:5}  {whole[0]:15,}  {whole[1]:14,}  {whole[2]:15,}")
    print("every rank holds what the planner says" if not wrong else "THE PLANNER IS WRONG")
    return wrong


def bytes_of_tensor_ranks(
    shape: ModelShape,
    section: ParallelSection,
    layout: Layout,
    optimizer: OptimizerSection,
    precision: str,
    pipeline_rank: int,
) -> Iterator[RankBytes]:
    """From the real tensors of each tensor rank, on a data axis whose ranks all hold the same."""
    shards = layout.shard * layout.context if layout.shard > 1 else 1
    tensors = [item for stage in rank_tensors(shape, section, pipeline_rank) for item in stage]
    assert not any(item.rows % shards for item in tensors), "data ranks differ: build each of them"
    with pretended_mesh(layout, pipeline_rank * layout.world_size // layout.pipeline) as mesh:
        for rank in range(layout.tensor):
            # The shards' mesh serves all tensor ranks alike: only its sizes and the data coordinate count.
            yield bytes_of_rank(
                shape, section, replace(mesh, tensor=replace(mesh.tensor, rank=rank)), optimizer, precision
            )


@contextmanager
def pretended_mesh(layout: Layout, rank: int) -> Iterator[Mesh]:
    """The mesh as `rank` sees it, its tensors on the meta device; no other process is there."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        yield replace(mesh_of_group(layout, torch.device("cpu")), device=torch.device("meta"))
    finally:
        close_mesh()


def bytes_of_rank(
    shape: ModelShape, section: ParallelSection, mesh: Mesh, optimizer: OptimizerSection, precision: str
) -> RankBytes:
    """Of the tensors that one rank really holds, built as the engine builds them."""
    master = torch.float64 if precision == "fp64" else torch.float32
    parts = build_parts(shape, section, mesh, Kernels(attention="sdpa"), master, seed=0)
    weights = ShardedWeights(parts.modules, mesh, section.data_shard, _DTYPES[precision])
    parameters = {item.key: item.local for item in weights.held}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    made = build_optimizer(parameters, optimizer)
    for group in made.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = False, True  # the fused kernel is not there for the meta device
    made.step()
    state = [value for values in made.state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    return RankBytes(_bytes(parameters.values()), _bytes(gradients), _bytes(state))


def _bytes(tensors: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
