"""The planner's step times beside real steps of this machine, on one and two processes of one thread each.

The machine is calibrated first, as an accelerator: matrix products of two sizes, the elementwise operations of a
layer, attention, and a sum over two processes. Then real engines take real steps, and the planner predicts them from
that and from the shapes alone. Everything is counted in processor seconds of a process, which others on the machine
disturb little; time in which a process waits for another is in none of it, so that a pipeline's bubble is left out on
both sides.

    python benchmarks/planner_time.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from microbatch import Micro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.layout import resolve_layout
from megatron.config.layout_checks import BatchShape
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.engines.host_memory import keep_freed_memory
from megatron.kernels.attention_blockwise import attention_blockwise, plan_blocks
from megatron.kernels.choice import Kernels
from megatron.kernels.rms_norm import add_rms_norm
from megatron.kernels.swiglu import gated
from megatron.parallel.mesh import close_mesh, launched, one_process_mesh, open_mesh
from megatron.planner.hardware import Accelerator, Efficiency
from megatron.planner.operations import Rows, layer_operations
from megatron.planner.step_time import step_time

HIDDEN, INNER, HEADS, LENGTH = 256, 704, 8, 512
VOCABULARY = 4096


@dataclass(frozen=True)
class Case:
    """A layout and a shape to measure."""

    name: str
    processes: int
    parallel: dict[str, Any]
    hidden: int = HIDDEN
    layers: int = 4
    length: int = LENGTH
    rows: int = 2
    batch: int = 8


CASES = (
    Case("one process", 1, {}),
    Case("one process, width 512", 1, {}, hidden=512, layers=2),
    Case("one process, T 1024", 1, {}, length=1024, rows=1, batch=4),
    Case("recompute full", 1, {"recompute": "full"}),
    Case("data 2", 2, {}),
    Case("data 2, full shard", 2, {"data_shard": "full"}),
    Case("tensor 2", 2, {"tensor": 2}),
    Case("tensor 2 with sequence", 2, {"tensor": 2, "sequence": True}),
    Case("context 2", 2, {"context": 2}),
    Case("pipeline 2", 2, {"pipeline": 2}),
)


def processor_seconds(call: Callable[[], object], rounds: int) -> float:
    """The median of a call, after one that does not count."""
    call()
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def shape_of(case: Case) -> ModelShape:
    """A Llama of the case's sizes."""
    section = ModelSection(
        seq_length=case.length,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        intermediate_size=case.hidden * INNER // HIDDEN,
    )
    return resolve_model(section, VOCABULARY)


