"""Bytes and operations of each operation of a training step, and the time that they take at least on one H200.

Limits by arithmetic: nothing here is measured. Bytes count every tensor that must be read or written once; operations
count multiplications and additions of matrix products. The tables of docs/performance.md are this script's output.

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
from megatron.config.schema import ModelSection

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
    layers = MICROBATCHES * shape.num_hidden_layers
    h, f, v = shape.hidden_size, shape.intermediate_size, shape.padded_vocab_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    for name, inputs, outputs in (
        ("query, key, value", h, query + 2 * key),
        ("attention output", query, h),
        ("gate, up", h, 2 * f),
        ("down", f, h),
    ):
        moved = 2 * (tokens * (inputs + outputs) + inputs * outputs)
        yield Operation(f"{name}: product", layers, 2.0 * tokens * inputs * outputs, moved)
        yield Operation(f"{name}: both gradients", layers, 4.0 * tokens * inputs * outputs, 2 * moved)
    pairs = 2.0 * tokens * length * query  # half of the square: 2 products x 2 operations / 2
    heads = 2 * tokens * (2 * query + 2 * key)
    yield Operation("attention, forward", layers, pairs, heads, ATTENTION)
    yield Operation("attention, backward", layers, 2.5 * pairs, 2 * heads, ATTENTION)
    per_layer = {
        "norm + add and norm, forward": 4 * h + 8 * h,
        "norm + add and norm, backward": 8 * h + 8 * h,
        "residual addition": 6 * h,
        "rotary positions, forward and backward": 8 * (query + key),
        "gated activation, forward": 6 * f,
        "gated activation, backward": 10 * f,
    }
    for name, each in per_layer.items():
        yield Operation(name, layers, 0.0, tokens * each)
    yield Operation("head: product and both gradients", MICROBATCHES, 6.0 * tokens * h * v, 6 * tokens * (h + v))
    yield Operation("cross-entropy: read, read and write", MICROBATCHES, 0.0, 6.0 * tokens * v)
    count = shape.parameter_count()
    yield Operation("gradients added in float32", MICROBATCHES, 0.0, 10.0 * count)
    yield Operation("gradient norm", 1, 0.0, 4.0 * count)
    yield Operation("AdamW, float32 state, bfloat16 copy", 1, 0.0, 30.0 * count)


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
