"""Whether a Hugging Face folder's config.json means the model that its weights are to be taken into.

Sizes are seen from the tensors. What is not (how many heads a matrix is, the angles of positions, the activation) would
train another function without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import config_json

_SAME = {
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "layer_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_parallel_residual",
}  # fmt: skip
_FACTORS = ("partial_rotary_factor", "rotary_pct")


def check_config(folder: Path, shape: ModelShape) -> None:
    """Raises CheckpointError that names each key, its value there and ours; also where the file cannot be read."""
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: it says what the folder's weights mean") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    ours = config_json(shape, bos_token_id=0, eos_token_id=0, dtype="float32")
    wanted = {key: ours[key] for key in sorted(_SAME & ours.keys())} | _rotary(ours)
    given = _rotary(theirs) | {key: theirs.get(key, _default(key, theirs)) for key in _SAME}
    different = [
        f"{key} is {given[key]!r}, the model has {value!r}"
        for key, value in wanted.items()
        if given.get(key) is not None and given[key] != value
    ]
    if different:
        raise CheckpointError(
            f"{path}: {'; '.join(different)}: its weights would mean another function; set [model] as the folder says, "
            "or take another folder"
        )


def _default(key: str, config: Mapping[str, Any]) -> Any:
    """What transformers takes where a config leaves a key out; None where it does not matter here."""
    if key == "num_key_value_heads":
        return config.get("num_attention_heads")
    return {"hidden_act": "silu" if config.get("model_type") == "llama" else "gelu"}.get(key)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base, scaling and share of the rotary positions, wherever a version of transformers keeps them."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    base = parameters.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0
    found = {"rope_theta": float(base), "rope_type": kind}
    shares = [source[key] for source in (parameters, config) for key in _FACTORS if source.get(key) is not None]
    return found | ({"partial_rotary_factor": float(shares[0])} if shares else {})
