"""Bytes and operations of each operation of a training step, and the time that they take at least on one H200.

Limits by arithmetic: nothing here is measured. Bytes count every tensor that must be read or written once; operations
count multiplications and additions of matrix products. What there is to do is counted in
megatron/planner/operations.py, which `stagemix plan` uses, too. The tables of docs/performance.md are this script's
output.

    python benchmarks/roofline.py [--preset llama-600m ...] [--seq-length 2048] [--tokens 16384]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.presets import PRESETS as ALL_PRESETS
from megatron.config.schema import ModelSection, OptimizerSection
from megatron.planner.operations import ADDED_BYTES, Rows, head_operations, layer_operations, update_bytes

PEAK, PRODUCTS, BANDWIDTH = 989e12, 794e12, 4.3e12
"""One H200, bfloat16: the data sheet's operations a second; what the best matrix products reach, and the bytes a second
that copies reach (both published by others, not measured here)."""
ATTENTION = 600e12
"""Operations a second of published attention kernels (FlashAttention 3, heads of 128: forward 685, backward 539)."""

PRESETS = ("llama-600m", "llama-1b", "llama-3b", "llama-8b")
VOCABULARY = 128256
MICROBATCHES = 4


@dataclass(frozen=True)
class Operation:
    """count: times a step. flops, bytes_moved: each time. rate: operations a second at most."""

    name: str
    count: int
    flops: float
    bytes_moved: float
    rate: float = PRODUCTS

    @property
    def seconds(self) -> float:
        """The limit of all its times in a step: products and memory overlap, so that the longer one counts."""
        return self.count * max(self.flops / self.rate, self.bytes_moved / BANDWIDTH)


def operations(shape: ModelShape, tokens: int, length: int) -> Iterator[Operation]:
    """Of a step of MICROBATCHES microbatches of so many tokens in rows of `length`; all in bfloat16 but masters."""
    rows, layers = Rows(tokens, tokens, length), MICROBATCHES * shape.num_hidden_layers
    for one in layer_operations(shape, rows):
        yield Operation(
            one.name, layers, one.flops, one.bytes_moved, ATTENTION if one.kind == "attention" else PRODUCTS
        )
    for one in head_operations(shape, rows):
        yield Operation(one.name, MICROBATCHES, one.flops, one.bytes_moved)
    count = shape.parameter_count()
    yield Operation("gradients added in float32", MICROBATCHES, 0.0, ADDED_BYTES * count)
    yield Operation("gradient norm", 1, 0.0, 4.0 * count)
    update = update_bytes(OptimizerSection(), copy=2)
    yield Operation("AdamW, float32 state, bfloat16 copy", 1, 0.0, update * count)


def table(shape: ModelShape, tokens: int, length: int) -> list[str]:
    """A Markdown table and the floor that it implies."""
    found = list(operations(shape, tokens, length))
    total = sum(operation.seconds for operation in found)
    lines = ["| operation | times a step | GFLOP each | MB each | limit, ms a step |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {o.name} | {o.count} | {o.flops / 1e9:,.0f} | {o.bytes_moved / 1e6:,.0f} | {1000 * o.seconds:,.2f} |"
        for o in found
    ]
    trained = MICROBATCHES * tokens
    rate = trained / total
    causal, whole = (rate * shape.flops_per_token(length, causal=which) / PEAK for which in (True, False))
    words = f"{1000 * total:,.0f} ms for {trained:,} tokens, {rate:,.0f} tokens/s"
    return [*lines, "", f"The floor: {words}, MFU {causal:.1%} causal, {whole:.1%} full."]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for each preset; exits with 2 for sizes that are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=list(PRESETS), choices=sorted(ALL_PRESETS))
    parser.add_argument("--seq-length", type=int, default=2048, metavar="T")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="of a microbatch: rows of T")
    arguments = parser.parse_args(argv)
    for name, value in (("--seq-length", arguments.seq_length), ("--tokens", arguments.tokens)):
        if value < 1:
            parser.error(f"{name} {value}: at least 1 is needed")
    if arguments.tokens % arguments.seq_length:
        parser.error(f"--tokens {arguments.tokens}: not whole rows of --seq-length {arguments.seq_length}")
    for preset in arguments.preset:
        section = ModelSection(preset=preset, seq_length=arguments.seq_length)
        shape = resolve_model(section, VOCABULARY)
        print(f"### {preset}: {shape.parameter_count() / 1e9:.2f}B parameters, T {arguments.seq_length}\n")
        print("\n".join(table(shape, arguments.tokens, arguments.seq_length)), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
