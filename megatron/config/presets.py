"""Named decoder shapes. A preset fills what the user's [model] table leaves out; what the user says wins.

Values are the published configurations of the models named in `origin`. Where a paper does not give its layers,
width or heads, the shape is chosen here so that the parameter count fits the paper's, and `chosen` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

LLAMA_STYLE: dict[str, Any] = {
    "hidden_act": "silu",
    "gated_mlp": True,
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "parallel_block": False,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_dropout": 0.0,
}

NEOX_STYLE: dict[str, Any] = {
    "hidden_act": "gelu",
    "gated_mlp": False,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "parallel_block": True,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Preset:
    """Fields of `ModelSection`, where they come from, and whether they were chosen here rather than published."""

    fields: dict[str, Any]
    origin: str
    chosen: bool = False


def _preset(style: dict[str, Any], origin: str, *, chosen: bool = False, **fields: Any) -> Preset:
    return Preset({**style, **fields}, origin, chosen)


_DEMO: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
    "tie_word_embeddings": True,
}

PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "llama-tiny": _preset(
            LLAMA_STYLE,
            "the smallest shape with every part in it, for tests and trials",
            chosen=True,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=176,
            tie_word_embeddings=True,
        ),
        "llama-demo": _preset(
            LLAMA_STYLE, "the model of `make demo`: what two CPU cores train in minutes", chosen=True, **_DEMO
        ),
        "llama-160m": _preset(
            LLAMA_STYLE,
            "Llama layers at the width and depth of GPT-2 small",
            chosen=True,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=2048,
        ),
        "llama-600m": _preset(
            LLAMA_STYLE,
            "Llama layers at the width and depth of Qwen3-0.6B",
            chosen=True,
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            rope_theta=500000.0,
            tie_word_embeddings=True,
        ),
        "llama-1b": _preset(
            LLAMA_STYLE,
            "Llama-3.2-1B, without its long-context scaling of the rotary frequencies",
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
            rope_theta=500000.0,
            tie_word_embeddings=True,
        ),
        "llama-3b": _preset(
            LLAMA_STYLE,
            "Llama-3.2-3B, without its long-context scaling of the rotary frequencies",
            hidden_size=3072,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=8192,
            rope_theta=500000.0,
            tie_word_embeddings=True,
        ),
        "llama-8b": _preset(
            LLAMA_STYLE,
            "Llama-3-8B",
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=14336,
            rope_theta=500000.0,
        ),
        "neox-160m": _preset(
            NEOX_STYLE,
            "Pythia-160M",
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=3072,
        ),
        "paper-b-470m": _preset(
            LLAMA_STYLE,
            "arXiv 2408.10914, 470M: parallel blocks, SwiGLU, no biases; layers, width and heads are not published",
            chosen=True,
            hidden_size=1024,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            intermediate_size=2816,
            parallel_block=True,
            tie_word_embeddings=True,
        ),
        "paper-b-2.8b": _preset(
            LLAMA_STYLE,
            "arXiv 2408.10914, 2.8B: parallel blocks, SwiGLU, no biases; layers, width and heads are not published",
            chosen=True,
            hidden_size=2560,
            num_hidden_layers=28,
            num_attention_heads=20,
            num_key_value_heads=20,
            head_dim=128,
            intermediate_size=6912,
            parallel_block=True,
            tie_word_embeddings=True,
        ),
    }
)
