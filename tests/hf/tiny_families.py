"""A tiny random model of each architecture, made and saved by transformers from its own config class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.hf.architecture import shape_from_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.hf.parity import prove
from megatron.hf.proof_prompts import prompts_from
from megatron.hf.proof_record import Proof

_COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {
    "head_dim": 8,
    "layer_types": ["full_attention"] * 3,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_TWO_SLIDE = ("sliding_attention", "sliding_attention", "full_attention")
_TWO_BASES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "llama tied, biases": (
        "llama",
        _GROUPED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
    ),
    "llama 3.1": (
        "llama",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama yarn": (
        "llama",
        _GROUPED
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", _GROUPED | {"sliding_window": None}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED | {"head_dim": 12}),
    "olmo2": ("olmo2", _GROUPED),
    "olmo3": ("olmo3", _GROUPED | {"layer_types": [*_TWO_SLIDE], "sliding_window": 9}),
    "phi3": ("phi3", _GROUPED),
    "gemma": ("gemma", _GROUPED | {"head_dim": 12}),
    "gemma2": ("gemma2", _GEMMA | {"query_pre_attn_scalar": 20}),
    "gemma3": ("gemma3_text", _GEMMA | {"rope_parameters": _TWO_BASES}),
    "gpt_neox": ("gpt_neox", _COMMON | {"rotary_pct": 0.5}),
    "cohere": ("cohere", _GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_inner": 48,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

WINDOWS = {
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5},
    "qwen3": {"use_sliding_window": True, "layer_types": [*_TWO_SLIDE], "sliding_window": 4},
    "gemma2": {"layer_types": [*_TWO_SLIDE], "sliding_window": 7},
    "gemma3": {"layer_types": [*_TWO_SLIDE], "sliding_window": 7},
    "olmo3": {"sliding_window": 2},
}
"""What gives some of them a sliding window."""


def make_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """The model of CONFIGS in `folder`, norms and biases random too. fields: of the config, over those there."""
    kind, given = CONFIGS[name]
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **given | fields), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def proven(
    folder: Path, original: Path, extent: str, dtype: torch.dtype = torch.float32, tolerance: float = 1e-4
) -> Proof:
    """The proof of a folder against the weights and the shape of the one that it was made from."""
    shape = shape_from_folder(original)
    prompts = prompts_from({"made": [3, 1, 4, 15, 9, 26, 5, 35, 8, 97, 93, 2]}, shape)
    source = HuggingFaceTensors(original, shape)
    return prove(folder, source, shape, prompts, dtype=dtype, tolerance=tolerance, extent=extent)


def tampered(
    original: Path, folder: Path, tensors: Callable[[dict[str, Tensor]], None] | None = None, **config: Any
) -> Path:
    """A copy with some tensors or keys of config.json changed."""
    shutil.copytree(original, folder)
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder
