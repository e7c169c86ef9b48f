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

GPT2_STYLE: dict[str, Any] = {
    "hidden_act": "gelu_tanh",
    "gated_mlp": False,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "position_embedding": "learned",
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}

COHERE_STYLE: dict[str, Any] = {
    **LLAMA_STYLE,
    "norm": "layernorm_no_bias",
    "parallel_block": True,
    "shared_norm": True,
    "tie_word_embeddings": True,
}

QWEN_STYLE: dict[str, Any] = {
    **LLAMA_STYLE,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def _llama3_scaling(factor: float) -> dict[str, Any]:
    """Of Llama 3.1 (factor 8) and 3.2 (factor 32)."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
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
        "llama-3.2-1b": _preset(
            LLAMA_STYLE,
            "Llama-3.2-1B, with its scaling of the rotary frequencies",
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
            rope_theta=500000.0,
            rope_scaling=_llama3_scaling(32.0),
            tie_word_embeddings=True,
        ),
        "llama-3.2-3b": _preset(
            LLAMA_STYLE,
            "Llama-3.2-3B, with its scaling of the rotary frequencies",
            hidden_size=3072,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=8192,
            rope_theta=500000.0,
            rope_scaling=_llama3_scaling(32.0),
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
        "llama-3.1-8b": _preset(
            LLAMA_STYLE,
            "Llama-3.1-8B, with its scaling of the rotary frequencies",
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=14336,
            rope_theta=500000.0,
            rope_scaling=_llama3_scaling(8.0),
        ),
        "mistral-7b": _preset(
            LLAMA_STYLE,
            "Mistral-7B-v0.3, which has no sliding window",
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=14336,
            rope_theta=1000000.0,
        ),
        "qwen2.5-0.5b": _preset(
            QWEN_STYLE,
            "Qwen2.5-0.5B",
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=4864,
            query_key_value_bias=True,
        ),
        "qwen3-0.6b": _preset(
            QWEN_STYLE,
            "Qwen3-0.6B",
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            qk_norm="head",
        ),
        "olmo2-1b": _preset(
            LLAMA_STYLE,
            "OLMo-2-0425-1B: norms after attention and MLP, queries and keys normed over their width",
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=128,
            intermediate_size=8192,
            norm_eps=1e-6,
            norm_place="after",
            qk_norm="width",
            rope_theta=500000.0,
        ),
        "gemma3-1b": _preset(
            LLAMA_STYLE,
            "Gemma-3-1B (text): of six layers five see 512 positions",
            hidden_size=1152,
            num_hidden_layers=26,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            intermediate_size=6912,
            hidden_act="gelu_tanh",
            norm_eps=1e-6,
            norm_place="both",
            norm_unit_offset=True,
            qk_norm="head",
            rope_theta=1000000.0,
            rope_local_theta=10000.0,
            sliding_window=512,
            sliding_pattern=6,
            embedding_multiplier=1152**0.5,
            tie_word_embeddings=True,
        ),
        "gpt2": _preset(
            GPT2_STYLE,
            "GPT-2 small",
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=3072,
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
        "paper-a-2.6b": _preset(
            GPT2_STYLE,
            "arXiv 2309.16298, 2.6B: layers, width, heads and learned positions are published, the rest is GPT-2's",
            chosen=True,
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            intermediate_size=10240,
        ),
        "paper-b-470m": _preset(
            COHERE_STYLE,
            "arXiv 2408.10914, 470M: parallel blocks, SwiGLU, no biases; layers, width, heads and norm are not "
            "published: one LayerNorm a block and tied words as in Cohere's Command R",
            chosen=True,
            hidden_size=1024,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            intermediate_size=2816,
        ),
        "paper-b-2.8b": _preset(
            COHERE_STYLE,
            "arXiv 2408.10914, 2.8B: parallel blocks, SwiGLU, no biases; layers, width, heads and norm are not "
            "published: one LayerNorm a block and tied words as in Cohere's Command R",
            chosen=True,
            hidden_size=2560,
            num_hidden_layers=28,
            num_attention_heads=20,
            num_key_value_heads=20,
            head_dim=128,
            intermediate_size=6912,
        ),
    }
)