def product_rate(size: int, rounds: int) -> float:
    """Operations a second of float32 products of square matrices."""
    first, second = torch.randn(size, size), torch.randn(size, size)
    repeat = max(1, 2 * 10**8 // size**3)

    def call() -> None:
        for _ in range(repeat):
            torch.mm(first, second)

    return 2.0 * size**3 * repeat / processor_seconds(call, rounds)


def elementwise_rate(rounds: int) -> float:
    """Bytes a second, by the planner's count, of a norm with its addition and a gated activation, both passes."""
    rows = 1024
    x, branch = (torch.randn(1, rows, HIDDEN, requires_grad=True) for _ in range(2))
    gate, up = (torch.randn(1, rows, INNER, requires_grad=True) for _ in range(2))
    weight = torch.ones(HIDDEN, requires_grad=True)

    def call() -> None:
        normed, total = add_rms_norm(x, branch, weight, 1e-5)
        (normed.sum() + total.sum() + gated(gate, up, "silu").sum()).backward()

    return 4 * rows * ((4 + 4) * HIDDEN + (3 + 5) * INNER) / processor_seconds(call, rounds)


def attention_rate(shape: ModelShape, length: int, rounds: int) -> float:
    """Operations a second of a layer's attention, both passes, by the planner's count."""
    size, groups = shape.head_dim, shape.num_key_value_heads
    query = torch.randn(1, groups, length, HEADS // groups, size, requires_grad=True)
    key, value = (torch.randn(1, groups, length, 1, size, requires_grad=True) for _ in range(2))
    blocks = plan_blocks(torch.zeros(1, length, dtype=torch.int64), torch.float32)

    def call() -> None:
        attention_blockwise(query, key, value, blocks).sum().backward()

    counted = sum(
        one.flops for one in layer_operations(shape, Rows(length, length, length, 4)) if one.kind == "attention"
    )
    return counted / processor_seconds(call, rounds)


def link_rate(rounds: int) -> tuple[float, float]:
    """(bytes a second that a process sends in a sum over two, seconds that a sum of nothing takes)."""
    dist.init_process_group("gloo")
    large, small = torch.randn(1 << 20), torch.randn(1)
    each = [
        processor_seconds(lambda one=one: [dist.all_reduce(one) for _ in range(8)], rounds) / 8
        for one in (large, small)
    ]
    dist.destroy_process_group()
    return 4 * large.numel() / each[0], each[1]


def calibrate(rounds: int) -> tuple[Accelerator, Efficiency]:
    """This machine's thread as an accelerator whose data sheet is what it reached."""
    (sent, latency), _ = on_ranks(2, link_rate, rounds)
    small, large = product_rate(96, rounds), product_rate(768, rounds)
    # rate(n) = peak / (1 + 3 half / n) at two sizes
    half = max(0.0, (large - small) / (3 * (small / 96 - large / 768)))
    peak = large * (1 + 3 * half / 768)
    shape = shape_of(CASES[0])
    short, long = attention_rate(shape, 256, rounds), attention_rate(shape, 1024, rounds)
    offset = max(0.0, (long - short) / (short / 256 - long / 1024))
    attended = long * (1 + offset / 1024) * (1 + 32 / shape.head_dim) / 1.25
    machine = Accelerator(
        "one thread of this machine", 1 << 34, peak, peak, elementwise_rate(rounds), sent, sent, 2, "measured here"
    )
    by = Efficiency(
        products=1.0,
        half_size=half,
        attention=min(1.0, attended / peak),
        attention_half_length=offset,
        memory=1.0,
        links=1.0,
        network=1.0,
        latency=latency,
        overlap=0.0,  # processor seconds are spent, whatever they run beside
        layer_launch=0.0,
        words="measured here",
    )
    return machine, by


def batch_of(case: Case, rank: int, size: int) -> list[Micro]:
    """A data rank's microbatches."""
    drawn = torch.Generator().manual_seed(rank)
    made = []
    for number in range(case.batch // size // case.rows):
        tokens = torch.randint(0, VOCABULARY, (case.rows, case.length + 1), generator=drawn)
        whole = torch.zeros(case.rows, case.length, dtype=torch.int32)
        sources, numbers = torch.zeros(case.rows, dtype=torch.int64), torch.arange(case.rows) + number * case.rows
        made.append(Micro(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), whole, sources, numbers))
    return made


def measured(case: Case, rounds: int) -> tuple[float, float]:
    """(processor seconds of a step in this process, wall seconds)."""
    keep_freed_memory()
    section = ParallelSection(**case.parallel)
    layout = resolve_layout(section, case.processes)
    mesh = open_mesh(layout, launched(), 600) if case.processes > 1 else one_process_mesh()
    train = TrainSection(global_batch_size=case.batch, micro_batch_size=case.rows, precision="fp32")
    kernels = Kernels(attention="blockwise")
    engine = build_engine(shape_of(case), OptimizerSection(), section, train, 1, "fp32", mesh, kernels=kernels)
    batch = batch_of(case, mesh.data.rank, mesh.data.size)
    walls = []

    def call() -> None:
        begin = time.perf_counter()
        engine.train_step(batch, 1e-4)
        walls.append(time.perf_counter() - begin)

    seconds = processor_seconds(call, rounds)
    close_mesh()
    return seconds, statistics.median(walls[1:])


def predicted(case: Case, machine: Accelerator, by: Efficiency) -> float:
    """Processor seconds of a step of the busiest process."""
    section = ParallelSection(**case.parallel)
    layout = resolve_layout(section, case.processes)
    train = TrainSection(global_batch_size=case.batch, micro_batch_size=case.rows, precision="fp32")
    batch = BatchShape(case.length, case.batch)
    found = step_time(shape_of(case), section, layout, train, OptimizerSection(), batch, machine, by)
    return found.total - found.bubble


def on_ranks(count: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """body(*args) in so many new processes of one thread; what it gives, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(count):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, count, port, body, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(60)
    return found


def _rank(pipe: Connection, rank: int, count: int, port: int, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    pipe.send(body(*args))


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="steps, and calls of each calibration, whose median counts"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least one is needed")
    torch.set_num_threads(1)
    machine, by = calibrate(arguments.rounds)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread a process, float32")
    print(
        f"products {machine.peak_flops / 1e9:.0f} GFLOP/s, half at 3 x {by.half_size:.0f}; elementwise "
        f"{machine.memory_bandwidth / 1e9:.2f} GB/s; attention {by.attention:.2f} of products, half at T "
        f"{by.attention_half_length:.0f}; sums {machine.link_bandwidth / 1e9:.2f} GB/s and "
        f"{by.latency * 1e6:.0f} us each"
    )
    print(f"\n{'':26}{'predicted s':>12}{'measured s':>12}{'ratio':>8}{'wall s':>9}")
    rows = []
    for case in CASES:
        found = on_ranks(case.processes, measured, case, arguments.rounds)
        seconds, wall = max(found)
        expected = predicted(case, machine, by)
        rows.append({"case": case.name, "predicted": expected, "measured": seconds, "wall": wall})
        print(f"{case.name:26}{expected:12.3f}{seconds:12.3f}{seconds / expected:8.2f}{wall:9.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": vars(machine), "efficiency": vars(by), "rows": rows}, indent=1)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
