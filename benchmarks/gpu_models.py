"""Decoders that `gpu.py` trains, what a token of theirs costs, and what others have published.

MFU, model FLOP utilisation: operations that training asks for, over those that the device could have done meanwhile.
For N parameters that are multiplied (without the embedding look-up, with the head; a tied head once), L layers of d =
heads x head size, and sequences of T tokens, training on one token asks for

    c, causal:  6N +  6LdT   the half of the attention matrix that is visible, two products forward, four backward
    n, whole:   6N + 12LdT   all of it (Chowdhery et al., arXiv 2204.02311, appendix B)

operations; recomputed ones never count. Of the device: 989 TFLOP/s, NVIDIA's figure for dense bfloat16 of an H100 or
H200, or what part a's best product reached. Where rows hold several documents, less is visible than c counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection

LLAMA_3_WORDS = 128256
_DRY: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 32,
}  # fmt: skip


def shape_of(preset: str, seq_length: int, dry: bool = False) -> ModelShape:
    """A preset with Llama 3's vocabulary; in a dry run with the same features and hardly any size."""
    section = ModelSection(preset=preset, seq_length=seq_length, **(_DRY if dry else {}))
    return resolve_model(section, 300 if dry else LLAMA_3_WORDS)


@dataclass(frozen=True)
class Utilisation:
    """MFU by both conventions, each against a rate of the device."""

    causal: float
    whole: float

    def words(self) -> str:
        """ "56.1 % c, 58.0 % n"."""
        return f"{100 * self.causal:.1f} % c, {100 * self.whole:.1f} % n"


def utilisation(shape: ModelShape, seq_length: int, tokens_per_second: float, rate: float) -> Utilisation:
    """Of a device that does `rate` operations a second."""
    asked = [tokens_per_second * shape.flops_per_token(seq_length, causal=causal) for causal in (True, False)]
    return Utilisation(asked[0] / rate, asked[1] / rate)


@dataclass(frozen=True)
class Published:
    """A figure of others, for bf16 on GPUs of the H100's arithmetic. mfu: in per cent, with its convention."""

    who: str
    hardware: str
    model: str
    seq_length: int
    tokens_per_second: int
    mfu: str


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "llama-600m": (Published("llmq", "1x H100", "0.5B", 1024, 150_000, "47 c"),),
    "llama-1b": (
        Published("llmq", "1x H100", "1.5B", 1024, 58_900, "57 c"),
        Published("llm-foundry", "8x H100", "1.3B", 2048, 45_500, "42 n"),
        Published("llm-foundry", "8x H100", "1.3B", 8192, 29_200, "38 n"),
        Published("nanochat", "8x H100", "1.9B", 2048, 41_700, "51 n"),
    ),
    "llama-3b": (
        Published("llmq", "1x H100", "3B", 1024, 30_900, "59 c"),
        Published("llm-foundry", "8x H100", "3B", 4096, 21_000, "42 n"),
    ),
    "llama-8b": (
        Published("llmq", "1x H100", "7B", 1024, 13_900, "60 c"),
        Published("llm-foundry", "8x H100", "7B", 2048, 10_600, "46 n"),
        Published("ml-engineering (FA3, ZeRO-2)", "8x H200", "8B", 8192, 8_950, "47 c"),
        Published("torchtitan", "8x H100", "8B", 8192, 6_670, "at most 39 n"),
        Published("torchtitan, fp8", "8x H100", "8B", 8192, 8_530, "-"),
    ),
}
"""By the preset that comes nearest; tokens a second of one GPU. As published, none of them measured here."""


def published_words(preset: str, seq_length: int) -> str:
    """What others gave for such a model: at this sequence length, or at all where nobody gave that."""
    rows = PUBLISHED.get(preset, ())
    rows = tuple(row for row in rows if row.seq_length == seq_length) or rows
    return "; ".join(
        f"{row.who}, {row.hardware}, {row.model} at {row.seq_length}: {row.tokens_per_second:,} tokens/s, {row.mfu} %"
        for row in rows
    )


def activation_bytes(shape: ModelShape) -> int:
    """Of a token in one layer, roughly: inputs of norms, products and attention in bfloat16, nothing recomputed."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads, groups = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return 2 * (5 * hidden + 2 * heads + 2 * groups + 3 * inner)
