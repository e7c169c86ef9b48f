"""A whole training step on CPU: ours against a plain PyTorch loop over transformers' Llama of the same shape.

One process, the same batches, the two taken in turns; medians. Both sides accumulate over micro-batches, clip to norm
1 and step AdamW (torch's fused kernel). The peer sees one document a row (it has no document mask); ours is timed so,
and with several documents a row.

    python benchmarks/step_cpu.py                          # fp32 and bf16, the demo's shape
    python benchmarks/step_cpu.py --precision bf16 --rounds 9 --json step.json
    python benchmarks/step_cpu.py --compiled               # ours with compiled layers besides
    python benchmarks/step_cpu.py --attention              # the table in kernels/attention_blockwise.py

Our engine tells glibc to keep freed memory, for the whole process: the peer profits too. `peer, own allocator` is the
peer timed before that, as it runs by itself. On a shared machine read `cpu`, the processor time of a step, and take
--threads 1: a thread that waits for a core makes the other one wait too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from microbatch import Micro
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import KernelsSection, ModelSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.engines.host_memory import keep_freed_memory
from megatron.engines.kernel_choice import choose_kernels
from megatron.engines.precision import COMPUTE_DTYPES
from megatron.kernels.attention import piece_starts, plan_for_sdpa
from megatron.kernels.attention_blockwise import attention_blockwise, plan_blocks
from megatron.kernels.choice import Kernels

COMPILED = {"compile": "layers", "norm": "compile", "rope": "compile", "activation": "compile"}
Figures = dict[str, dict[str, float]]


def make_batch(shape: ModelShape, arguments: argparse.Namespace, documents: int, seed: int) -> list[Micro]:
    """A global batch of random tokens with so many documents in a row, cut at random places."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = arguments.micro_batch_size, arguments.seq_length
    batch = []
    for number in range(arguments.global_batch_size // rows):
        tokens = torch.randint(0, shape.vocab_size, (rows, length + 1), generator=generator)
        cuts = torch.randint(1, length, (rows, documents - 1), generator=generator)
        ids = torch.zeros(rows, length, dtype=torch.int32)
        ids.scatter_add_(1, cuts, torch.ones_like(cuts, dtype=torch.int32))
        sources = torch.arange(rows) % 2
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        numbers = torch.arange(rows) + number * rows
        batch.append(Micro(inputs, targets, ids.cumsum(1).int(), sources, numbers))
    return batch


def peer_step(shape: ModelShape, precision: str) -> Callable[[list[Micro]], None]:
    """The plain loop: transformers' model, autocast for bf16, gradient accumulation, clipping, fused AdamW."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_word_embeddings,
        rms_norm_eps=shape.norm_eps,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batch: list[Micro]) -> None:
        valid = sum(m.targets.numel() for m in batch)
        for micro in batch:
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                output = model(
                    input_ids=micro.tokens, labels=micro.targets, shift_labels=micro.targets, num_items_in_batch=valid
                )
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(
    shape: ModelShape, precision: str, arguments: argparse.Namespace, **asked: str
) -> Callable[[list[Micro]], None]:
    """Our engine's train_step, with the kernels that a run on this machine would choose. asked: keys of [kernels]."""
    sizes = {"global_batch_size": arguments.global_batch_size, "micro_batch_size": arguments.micro_batch_size}
    section = KernelsSection.model_validate(asked)
    rows = arguments.micro_batch_size, arguments.seq_length
    choice = choose_kernels(section, shape, COMPUTE_DTYPES[precision], rows)
    print(f"kernels: {choice.reason}")
    sections = OptimizerSection(), ParallelSection(), TrainSection(**sizes)
    engine = build_engine(shape, *sections, 0, precision, kernels=Kernels(**choice.kernels))

    def step(batch: list[Micro]) -> None:
        if not engine.train_step(batch, 1e-4).updated:
            raise SystemExit("the step made no update")

    return step


def in_turns(sides: dict[str, Callable[[], None]], rounds: int) -> Figures:
    """Median wall and processor seconds of each side, one call of each a round, after one call that is not counted."""
    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpus: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if number:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    return {
        name: {
            "wall": statistics.median(walls[name]),
            "cpu": statistics.median(cpus[name]),
            "best": min(walls[name]),
            "best_cpu": min(cpus[name]),
        }
        for name in sides
    }


def compare(precision: str, arguments: argparse.Namespace) -> Figures:
    """The figures of one precision, printed as they come."""
    shape = resolve_model(ModelSection(preset=arguments.preset, seq_length=arguments.seq_length), arguments.vocabulary)
    one, several = (make_batch(shape, arguments, documents, seed=documents) for documents in (1, 4))
    peer = peer_step(shape, precision)
    figures = in_turns({"peer, own allocator": lambda: peer(one)}, max(1, arguments.rounds // 2))
    ours = our_step(shape, precision, arguments)
    sides = {
        "peer": lambda: peer(one),
        "ours, one document a row": lambda: ours(one),
        "ours, four documents a row": lambda: ours(several),
    }
    if arguments.compiled:
        compiled = our_step(shape, precision, arguments, **COMPILED)
        sides["ours, compiled layers"] = lambda: compiled(one)
    figures |= in_turns(sides, arguments.rounds)
    tokens = arguments.global_batch_size * arguments.seq_length
    print(f"\n{precision}: {shape.parameter_count() / 1e6:.2f}M parameters, {tokens} tokens a step")
    print(f"{'':28}{'wall s':>9}{'tokens/s':>10}{'ratio':>7}{'best s':>9}{'cpu s':>9}{'ratio':>7}")
    for name, row in figures.items():
        ratio, cpu_ratio = row["wall"] / figures["peer"]["wall"], row["cpu"] / figures["peer"]["cpu"]
        row |= {"tokens_per_second": tokens / row["wall"], "ratio": ratio, "cpu_ratio": cpu_ratio}
        print(
            f"{name:28}{row['wall']:9.3f}{row['tokens_per_second']:10.0f}{ratio:7.2f}"
            f"{row['best']:9.3f}{row['cpu']:9.3f}{cpu_ratio:7.2f}"
        )
    return figures


def attention_table(arguments: argparse.Namespace) -> Figures:
    """One layer's attention by several ways, forward and backward: best milliseconds (processor's, with one thread)."""
    keep_freed_memory()
    rows, length, heads, groups, size = arguments.micro_batch_size, arguments.seq_length, 8, 4, 32
    several = make_batch(
        resolve_model(ModelSection(preset="llama-demo", seq_length=length), 8192), arguments, documents=3, seed=3
    )[0].document_ids
    first = piece_starts(several)
    alone = torch.zeros_like(first)
    table: Figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(rows, length, n, size).to(dtype).transpose(1, 2) for n in (heads, groups, groups)]
        query, key, value = (x.detach().requires_grad_() for x in inputs)
        mask = plan_for_sdpa(first)
        added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf) if mask is not None else None
        grad = torch.randn(rows, heads, length, size).to(dtype)

        def sdpa(attn_mask: Tensor | None, q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:
            causal = attn_mask is None
            return functional.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=causal, enable_gqa=True)

        def blocks(plan: tuple, q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:  # type: ignore[type-arg]
            grouped = q.unflatten(1, (groups, heads // groups)).transpose(2, 3)
            flat = attention_blockwise(grouped, k.unsqueeze(3), v.unsqueeze(3), plan)
            return flat.view(rows, length, heads, size).transpose(1, 2)

        plans = {f"blocks of {b}": plan_blocks(first, dtype, b) for b in (64, 128, 256, length)}
        plans["blocks of 128, causal only"] = plan_blocks(alone, dtype)
        ways: dict[str, Callable[[], Tensor]] = {
            "SDPA, causal only": lambda f=sdpa: f(None),
            "SDPA, bool mask": lambda f=sdpa, m=mask: f(m),
            "SDPA, additive mask": lambda f=sdpa, m=added: f(m),
            **{name: (lambda f=blocks, p=plan: f(p)) for name, plan in plans.items()},
        }
        sides = {name: (lambda way=way, g=grad: way().backward(g)) for name, way in ways.items()}
        for name, row in in_turns(sides, arguments.rounds).items():
            table.setdefault(name, {})[str(dtype).removeprefix("torch.")] = (
                1000 * row["best_cpu" if arguments.threads == 1 else "best"]
            )
    print(f"{'attention, best ms':30}" + "".join(f"{dtype:>10}" for dtype in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{name:30}" + "".join(f"{value:10.1f}" for value in row.values()))
    return table


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--preset", default="llama-demo")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", action="store_true", help="time ways of attention instead of the step")
    parser.add_argument("--compiled", action="store_true", help="time ours with compiled layers too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(", ".join(f"{name} {value}" for name, value in versions.items()), f"threads {arguments.threads}")
    if arguments.attention:
        figures: dict[str, Figures] = {"attention": attention_table(arguments)}
    else:
        figures = {precision: compare(precision, arguments) for precision in arguments.precision}
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "threads": arguments.threads} | figures, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
